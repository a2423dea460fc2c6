"""inspection -> probe -> decision -> rewrite -> report, as one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rnnguard.decision.diagnosis import findings_of
from rnnguard.decision.rulebook import Rulebook, load_rulebook
from rnnguard.errors import Refusal, refuse
from rnnguard.inspection.batches import Batches, Loss, Step, given_batches
from rnnguard.inspection.preflight import (
    optimizer_refusals,
    option_refusals,
    rewrite_refusals,
    run_refusals,
    skip_refusals,
    tier_refusals,
)
from rnnguard.measurements import Measurement
from rnnguard.mending import REMEDY, Mending, diagnosed, replay
from rnnguard.probe.gradients import Gradients
from rnnguard.probe.measurement import Look, measure, run_readings
from rnnguard.probe.site_demand import with_demands
from rnnguard.probe.snapshot import untouched
from rnnguard.probe.subject import Subject, check_runs, guessed_batches
from rnnguard.probe.trial import run_trial
from rnnguard.probe.trial_readings import with_trial
from rnnguard.records import TIERS, Plan, Tier
from rnnguard.report.notes import NO_SITE, ORDER, audit_findings, notes_of
from rnnguard.report.report import Report
from rnnguard.rewrite.edit import Edit, transaction
from rnnguard.rewrite.stepguard import guard_of

BATCHES = 8
Rules = Sequence[str | Path] | str | Path | None


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
    skip: paths of sites that are not reported. Raises RefusedError with all reasons when
    the model cannot be run.
    """
    rulebook, skip = _rulebook(rules), frozenset(skip)
    refuse([*option_refusals(memory, None), *run_refusals(model), *skip_refusals(model, skip),
            *(optimizer_refusals(model, optimizer) if optimizer is not None else ())])  # fmt: skip
    request = _Request(data, inputs, loss, step, memory, None, seed)
    subject = _subject(model, optimizer, request)
    look = _without(diagnosed(_tried(measure(subject), subject, trial)), skip)
    findings = (*audit_findings(rulebook, look), *findings_of(rulebook, look.measurement))
    report = Report(
        sites=tuple(site.record for site in look.sites),
        before=look.measurement,
        after=None,
        findings=findings,
        remaining=findings,
        changes=(),
        plan=Plan(),
        notes=notes_of(look, subject),
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
    rules: Rules = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    verbose: bool | None = None,
) -> Report:
    """Measures, mends in place and measures again; the report shows both and can undo all.

    Takes `audit`'s readings options; total_steps: planned optimizer steps (without them the
    schedule warms up and holds); tiers: what may be changed; skip: sites to leave alone.
    Raises RefusedError before anything is touched, or RewriteError with all restored.
    """
    request = _Request(data, inputs, loss, step, memory, total_steps, seed)
    report = _stabilized(model, optimizer, request, tiers, rules, skip, keep=True)
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
    rules: Rules = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    verbose: bool | None = None,
) -> Plan:
    """What `stabilize` would do: done, measured and taken back; replay it with `apply`."""
    request = _Request(data, inputs, loss, step, memory, total_steps, seed)
    report = _stabilized(model, optimizer, request, tiers, rules, skip, keep=False)
    return _shown(report, verbose).plan


def apply(model: nn.Module, optimizer: Optimizer, plan: Plan | dict[str, Any]) -> Report:
    """Replays a saved plan without a probe; call it before `load_state_dict`.

    Raises RefusedError (RG915) when model and plan do not fit, before anything is touched.
    """
    plan = plan if isinstance(plan, Plan) else Plan.model_validate(plan)
    refuse([*run_refusals(model), *rewrite_refusals(model, optimizer, ())])
    edit = Edit(model, optimizer)
    with transaction(edit):
        changes = replay(model, optimizer, edit, plan)
    batches = Batches((), "site alone", None, None, None)
    subject = Subject(model, optimizer, batches, None, None, 0, guarded=True)
    run = run_readings(subject, Gradients((), None, False), 0.0)
    return Report(
        sites=(),
        before=Measurement(run=run, sites=()),
        after=None,
        findings=(),
        remaining=(),
        changes=changes,
        plan=plan,
        notes=("Replayed from a plan; nothing was measured.", ORDER),
        undo=edit.undo_,
    )


@dataclass(frozen=True)
class _Request:
    """What the user said about data and task."""

    data: Any
    inputs: Any
    loss: Loss | None
    step: Step | None
    memory: int | None
    total_steps: int | None
    seed: int


