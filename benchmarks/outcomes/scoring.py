"""What the policies achieved, side by side on the same runs, with intervals over the cells."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median, stdev

import numpy as np
from numpy.typing import NDArray

from benchmarks.ledger import Row
from benchmarks.outcomes.lineup import NOTHING
from benchmarks.provenance import wilson

Floats = NDArray[np.float64]
Cell = tuple[str, str]
DRAWS = 2000
LEAST_HARM = 0.1
"""A run is made worse by no less than this share of the way from chance to the target."""


@dataclass(frozen=True)
class Reached:
    """One run, read from its row. steps and cost are to the target, or the budget where missed."""

    seed: int
    task: str
    model: str
    policy: str
    solved: bool
    learnt: float
    steps: float
    cost: float
    setup: float
    ratio: float
    error: str
    control: bool

    @property
    def cell(self) -> Cell:
        return self.task, self.model


def read(rows: Iterable[Row], controls: set[str]) -> list[Reached]:
    """The rows as runs, as far as every policy that is there has been run on the same ones.

    Controls are the tasks that the untouched model learns well.
    """
    runs = [
        Reached(
            int(row["seed"]), row["task"], row["model"], row["policy"], row["solved"] == "True",
            float(row["learnt"]), float(row["steps_to_target"]), float(row["cost_to_target"]),
            float(row["setup_cost"]), float(row["step_ratio"]), row["error"],
            row["task"] in controls,
        )
        for row in rows
    ]  # fmt: skip
    ran = defaultdict(set)
    for run in runs:
        ran[run.policy].add((run.seed, *run.cell))
    common = set.intersection(*ran.values()) if ran else set()
    return [run for run in runs if (run.seed, *run.cell) in common]


def by_policy(runs: Iterable[Reached]) -> dict[str, list[Reached]]:
    """The runs of every policy, all in the same order."""
    found: dict[str, list[Reached]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.task, r.model, r.seed)):
        found[run.policy].append(run)
    return dict(found)


def best_blind(policies: dict[str, list[Reached]]) -> str:
    """The policy without rnnguard that solves most; the cheaper one of equals."""
    blind = [name for name in policies if not name.startswith("rnnguard")]
    return max(blind, key=lambda name: _rank(policies[name]))


def _rank(runs: Sequence[Reached]) -> tuple[int, float]:
    return sum(run.solved for run in runs), -sum(math.log(run.cost) for run in runs)


def noise(untouched: Sequence[Reached]) -> dict[Cell, float]:
    """By how much `learnt` has to fall in a cell to count as harm.

    At least 0.1, and at least twice the standard deviation of the untouched runs over the seeds.
    """
    learnt = defaultdict(list)
    for run in untouched:
        learnt[run.cell].append(run.learnt)
    return {
        cell: max(LEAST_HARM, 2 * stdev(found) if len(found) > 1 else 0.0)
        for cell, found in learnt.items()
    }


def made_worse(runs: Sequence[Reached], untouched: Sequence[Reached]) -> list[Reached]:
    """The runs that reach less than the untouched run of the same seed by more than the noise."""
    limits = noise(untouched)
    return [
        run
        for run, other in zip(runs, untouched, strict=True)
        if other.learnt - run.learnt > limits[run.cell]
    ]


def interval(runs: Sequence[Reached], values: Sequence[float], draws: int) -> tuple[float, float]:
    """95 % of the mean, drawing whole cells, since the seeds of a cell resemble each other."""
    cells = sorted({run.cell for run in runs})
    place = {cell: index for index, cell in enumerate(cells)}
    at = np.array([place[run.cell] for run in runs])
    sums = np.bincount(at, np.asarray(values, dtype=float))
    counts = np.bincount(at).astype(float)
    picks = np.random.default_rng(0).integers(len(cells), size=(draws, len(cells)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def row_of(name: str, policies: dict[str, list[Reached]], best: str, draws: int = DRAWS) -> Row:
    """A policy's row of the table; every figure that has one stands before its interval."""
    runs, blind, untouched = policies[name], policies[best], policies.get(NOTHING, [])
    solved = [float(run.solved) for run in runs]
    gained = [a - b.solved for a, b in zip(solved, blind, strict=True)]
    row = {
        "policy": name,
        "runs": str(len(runs)),
        "errors": str(sum(bool(run.error) for run in runs)),
        **_shown("solved", runs, solved, draws),
        **_shown("solved_minus_best_blind", runs, gained, draws),
        "learnt": f"{sum(run.learnt for run in runs) / len(runs):.3f}",
    }
    for measure in ("steps", "cost"):
        own, other = ([math.log(getattr(run, measure)) for run in part] for part in (runs, blind))
        apart = [a - b for a, b in zip(own, other, strict=True)]
        row |= _shown(f"{measure}_to_target", runs, own, draws, "{:.0f}", math.exp)
        row |= _shown(f"{measure}_over_best_blind", runs, apart, draws, "{:.2f}", math.exp)
    if untouched:
        worse = made_worse(runs, untouched)
        row |= _share("worse", len(worse), len(runs))
        controls = [run for run in runs if run.control]
        row |= _share("controls_solved", sum(run.solved for run in controls), len(controls))
        row |= _share("controls_worse", sum(run.control for run in worse), len(controls))
    ratios = [run.ratio for run in runs if run.ratio == run.ratio]
    return row | {
        "setup_cost": f"{median(run.setup for run in runs):.1f}",
        "step_ratio": f"{median(ratios):.2f}" if ratios else "",
    }


