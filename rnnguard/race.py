"""What a trial compared: candidates, their losses heat by heat, and which of them won; no torch."""

from __future__ import annotations

import math
import statistics
from typing import Literal

from pydantic import ConfigDict

from rnnguard.records import TIERS, Change, Record, Tier

NOTHING = "change nothing"
Fate = Literal["won", "not better", "dropped", "stopped"]


class Candidate(Record):
    """A combination of changes that a trial trains, and the factor on the user's learning rate.

    `rank` orders candidates of one tier whose losses no heat can tell apart: the first is kept.
    """

    name: str
    changes: tuple[Change, ...] = ()
    rate: float = 1.0
    rank: int = 0

    @property
    def tier(self) -> Tier | None:
        """The most invasive tier that it needs; None for changing nothing."""
        tiers = {change.tier for change in self.changes}
        if self.rate != 1.0:
            tiers.add("step")
        return max(tiers, key=TIERS.index, default=None)

    @property
    def invasiveness(self) -> tuple[int, int]:
        """Sorts the least invasive first."""
        return (-1 if self.tier is None else TIERS.index(self.tier)), self.rank


class Course(Record):
    """The losses of one candidate in one heat, step by step, and why it ended early if it did."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    candidate: str
    losses: tuple[float, ...]
    stopped: str | None = None

    @property
    def sound(self) -> bool:
        """Whether it came to its end."""
        return self.stopped is None and all(map(math.isfinite, self.losses))

    @property
    def level(self) -> float:
        """Mean loss over the second half of its steps; infinite where it did not end."""
        return statistics.fmean(second_half(self.losses)) if self.sound else math.inf


class Heat(Record):
    """One round of a trial: the same batches in the same order, and one seed, for all."""

    seed: int
    steps: int
    courses: tuple[Course, ...]

    def __getitem__(self, name: str) -> Course:
        return next(course for course in self.courses if course.candidate == name)

    def __contains__(self, name: object) -> bool:
        return any(course.candidate == name for course in self.courses)


class Gain(Record):
    """By how much one course's loss lies below another's on the same batches: mean and error.

    `share` is the mean as a part of the size of the other's loss.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    mean: float
    stderr: float
    share: float
    clear: bool


class Entry(Record):
    """What became of a candidate, and its gain over changing nothing in its last heat."""

    candidate: Candidate
    fate: Fate
    words: str
    gain: Gain | None = None
    heats: int = 0


class Race(Record):
    """All that a trial tried: every heat, every candidate's fate, and what it cost.

    `steps` and `seconds` are what it took, all candidates and range tests together; `complete`:
    whether no heat was cut short; `left_out`: candidates for which there was no budget, or that
    cannot be applied here.
    """

    entries: tuple[Entry, ...]
    heats: tuple[Heat, ...]
    budget_steps: int
    budget_seconds: float
    steps: int
    seconds: float
    batches: int
    complete: bool
    left_out: tuple[str, ...] = ()

    @property
    def winner(self) -> Candidate:
        return next(entry.candidate for entry in self.entries if entry.fate == "won")

    def level(self, name: str) -> float | None:
        """Mean loss of the candidate over the second half of its last heat."""
        there = [heat[name] for heat in self.heats if name in heat]
        return there[-1].level if there else None


def second_half(losses: tuple[float, ...]) -> tuple[float, ...]:
    return losses[len(losses) // 2 :]