def _stabilized(
    model: nn.Module,
    optimizer: Optimizer,
    request: _Request,
    tiers: Sequence[Tier],
    rules: Rules,
    skip: Iterable[str],
    *,
    keep: bool,
) -> Report:
    rulebook, skip = _rulebook(rules), frozenset(skip)
    options = option_refusals(request.memory, request.total_steps)
    refuse([*tier_refusals(tiers), *options, *run_refusals(model), *skip_refusals(model, skip),
            *rewrite_refusals(model, optimizer, skip)])  # fmt: skip
    subject = _subject(model, optimizer, request)
    before = diagnosed(measure(subject))
    refuse([*_no_site(before), *_made_in_forward(model, before)])
    edit = Edit(model, optimizer)
    with transaction(edit):
        mending = Mending(subject, rulebook, edit, tuple(tiers), skip, before)
        mending.run()
        if not keep:
            edit.rollback_()
    return _report(rulebook, before, mending, edit, keep)


def _report(rulebook: Rulebook, before: Look, mending: Mending, edit: Edit, keep: bool) -> Report:
    applied = [change for change in mending.changes if change.outcome == "applied"]
    ordered = sorted(applied, key=lambda change: TIERS.index(change.tier))
    planned = [change.model_copy(update={"outcome": "planned"}) for change in ordered]
    after = mending.look if mending.changes else before
    return Report(
        sites=tuple(site.record for site in before.sites),
        before=before.measurement,
        after=after.measurement if mending.changes else None,
        findings=(*audit_findings(rulebook, before), *findings_of(rulebook, before.measurement)),
        remaining=(*audit_findings(rulebook, after), *findings_of(rulebook, after.measurement)),
        changes=tuple(mending.changes if keep else planned),
        plan=Plan(changes=tuple(planned)),
        refusals=tuple(mending.refusals),
        notes=(*notes_of(before, mending.subject), ORDER),
        undo=edit.undo_ if keep and mending.changes else None,
    )


def _subject(model: nn.Module, optimizer: Optimizer | None, request: _Request) -> Subject:
    given = (request.data, request.inputs, request.loss, request.step)
    with untouched(model, request.data):
        batches = given_batches(model, *given, BATCHES)
    if batches is None:
        batches = guessed_batches(model, request.memory, request.seed)
        refuse(_nothing_to_run(batches))
    guarded = optimizer is not None and guard_of(optimizer) is not None
    task = (request.memory, request.total_steps, request.seed)
    subject = Subject(model, optimizer, batches, *task, guarded)
    check_runs(subject)
    return with_demands(subject) if request.memory is None else subject


def _rulebook(rules: Rules) -> Rulebook:
    folders = [rules] if isinstance(rules, str | Path) else list(rules or ())
    rulebook = load_rulebook(folders)
    rulebook.check_remedies(list(REMEDY))
    return rulebook


def _no_site(look: Look) -> list[Refusal]:
    if look.sites:
        return []
    fact = "a recurrent module is called that the model does not hold."
    cure = "Keep the modules in nn.ModuleList or nn.ModuleDict."
    return [Refusal("RG109", place, fact, cure) for place in look.unregistered] or [NO_SITE]


def _made_in_forward(model: nn.Module, look: Look) -> list[Refusal]:
    """Sites that are not there until the model has run once for good."""
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    fact, cure = "the module is made in the first forward.", "Run the model once on a batch first."
    native = (site.record.path for site in look.sites if site.record.form != "written")
    missing = (path for path in native if path not in paths)
    return [Refusal("RG907", path, fact, cure) for path in missing]


def _nothing_to_run(batches: Batches) -> list[Refusal]:
    return [] if batches.batches else [NO_SITE]


def _tried(look: Look, subject: Subject, steps: int) -> Look:
    """The look with the readings of a trial, if one is asked for."""
    if not steps:
        return look
    guard = guard_of(subject.optimizer) if subject.optimizer is not None else None
    clip = guard.settings.max_norm if guard is not None else None
    run = with_trial(look.measurement.run, run_trial(subject, steps, clip=clip))
    return replace(look, measurement=look.measurement.model_copy(update={"run": run}))


def _without(look: Look, skip: frozenset[str]) -> Look:
    """The look without the skipped sites."""
    kept = tuple(site for site in look.measurement.sites if site.path not in skip)
    sites = tuple(site for site in look.sites if site.record.path not in skip)
    measurement = look.measurement.model_copy(update={"sites": kept})
    return replace(look, measurement=measurement, sites=sites)


def _shown(report: Report, verbose: bool | None) -> Report:
    if verbose:
        from rich.console import Console

        Console().print(report)
    return report
