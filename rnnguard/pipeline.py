"""inspection -> probe -> decision -> rewrite -> report, as one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rnnguard.decision.diagnosis import audit_finding, findings_of
from rnnguard.decision.rulebook import Rulebook, load_rulebook
from rnnguard.errors import Refusal, refuse
from rnnguard.inspection.batches import Batches, Loss, Step, given_batches
from rnnguard.inspection.preflight import (
    optimizer_refusals,
    rewrite_refusals,
    run_refusals,
    skip_refusals,
    tier_refusals,
)
from rnnguard.mending import REMEDY, Mending, diagnosed, replay
from rnnguard.probe.gradients import Gradients
from rnnguard.probe.measurement import (
    Look,
    Subject,
    check_runs,
    guessed_batches,
    measure,
    run_readings,
    with_demands,
)
from rnnguard.probe.snapshot import untouched
from rnnguard.records import TIERS, Finding, Measurement, Plan, Tier
from rnnguard.report.report import Report
from rnnguard.rewrite.edit import Edit, transaction
from rnnguard.rewrite.stepguard import guard_of

BATCHES = 8
ORDER = (
    "Order: stabilize, then compile or wrap, then build the scheduler, then EMA copies, "
    "then load checkpoints."
)


def audit(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    data: Any = None,
    *,
    inputs: Any = None,
    loss: Loss | None = None,
    step: Step | None = None,
    memory: int | None = None,
    rules: Sequence[str | Path] | str | Path | None = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    verbose: bool | None = None,
) -> Report:
    """What stands in the way of the gradient; model, optimizer and random state stay as they are.

    data: iterable of (inputs, target), or one such pair; inputs: a tensor, args tuple or
    kwargs dict when there is no target. memory: steps back that the task needs to look.
    skip: paths of sites that are not reported. Raises RefusedError with all reasons when
    the model cannot be run.
    """
    rulebook, skip = _rulebook(rules), frozenset(skip)
    refuse([*run_refusals(model), *skip_refusals(model, skip),
            *(optimizer_refusals(model, optimizer) if optimizer is not None else ())])  # fmt: skip
    subject = _subject(model, optimizer, data, inputs, loss, step, memory, None, seed)
    look = _without(diagnosed(measure(subject)), skip)
    findings = (*_audit_findings(rulebook, look), *findings_of(rulebook, look.measurement))
    report = Report(
        sites=tuple(site.record for site in look.sites),
        before=look.measurement,
        after=None,
        findings=findings,
        remaining=findings,
        changes=(),
        plan=Plan(),
        notes=_notes(look),
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
    rules: Sequence[str | Path] | str | Path | None = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    verbose: bool | None = None,
) -> Report:
    """Measures, mends in place and measures again; the report shows both and can undo all.

    Takes `audit`'s readings options; total_steps: planned optimizer steps (without them the
    schedule warms up and holds); tiers: what may be changed; skip: sites to leave alone.
    Raises RefusedError before anything is touched, or RewriteError with all restored.
    """
    return _stabilize(
        model, optimizer, data, inputs, loss, step, memory, total_steps, tiers, rules, skip, seed,
        verbose, keep=True,
    )  # fmt: skip


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
    rules: Sequence[str | Path] | str | Path | None = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    verbose: bool | None = None,
) -> Plan:
    """What `stabilize` would do: done, measured and taken back; replay it with `apply`."""
    return _stabilize(
        model, optimizer, data, inputs, loss, step, memory, total_steps, tiers, rules, skip, seed,
        verbose, keep=False,
    ).plan  # fmt: skip


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


def _stabilize(
    model: nn.Module, optimizer: Optimizer, data: Any, inputs: Any, loss: Loss | None,
    step: Step | None, memory: int | None, total_steps: int | None, tiers: Sequence[Tier],
    rules: Any, skip: Iterable[str], seed: int, verbose: bool | None, *, keep: bool,
) -> Report:  # fmt: skip
    rulebook, skip = _rulebook(rules), frozenset(skip)
    refuse([*tier_refusals(tiers), *run_refusals(model), *skip_refusals(model, skip),
            *rewrite_refusals(model, optimizer, skip)])  # fmt: skip
    subject = _subject(model, optimizer, data, inputs, loss, step, memory, total_steps, seed)
    before = diagnosed(measure(subject))
    refuse(_no_site(before))
    edit = Edit(model, optimizer)
    with transaction(edit):
        mending = Mending(subject, rulebook, edit, tuple(tiers), skip, before)
        mending.run()
        if not keep:
            edit.rollback_()
    return _shown(_report(rulebook, before, mending, edit, keep), verbose)


def _report(rulebook: Rulebook, before: Look, mending: Mending, edit: Edit, keep: bool) -> Report:
    applied = [change for change in mending.changes if change.outcome == "applied"]
    ordered = sorted(applied, key=lambda change: TIERS.index(change.tier))
    planned = [change.model_copy(update={"outcome": "planned"}) for change in ordered]
    after = mending.look if mending.changes else before
    return Report(
        sites=tuple(site.record for site in before.sites),
        before=before.measurement,
        after=after.measurement if mending.changes else None,
        findings=(*_audit_findings(rulebook, before), *findings_of(rulebook, before.measurement)),
        remaining=(*_audit_findings(rulebook, after), *findings_of(rulebook, after.measurement)),
        changes=tuple(mending.changes if keep else planned),
        plan=Plan(changes=tuple(planned)),
        refusals=tuple(mending.refusals),
        notes=(*_notes(before), ORDER),
        undo=edit.undo_ if keep and mending.changes else None,
    )


def _subject(
    model: nn.Module, optimizer: Optimizer | None, data: Any, inputs: Any, loss: Loss | None,
    step: Step | None, memory: int | None, total_steps: int | None, seed: int,
) -> Subject:  # fmt: skip
    with untouched(model, data):
        batches = given_batches(model, data, inputs, loss, step, BATCHES)
    if batches is None:
        batches = guessed_batches(model, memory, seed)
        refuse(_nothing_to_run(batches))
    guarded = optimizer is not None and guard_of(optimizer) is not None
    subject = Subject(model, optimizer, batches, memory, total_steps, seed, guarded)
    check_runs(subject)
    return with_demands(subject) if memory is None else subject


def _rulebook(rules: Sequence[str | Path] | str | Path | None) -> Rulebook:
    folders = [rules] if isinstance(rules, str | Path) else list(rules or ())
    rulebook = load_rulebook(folders)
    rulebook.check_remedies(list(REMEDY))
    return rulebook


NO_SITE = Refusal(
    "RG003",
    "",
    "no torch recurrent module or cell was called while the model ran.",
    "Check that this is the recurrent model; hand-written recurrences are not judged yet.",
)


def _no_site(look: Look) -> list[Refusal]:
    return [] if look.sites else [NO_SITE]


def _nothing_to_run(batches: Batches) -> list[Refusal]:
    return [] if batches.batches else [NO_SITE]


def _without(look: Look, skip: frozenset[str]) -> Look:
    """The look without the skipped sites."""
    kept = tuple(site for site in look.measurement.sites if site.path not in skip)
    sites = tuple(site for site in look.sites if site.record.path not in skip)
    measurement = look.measurement.model_copy(update={"sites": kept})
    return Look(measurement, sites, look.unregistered, look.signature)


def _audit_findings(rulebook: Rulebook, look: Look) -> list[Finding]:
    """What the inspection saw beside the readings: no site, made-up input, unregistered cells."""
    found = []
    basis = look.measurement.run.basis
    if not look.sites:
        found.append(audit_finding(rulebook, "RG003", f"0 sites: {NO_SITE.fact}"))
    if basis == "inferred inputs":
        text = "the batch was made up from the first layer: the figures describe noise, not data."
        found.append(audit_finding(rulebook, "RG002", text))
    if basis == "site alone":
        text = "the whole model could not be run: each recurrence was probed alone."
        found.append(audit_finding(rulebook, "RG001", text))
    for place in look.unregistered:
        text = "a recurrent module is called that the model does not hold; it never trains."
        found.append(audit_finding(rulebook, "RG109", text, location=place))
    return found


def _notes(look: Look) -> tuple[str, ...]:
    run, notes = look.measurement.run, []
    notes.append(f"Rests on {run.basis}; graph recorded while the model ran.")
    for site in look.measurement.sites:
        if site.memory_source == "assumed":
            notes.append(
                f"`{site.label}`: the memory needed is assumed from the sequence length, an "
                "upper bound; declare it with memory= for a firm verdict."
            )
        if site.memory_source == "unknown":
            notes.append(
                f"`{site.label}`: the memory needed is unknown "
                f"({_why_unknown(site.readout)}); declare it with memory=."
            )
    return tuple(notes)


def _why_unknown(readout: str) -> str:
    return "every step is read out" if readout == "all_steps" else "the sequences were made up"


def _shown(report: Report, verbose: bool | None) -> Report:
    if verbose:
        from rich.console import Console

        Console().print(report)
    return report