def _shown(
    name: str, runs: Sequence[Reached], values: Sequence[float], draws: int,
    form: str = "{:.3f}", of: Callable[[float], float] = float,
) -> Row:  # fmt: skip
    """The mean and its interval, each put through a function."""
    found = (sum(values) / len(values), *interval(runs, values, draws))
    cells = (form.format(of(value)) for value in found)
    return dict(zip((name, f"{name}_low", f"{name}_high"), cells, strict=True))


def _share(name: str, count: int, total: int) -> Row:
    low, high = wilson(count, total) if total else (math.nan, math.nan)
    return {
        f"{name}_count": f"{count} of {total}",
        name: f"{count / total:.3f}" if total else "",
        f"{name}_low": f"{low:.3f}",
        f"{name}_high": f"{high:.3f}",
    }


def losing_cases(policies: dict[str, list[Reached]], best: str) -> list[Row]:
    """Every cell where rnnguard harms a run, or solves fewer seeds than the best blind policy."""
    untouched = policies[NOTHING]
    found = []
    for name, runs in policies.items():
        if not name.startswith("rnnguard"):
            continue
        worse = made_worse(runs, untouched)
        for cell in dict.fromkeys(run.cell for run in runs):
            own, other, bare = (
                [run for run in part if run.cell == cell]
                for part in (runs, policies[best], untouched)
            )
            harmed = [run.seed for run in worse if run.cell == cell]
            if harmed or _solved(own) < _solved(other):
                found.append({
                    "policy": name, "task": cell[0], "model": cell[1],
                    "made worse": f"{len(harmed)} of {len(own)}",
                    "solved": f"{_solved(own)} of {len(own)}",
                    f"solved by {best}": str(_solved(other)),
                    "solved by nothing": str(_solved(bare)),
                    "learnt": " ".join(f"{run.learnt:.2f}" for run in own),
                    "learnt by nothing": " ".join(f"{run.learnt:.2f}" for run in bare),
                })  # fmt: skip
    return found


def _solved(runs: Sequence[Reached]) -> int:
    return sum(run.solved for run in runs)


def shares(
    policies: dict[str, list[Reached]], part: str, names: Sequence[str]
) -> dict[str, dict[str, tuple[int, int]]]:
    """By task or model, and by policy: how many runs are solved, of how many."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name in names:
        found[name] = {}
        for policy, runs in policies.items():
            kept = [run for run in runs if getattr(run, part) == name]
            found[name][policy] = _solved(kept), len(kept)
    return found
