"""The trial: candidates train a little under a snapshot, and only what wins is applied."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rnnguard.decision.halving import Budget, halved
from rnnguard.errors import RefusedError, UndoError
from rnnguard.probe.course import losses_of
from rnnguard.probe.rate_range import rate_range
from rnnguard.probe.snapshot import Snapshot
from rnnguard.probe.subject import Subject
from rnnguard.race import NOTHING, Candidate, Course, Race
from rnnguard.records import Change, Dose, Plan
from rnnguard.replay import replay, replay_refusals
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.transaction import rolled_back

# Threads of a joblib backend share the one model: they take turns.
_TURN = threading.Lock()
RATE_STEPS = 25
# Below it a proposed rate is the user's own, as near as a range test can tell.
NOTICEABLE_RATE = 1.5
# Adam's first moments are formed by then; a heat is too short for a longer warm-up.
WARMUP = 5

Changes = tuple[Change, ...]
Told = Callable[[int, str], None]


@dataclass(frozen=True)
class Arena:
    """What all candidates share: model, optimizer and batches, and the step tier beside them."""

    subject: Subject
    guard: Changes
    until: float

    def course(self, candidate: Candidate, steps: int, seed: int) -> Course:
        """Trains the candidate for some steps and takes all back; errors end it with words."""
        losses: tuple[float, ...] = ()
        try:
            with self._changed(candidate):
                losses, stopped = losses_of(self.subject, steps, seed, self.until)
        except UndoError:
            raise
        except Exception as error:
            stopped = _said(error)
        return Course(candidate=candidate.name, losses=losses, stopped=stopped)

    def peak(self, changes: Changes) -> tuple[float, int]:
        """The factor on the learning rate that a range test proposes, and the steps it took."""
        try:
            with self._changed(Candidate(name="range test", changes=changes)):
                found = rate_range(self.subject, steps=RATE_STEPS)
        except UndoError:
            raise
        except Exception:
            # What is wrong with the candidate shows in its course.
            return 1.0, 0
        near = found.peak is None or 1 / NOTICEABLE_RATE < found.peak < NOTICEABLE_RATE
        return (1.0 if near or found.peak is None else found.peak), len(found.losses)

    @contextmanager
    def _changed(self, candidate: Candidate) -> Iterator[None]:
        """Inside, the model is the candidate's; afterwards all is bit for bit as before."""
        subject = self.subject
        with _TURN:
            others = (subject.batches,)
            snapshot = Snapshot(subject.model, optimizer=subject.optimizer, others=others)
            edit = Edit(subject.model, subject.optimizer)
            try:
                replay(subject.model, edit, Plan(changes=self._changes(candidate)))
                yield
            finally:
                lost, interrupt = rolled_back(edit)
                snapshot.restore()
                torch.clear_autocast_cache()
                if lost:
                    raise UndoError(*lost)
                if interrupt is not None:
                    raise interrupt

    def _changes(self, candidate: Candidate) -> Changes:
        if candidate.name == NOTHING:
            return ()
        if candidate.rate == 1.0:
            return (*candidate.changes, *self.guard)
        dose: Dose = {"warmup": WARMUP, "total_steps": None, "peak": candidate.rate}
        paced = Change(remedy="warmup_cosine", path=None, tier="step", dose=dose)
        return (*candidate.changes, *self.guard, paced)


def raced(
    subject: Subject, plans: Sequence[Changes], guard: Changes, budget: Budget, *, rates: bool,
    told: Told = lambda steps, words: None,
) -> Race:  # fmt: skip
    """Trains the plans against changing nothing, each at the rate that a range test proposes.

    guard: the step tier that stands beside each plan. rates: whether the learning rate may be
    changed; without it the range test is left out. told: called with steps taken and words.
    Candidates go through joblib, so that its context managers choose where they run. Model and
    optimizer are bit for bit as before.
    """
    started = time.perf_counter()
    arena = Arena(subject, guard, started + budget.seconds)
    # The rate alone comes second, since the likeliest plan has to be better than that.
    wanted = [*plans[:1], (), *plans[1:]] if rates else list(plans)
    count, lengths = budget.course(len(wanted), RATE_STEPS if rates else 0)
    # Only those that can run are looked at, since a rehearsal of flossing takes seconds.
    sound = [plan for plan in wanted[:count] if not _refused(subject, plan)]
    candidates, spent = _candidates(arena, sound, rates, told)

    def run(running: Sequence[Candidate], steps: int, seed: int) -> tuple[Course, ...]:
        courses = []
        for course in _spread(arena, running, steps, seed):
            told(len(course.losses), f"{course.candidate}: {steps} steps")
            courses.append(course)
        in_time = time.perf_counter() < arena.until
        return tuple(courses) if in_time else ()

    outcome = halved(candidates, lengths, budget.total - spent, run)
    spent += sum(len(c.losses) for heat in outcome.heats for c in heat.courses)
    return Race(
        entries=outcome.entries,
        heats=outcome.heats,
        budget_steps=budget.total,
        budget_seconds=budget.seconds,
        steps=spent,
        seconds=time.perf_counter() - started,
        batches=len(subject.batches.batches),
        complete=outcome.complete,
        left_out=tuple(_name(plan, 1.0) for plan in wanted if plan and plan not in sound),
    )


def _spread(arena: Arena, running: Sequence[Candidate], steps: int, seed: int) -> Iterator[Course]:
    """The courses in the candidates' order, from wherever joblib is told to run them."""
    import joblib

    jobs = (joblib.delayed(arena.course)(candidate, steps, seed) for candidate in running)
    try:
        yield from joblib.Parallel(return_as="generator")(jobs)
    except UndoError:
        raise
    except Exception as error:
        # Whatever a candidate raises is in its course, so that this is the way there.
        fact = f"joblib could not run the candidates elsewhere ({_said(error)})."
        cure = "Leave joblib's context out, or give a model, loss and data that can be pickled."
        raise RefusedError.of("RG912", "trial", fact, cure) from error


def _candidates(
    arena: Arena, plans: Sequence[Changes], rates: bool, told: Told
) -> tuple[list[Candidate], int]:
    """Changing nothing, and every plan at the rate proposed for it; and the steps that took."""
    found, taken = [Candidate(name=NOTHING)], 0
    for rank, changes in enumerate(plans, start=1):
        rate = 1.0
        if rates:
            rate, steps = arena.peak(changes)
            taken += steps
            told(steps, "learning-rate range test")
        if changes or rate != 1.0:
            found.append(
                Candidate(name=_name(changes, rate), changes=changes, rate=rate, rank=rank)
            )
    return found, taken


def _name(changes: Changes, rate: float) -> str:
    parts = list(dict.fromkeys(change.remedy for change in changes))
    if rate != 1.0:
        parts.append(f"learning rate x{rate:.3g}")
    return " + ".join(parts)


def _refused(subject: Subject, plan: Changes) -> bool:
    """Whether the plan cannot be applied here at all, or does nothing."""
    assert subject.optimizer is not None
    refusals = replay_refusals(subject.model, subject.optimizer, Plan(changes=plan))
    return any(reason.code != "RG902" for reason in refusals)


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
