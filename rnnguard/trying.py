"""Whether what the probe has chosen trains better than nothing at all, and what follows from it."""

from __future__ import annotations

from dataclasses import replace

from rnnguard.decision.candidates import combinations
from rnnguard.decision.halving import Budget
from rnnguard.decision.planning import matching
from rnnguard.mending import SCHEDULE, Mending, diagnosed
from rnnguard.probe.measurement import Look, measure
from rnnguard.race import Race
from rnnguard.racing import Changes, raced
from rnnguard.records import Change, Plan
from rnnguard.replay import REMEDY, replay
from rnnguard.report.progress import trial_progress
from rnnguard.request import Request

# Steps per candidate in the last heat, where nothing says how long the training will be.
STEPS = 100
SECONDS = 120.0
# What a trial may cost at most, as a part of the training that it is for.
SHARE = 0.4
LONGEST = 8  # times the steps of a candidate, however long the training
# With fewer a trial would see who learns by heart.
FEWEST_BATCHES = 16


def budget_of(steps: int | bool | None, total_steps: int | None) -> Budget:
    """Steps per candidate as asked for; else a sixteenth of the training, 80 to 200.

    A shorter course sees no more than the head learning its bias.
    """
    if steps is None or isinstance(steps, bool):
        steps = STEPS if total_steps is None else min(200, max(80, total_steps // 16))
        most = LONGEST * steps
        total = most if total_steps is None else min(most, round(SHARE * total_steps))
        return Budget(steps, total, SECONDS)
    return Budget(steps, LONGEST * steps, 5 * SECONDS)


def tried_out(
    mending: Mending, request: Request, before: Look, verbose: bool | None
) -> Race | None:
    """Lets training judge what the probe has chosen, and leaves on the model what has won.

    None where no trial is wanted or possible, and the probe's word holds, or where there is
    nothing to compare.
    """
    if not _wanted(mending, request, before):
        return None
    rates = _rate_may_change(mending, before)
    chosen = tuple(change for change in mending.changes if change.outcome == "applied")
    plans = combinations(
        mending.rulebook, before.measurement, chosen, REMEDY, mending.tiers, mending.skip
    )
    if not plans and not rates:
        return None
    budget = budget_of(request.trial, request.total_steps)
    # The last heat is between changing nothing and one other at least.
    batches = request.trial_batches(mending.subject, budget.total // 2)
    count = len(batches.batches)
    if request.trial is None and count < FEWEST_BATCHES:
        fact = f"{count} batches are learnt by heart, so that no trial was made on them;"
        mending.notes.append(f"{fact} give the whole loader, or ask for one with `trial=`.")
        return None
    guard = tuple(change for change in mending.step_changes() if change.remedy != SCHEDULE)
    mending.edit.rollback_()
    subject = replace(mending.subject, batches=batches)
    with trial_progress(budget.total, verbose) as told:
        race = raced(subject, plans, guard, budget, rates=rates, told=told)
    _apply(mending, before, chosen, race)
    return race


def _wanted(mending: Mending, request: Request, before: Look) -> bool:
    """Whether there is something to learn from, and model and optimizer are not mended already."""
    run, batches = before.measurement.run, mending.subject.batches
    asked = request.trial is not False and mending.subject.optimizer is not None
    return asked and run.basis == "real data" and batches.has_loss and not run.guarded


def _apply(mending: Mending, before: Look, chosen: Changes, race: Race) -> None:
    """Leaves the winner's changes on the model, and tells of the others what became of them."""
    winner = race.winner
    replay(mending.subject.model, mending.edit, Plan(changes=winner.changes))
    if not winner.changes:
        mending.look = before
    elif winner.changes != chosen:
        mending.look = diagnosed(measure(mending.subject))
    mending.rate = winner.rate
    won = next(entry for entry in race.entries if entry.fate == "won")
    lost = next((e for e in race.entries if e.candidate.changes == chosen), None)
    words = lost.words if lost is not None else "not better than less"
    taken_back = [c for c in mending.changes if c.outcome == "taken back"]
    unneeded = [_judged(c, "taken back", words) for c in chosen if c not in winner.changes]
    applied = [_judged(change, "applied", won.words) for change in winner.changes]
    mending.changes = [*taken_back, *unneeded, *applied]


def _judged(change: Change, outcome: str, words: str) -> Change:
    result = "; ".join(filter(None, (change.result, f"trial: {words}")))
    return change.model_copy(update={"outcome": outcome, "result": result})


def _rate_may_change(mending: Mending, before: Look) -> bool:
    """Whether a schedule with a peak of its own may stand beside the user's rate."""
    run = before.measurement.run
    row = matching(mending.rulebook, "run", None, run)
    fresh = not any(site.trained for site in before.measurement.sites)
    free = not run.scheduled and run.learning_rate is not None and not run.guarded
    return row is not None and SCHEDULE in row.apply and fresh and free and "step" in mending.tiers
