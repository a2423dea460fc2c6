"""inspection -> probe -> decision -> rewrite -> report, as one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from rnnguard.decision.rulebook import Rulebook
from rnnguard.errors import refuse
from rnnguard.findings import Rules, advice, findings_told, rulebook_of
from rnnguard.inspection.batches import Batches, Loss, Step
from rnnguard.inspection.preflight import (
    kind_refusals,
    option_refusals,
    run_refusals,
    skip_refusals,
    tier_refusals,
)
from rnnguard.inspection.sites import left_alone
from rnnguard.mending import Mending, diagnosed
from rnnguard.probe.measurement import Look, measure, unmeasured
from rnnguard.probe.subject import Subject
from rnnguard.probe.training_step import TrainStep
from rnnguard.race import Race
from rnnguard.ranks import alike, note, rank, told
from rnnguard.records import TIERS, Plan, Tier
from rnnguard.replay import read_plan, replay, replay_refusals
from rnnguard.report.notes import (
    ORDER,
    about_growth,
    about_race,
    notes_of,
    replay_notes,
)
from rnnguard.report.report import Report
from rnnguard.request import Given, Request, given, looked_at, tried, watched, without
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.growth import Growth, growth_of
from rnnguard.rewrite.stepguard import engagement_of
from rnnguard.rewrite.transaction import transaction
from rnnguard.trying import tried_out


def audit(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    data: Any = None,
    *,
    inputs: Any = None,
    loss: Loss | None = None,
    step: Step | None = None,
    memory: int | None = None,
    trial: int = 0,
    train_step: TrainStep | None = None,
    rules: Rules = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    verbose: bool | None = None,
) -> Report:
    """What stands in the way of the gradient; model, optimizer and random state stay as they are.

    data: iterable of (inputs, target), or one such pair; inputs: a tensor, args tuple or
    kwargs dict when there is no target. memory: steps back that the task needs to look.
    trial: real optimizer steps to take on the data and take back, for readings that only
    training shows (spikes, update sizes, the first non-finite value); needs optimizer and loss.
    skip: paths of sites, or of what holds them, that are not reported. Raises RefusedError
    with all reasons when the model cannot be run.
    """
    rulebook, asked = rulebook_of(rules), given(model, optimizer)
    skip = left_alone(asked.model, skip)
    held = kind_refusals(asked.optimizer) if asked.optimizer is not None else ()
    refuse([*option_refusals(memory, None), *asked.audit_refusals(), *run_refusals(asked.model),
            *skip_refusals(asked.model, skip), *held])  # fmt: skip
    request = Request(data, inputs, loss, step, memory, None, seed)
    subject = request.subject(asked)
    look = tried(measure(subject), subject, trial)
    look, seen = watched(look, subject, optimizer, train_step)
    look = without(diagnosed(look), skip)
    told = findings_told(rulebook, asked.model, look)
    notes = (*advice(rulebook, told.findings, look), *notes_of(look, subject), *seen)
    report = Report(
        sites=tuple(site.record for site in look.sites),
        before=look.measurement,
        after=None,
        findings=told.findings,
        remaining=told.remaining,
        suppressed=told.suppressed,
        changes=(),
        plan=Plan(),
        notes=(*notes, *asked.notes),
        live=partial(engagement_of, asked.optimizer),
    )
    return _shown(report, verbose)


def stabilize(
    model: nn.Module,
    optimizer: Optimizer,
    data: Any = None,
    *,
    inputs: Any = None,
    loss: Loss | None = None,
    step: Step | None = None,
    memory: int | None = None,
    total_steps: int | None = None,
    tiers: Sequence[Tier] = TIERS,
    trial: int | bool | None = None,
    rules: Rules = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    verbose: bool | None = None,
) -> Report:
    """Measures, mends in place and measures again; the report shows both and can undo all.

    Takes `audit`'s readings options; total_steps: planned optimizer steps, at which the cosine
    from a trial's peak ends (without them it holds); tiers: what may be changed; skip: paths to
    leave alone. trial: with data and a loss, candidates train a little, all of it taken back,
    and only what then is better than nothing is applied; False for the probe's word alone, a
    number for the steps per candidate. Raises RefusedError before anything is touched, or
    RewriteError with all restored.
    """
    request = Request(data, inputs, loss, step, memory, total_steps, seed, trial)
    report = _stabilized(model, optimizer, request, tiers, rules, skip, verbose, keep=True)
    return _shown(report, verbose)


def plan(
    model: nn.Module,
    optimizer: Optimizer,
    data: Any = None,
    *,
    inputs: Any = None,
    loss: Loss | None = None,
    step: Step | None = None,
    memory: int | None = None,
    total_steps: int | None = None,
    tiers: Sequence[Tier] = TIERS,
    trial: int | bool | None = None,
    rules: Rules = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    verbose: bool | None = None,
) -> Plan:
    """What `stabilize` would do: done, measured and taken back; replay it with `apply`."""
    request = Request(data, inputs, loss, step, memory, total_steps, seed, trial)
    report = _stabilized(model, optimizer, request, tiers, rules, skip, verbose, keep=False)
    return _shown(report, verbose).plan


def apply(
    model: nn.Module, optimizer: Optimizer, plan: Plan | dict[str, Any] | str | Path
) -> Report:
    """Replays a saved plan without a probe; a second time changes nothing.

    plan: a Plan, its table, or the path of its file; for a wrapped model, one of steps only.
    To resume in a new process: build the plain model and the optimizer as for the first time,
    apply the plan, then load the states of both. A checkpoint of a rewritten model fits no plain
    one: torch names the unexpected keys then, such as `rnn.output_norm.weight`, and this call
    before the load is the cure. Raises RefusedError with all reasons before anything is touched:
    a plan that cannot be read (RG924), names or doses that do not fit (RG914, RG915), values or
    structure for weights that are trained or loaded (RG902).

    Without a guard nothing tells that a gain (`critical_gain`) was applied: it scales what it
    finds, so that a plan of such values alone is to be applied once.
    """
    asked = given(model, optimizer)
    with alike():
        plan = told(read_plan(plan))
        tiers = [change.tier for change in plan]
        refuse([*(asked.kept(tiers) or asked.refusals(tiers)),
                *replay_refusals(asked.model, asked.optimizer, plan)])  # fmt: skip
    edit = Edit(asked.model, asked.optimizer)
    with transaction(edit), alike():
        changes = replay(asked.model, edit, plan)
        edit.check_commit()
    nothing = Batches((), "not run", None, None, None)
    subject = Subject(asked.model, asked.optimizer, nothing, None, None, 0, guarded=True)
    return Report(
        sites=(),
        before=unmeasured(subject).measurement,
        after=None,
        findings=(),
        remaining=(),
        changes=changes,
        plan=plan,
        notes=(*replay_notes(plan, changes), *asked.notes, *about_growth(growth_of(edit)), ORDER),
        undo=edit.undo_,
        live=partial(engagement_of, asked.optimizer),
    )


def _stabilized(
    model: nn.Module,
    optimizer: Optimizer,
    request: Request,
    tiers: Sequence[Tier],
    rules: Rules,
    skip: Iterable[str],
    verbose: bool | None,
    *,
    keep: bool,
) -> Report:
    asked = given(model, optimizer)
    tiers = cast("list[Tier]", [tiers] if isinstance(tiers, str) else list(tiers))
    with alike():
        rulebook, skip = rulebook_of(rules), left_alone(asked.model, skip)
        options = option_refusals(request.memory, request.total_steps)
        refuse([*tier_refusals(tiers), *options, *request.trial_refusals(),
                *asked.refusals(tiers),
                *run_refusals(asked.model), *skip_refusals(asked.model, skip),
                *asked.held_refusals(tiers, skip)])  # fmt: skip
        subject = request.subject(asked)
        before = looked_at(subject)
    edit = Edit(asked.model, asked.optimizer)
    race = None
    with transaction(edit), alike():
        mending = Mending(subject, rulebook, edit, asked.permitted(tiers), skip, before)
        mending.refusals += asked.kept(tiers)
        if rank() == 0:
            mending.mend_sites()
            race = tried_out(mending, request, before, verbose)
            mending.guard_steps()
        decided = told((mending.changes, mending.refusals))
        if rank() > 0:
            mending.follow(*decided)
        edit.check_commit()
        growth = growth_of(edit)
        if not keep:
            edit.rollback_()
    return _report(rulebook, before, mending, edit, asked, keep, growth, race)


def _report(
    rulebook: Rulebook, before: Look, mending: Mending, edit: Edit, asked: Given, keep: bool,
    growth: Growth, race: Race | None,
) -> Report:  # fmt: skip
    applied = [change for change in mending.changes if change.outcome == "applied"]
    ordered = sorted(applied, key=lambda change: TIERS.index(change.tier))
    planned = [change.model_copy(update={"outcome": "planned"}) for change in ordered]
    after = mending.look if mending.changes else before
    chosen = findings_told(rulebook, asked.model, before, after)
    return Report(
        sites=tuple(site.record for site in before.sites),
        before=before.measurement,
        after=after.measurement if mending.changes else None,
        findings=chosen.findings,
        remaining=chosen.remaining,
        suppressed=chosen.suppressed,
        changes=tuple(mending.changes if keep else planned),
        plan=Plan(changes=tuple(planned)),
        refusals=tuple(mending.refusals),
        notes=(
            *advice(rulebook, chosen.findings, before, after),
            *notes_of(before, mending.subject),
            *asked.notes,
            *note(),
            *about_growth(growth),
            *mending.notes,
            *about_race(race, before.measurement.run.scheduled),
            ORDER,
        ),
        trial=race,
        undo=edit.undo_ if keep and mending.changes else None,
        live=partial(engagement_of, asked.optimizer),
    )


def _shown(report: Report, verbose: bool | None) -> Report:
    if verbose and rank() == 0:
        from rnnguard.report.text import show

        show(report)
    return report
