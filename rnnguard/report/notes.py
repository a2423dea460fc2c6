"""What a report says beside its figures: what they rest on, and what the inspection saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rnnguard.decision.diagnosis import audit_finding
from rnnguard.decision.rulebook import Rulebook
from rnnguard.errors import Refusal
from rnnguard.inspection.written import relative
from rnnguard.measurements import SiteReadings
from rnnguard.probe.measurement import Look
from rnnguard.probe.subject import Subject
from rnnguard.race import Race
from rnnguard.records import Change, Finding, Plan
from rnnguard.rewrite.growth import Growth

ORDER = (
    "Order: stabilize, then compile or wrap, then build the scheduler, then EMA copies, "
    "then load checkpoints."
)

NO_SITE = Refusal(
    "RG003",
    "",
    "no recurrence ran: neither a torch module or cell nor a chain of dependent steps.",
    "Check that this is the recurrent model, and that its sequences have three steps or more.",
)


_ROUNDS = {
    "iterations": "no step takes new input, so these are iterations and not time; not judged.",
    "fixed": "its weights are fixed, as in a reservoir, and need no gradient; not judged.",
    "tree": "its runs merge as in a tree or a grid and not along time; not judged.",
}


def audit_findings(rulebook: Rulebook, look: Look) -> list[Finding]:
    """What the inspection saw beside the readings: no site, made-up input, unregistered cells."""
    found = []
    basis = look.measurement.run.basis
    if not look.sites and basis != "not run":
        found.append(audit_finding(rulebook, "RG003", f"0 sites: {NO_SITE.fact}"))
    if basis == "inferred inputs":
        text = "the batch was made up from the first layer: the figures describe noise, not data."
        found.append(audit_finding(rulebook, "RG002", text))
    if basis == "site alone":
        text = "the whole model could not be run: each recurrence was probed alone."
        found.append(audit_finding(rulebook, "RG001", text))
    for loop in look.rounds:
        weights = " and ".join(loop.weights[:2])
        text = f"{weights} acts {loop.steps} times in a chain: {_ROUNDS[loop.kind]}"
        found.append(audit_finding(rulebook, "RG004", text, location=relative(loop.location)))
    for place in look.unregistered:
        text = "a recurrent module is called that the model does not hold; it never trains."
        found.append(audit_finding(rulebook, "RG109", text, location=relative(place)))
    return found


def replay_notes(plan: Plan, changes: Sequence[Change]) -> tuple[str, ...]:
    """What a replay rests on, and how much of the plan was in place already."""
    notes = ["Replayed from a plan; nothing was measured."]
    if idle := len(plan) - len(changes):
        notes.append(f"{idle} of the plan's {len(plan)} changes found their work done already.")
    return tuple(notes)


def notes_of(look: Look, subject: Subject) -> tuple[str, ...]:
    run, notes = look.measurement.run, []
    told = f"Rests on {run.basis}; graph recorded while the model ran."
    notes.append("The model was not run: nothing was measured." if run.basis == "not run" else told)
    if run.trial_steps:
        told = f"Trial: {run.trial_steps} real steps, all taken back"
        first = f"; first non-finite value: {run.first_nonfinite}" if run.first_nonfinite else ""
        stopped = f"; stopped at {run.trial_stopped}" if run.trial_stopped else ""
        notes.append(f"{told}{first}{stopped}.")
    for site in look.measurement.sites:
        demand = subject.demands.get(site.path)
        if demand is not None:
            notes.append(
                f"`{site.label}`: a read-out of the last {demand.steps} steps "
                f"({demand.low} to {demand.high}) scores "
                f"{demand.score:.2f} (chance {demand.chance:.2f}), longer ones no better; "
                f"the last {demand.half} give half of the gain over chance. Hence the memory."
            )
        notes += (f"`{site.label}`: {text}" for text in _about_the_path(site))
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


def about_race(race: Race | None, scheduled: bool) -> Iterator[str]:
    """What the trial cost and rested on, and where a rate could not be tried."""
    if race is None:
        return
    took = f"{race.steps} of {race.budget_steps} steps, {race.seconds:.1f} s"
    yield f"Trial: {len(race.entries)} candidates, {took}, all taken back."
    if not race.complete:
        yield "The trial's budget was spent before its last heat; `trial=` sets its steps."
    if race.left_out:
        yield f"Not in the trial, for want of steps or of a place: {'; '.join(race.left_out)}."
    longest = max((heat.steps for heat in race.heats), default=0)
    if longest > race.batches:
        passes = f"up to {math.ceil(longest / race.batches)} times each"
        yield f"The trial trained on {race.batches} batches, {passes}: give more for a firmer word."
    if scheduled:
        yield "A scheduler sets the learning rate, so only the clip and the warm-up act on steps."


def about_growth(growth: Growth) -> Iterator[str]:
    """What a change of structure asks of the user: neither copies nor checkpoints know of it."""
    replay = (
        "save the plan beside them with `report.plan.to_json(path)`, and call "
        "`rnnguard.apply(model, optimizer, path)` on a plain model before it loads one."
    )
    if growth.parameters:
        yield (
            f"Parameters were added at {_listed(growth.parameters)}: make EMA copies "
            "(AveragedModel) again, since an older one would pair its parameters wrongly."
        )
    if growth.keys:
        yield f"Checkpoints from now on hold new keys at {_listed(growth.keys)}: {replay}"
    if growth.neither:
        yield (
            f"{_listed(growth.neither)} computes something else without any new key, so that its "
            f"checkpoints load into the plain model without a word: {replay}"
        )


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(f"`{path or '(model)'}`" for path in paths)


def _about_the_path(site: SiteReadings) -> Iterator[str]:
    """What the weights are, and what lies between the figures and the gradient's real path."""
    if site.provenance is not None and site.trained:
        yield f"{site.provenance}; their values are kept."
    if site.bypass:
        yield (
            "there is a way without the recurrence, from several steps of the input to the output "
            "or back to states of its own past; its verdict is no more than a risk."
        )
    if site.window < site.steps:
        yield (
            f"the gradient is cut: it passes {site.window} of {site.steps} steps, whatever the "
            "cell keeps."
        )
    if site.forward_reach is not None:
        yield (
            f"a line reads the input of up to {site.forward_reach} steps ago out of the state "
            "as it is (R2 above 0.1; needs no gradient)."
        )
    if site.carried_over:
        yield (
            "the state goes on from batch to batch, the gradient does not: memory beyond "
            f"{site.window} steps is carried but not learned."
        )
    if site.padded:
        real = "left out of the figures" if site.picked else "part of the path that is read out"
        yield f"{site.padded:.0%} of the steps are padding; they are {real}."
    if site.dropout:
        yield "figures are without the dropout between its layers, which leaves the state alone."
    if site.remade:
        yield (
            "its weights are made anew in each forward (weight drop, a parametrization): figures "
            "hold for this draw, in this mode. Dropping a share p of them in training raises the "
            "recurrent gain by 1 / sqrt(1 - p)."
        )
    if site.cell == "custom":
        yield (
            "written by hand, measured along its own autograd graph in the mode that the model "
            "is in, with dropout or zoneout as they were drawn."
        )


def _why_unknown(readout: str) -> str:
    if readout == "pooled":
        return "a pool or attention reads every step in one hop"
    return "every step is read out" if readout == "all_steps" else "the sequences were made up"
