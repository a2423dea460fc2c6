"""Which mutants are faults: by the harm that training suffered against the clean twins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Literal

from benchmarks.diagnosis.ledger import Row
from benchmarks.diagnosis.mutations import CLEAN

Label = Literal["fault", "healthy", "grey", "task not learnt"]
MINIMAL_EFFECT = 0.15
"""A fault loses at least this share of what training gains, from chance (0) to target (1)."""
SIGNIFICANT = 0.05
"""Five matched pairs reach 1/32 at best, and only when all five point the same way."""
CONVERGED_SEEDS = 0.8


@dataclass(frozen=True)
class Cell:
    """One mutant of one task over its seeds: harm is clean minus mutant, in `learnt`."""

    task: str
    mutation: str
    label: Label
    harm: float
    p: float
    seeds: int

    def row(self) -> Row:
        return {
            "task": self.task,
            "mutation": self.mutation,
            "label": self.label,
            "median_harm": f"{self.harm:.3f}",
            "p": f"{self.p:.4f}",
            "seeds": str(self.seeds),
        }


def sign_flip_p(harms: Sequence[float]) -> float:
    """One-sided exact p of the mean of matched differences, over all flips of their signs."""
    observed = sum(harms)
    flips = product((1, -1), repeat=len(harms))
    # The slack keeps a sum that equals the observed one up to rounding on its own side.
    reached = sum(
        sum(s * h for s, h in zip(f, harms, strict=True)) >= observed - 1e-9 for f in flips
    )
    return float(reached / 2 ** len(harms))


def cells(outcomes: Iterable[Row], seeds: int) -> list[Cell]:
    """A label for every task and mutation that all the seeds of have been trained for.

    fault: significant harm of at least the minimal effect at the median seed; healthy: less
    than that at the median and the mean; grey, and left out of the figures: anything else.
    """
    learnt: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    converged: dict[str, list[bool]] = defaultdict(list)
    for row in outcomes:
        learnt[row["task"], row["mutation"]][int(row["seed"])] = float(row["learnt"])
        if row["mutation"] == CLEAN:
            converged[row["task"]].append(row["converged"] == "True")
    found = []
    for (task, mutation), reached in learnt.items():
        twins = learnt.get((task, CLEAN), {})
        if len(reached) < seeds or len(twins) < seeds:
            continue
        harms = [twins[seed] - value for seed, value in reached.items()]
        clean = converged[task]
        sound = sum(clean) >= CONVERGED_SEEDS * len(clean)
        label = _label(harms) if sound else "task not learnt"
        found.append(Cell(task, mutation, label, median(harms), sign_flip_p(harms), len(harms)))
    return found


def _label(harms: Sequence[float]) -> Label:
    mean, middle = sum(harms) / len(harms), median(harms)
    if middle >= MINIMAL_EFFECT:
        return "fault" if sign_flip_p(harms) <= SIGNIFICANT else "grey"
    return "healthy" if mean < MINIMAL_EFFECT else "grey"
