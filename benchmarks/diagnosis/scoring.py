"""Precision, recall, false alarms and AUROC of every detector, with intervals over the tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.diagnosis.ledger import Row

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
DRAWS = 1000
MEASURES = ("precision", "recall", "false_alarms", "auroc", "verdict_auroc")


@dataclass(frozen=True)
class Judged:
    """One detector on one run: above zero is an alarm."""

    task: str
    mutation: str
    seed: int
    fault: bool
    score: float


def measures(fault: Booleans, score: Floats) -> dict[str, float]:
    """The figures; NaN where there is nothing to divide by.

    auroc ranks by the score, verdict_auroc by the alarm alone, which is all that most peers
    publish: (1 + recall - false alarms) / 2.
    """
    alarm = score > 0
    hits = float((alarm & fault).sum())
    return {
        "precision": hits / alarm.sum() if alarm.any() else np.nan,
        "recall": hits / fault.sum() if fault.any() else np.nan,
        "false_alarms": float((alarm & ~fault).sum() / (~fault).sum())
        if (~fault).any()
        else np.nan,
        "auroc": auroc(fault, score),
        "verdict_auroc": auroc(fault, alarm.astype(float)),
    }


def auroc(fault: Booleans, score: Floats) -> float:
    """The chance that a fault outranks a healthy run, ties counting half."""
    from scipy.stats import rankdata

    faults, healthy = int(fault.sum()), int((~fault).sum())
    if not faults or not healthy:
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[fault].sum() - faults * (faults + 1) / 2) / (faults * healthy))


def intervals(judged: Sequence[Judged], draws: int = DRAWS) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals that draw whole tasks, since runs of a task resemble each other."""
    tasks = sorted({j.task for j in judged})
    grouped = [_arrays([j for j in judged if j.task == task]) for task in tasks]
    generator = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in MEASURES}
    for _ in range(draws):
        picks = generator.integers(len(tasks), size=len(tasks))
        fault = np.concatenate([grouped[pick][0] for pick in picks])
        score = np.concatenate([grouped[pick][1] for pick in picks])
        for name, value in measures(fault, score).items():
            drawn[name].append(value)
    return {name: _quantiles(values) for name, values in drawn.items()}


def row_of(detector: str, half: str, judged: Sequence[Judged], draws: int = DRAWS) -> Row:
    """One row of the table: the figures with their intervals."""
    fault, score = _arrays(judged)
    bounds = intervals(judged, draws)
    row = {
        "detector": detector,
        "half": half,
        "tasks": str(len({j.task for j in judged})),
        "faults": str(int(fault.sum())),
        "controls": str(int((~fault).sum())),
    }
    for name, value in measures(fault, score).items():
        low, high = bounds[name]
        row |= {name: f"{value:.3f}", f"{name}_low": f"{low:.3f}", f"{name}_high": f"{high:.3f}"}
    return row


def losing_cases(judged: Sequence[Judged]) -> list[Row]:
    """The cells that the detector gets wrong, with on how many of their seeds."""
    wrong: dict[tuple[str, str, bool], list[bool]] = {}
    for j in judged:
        wrong.setdefault((j.task, j.mutation, j.fault), []).append((j.score > 0) != j.fault)
    return [
        {
            "task": task,
            "mutation": mutation,
            "error": "missed" if fault else "false alarm",
            "seeds_wrong": f"{sum(found)} of {len(found)}",
        }
        for (task, mutation, fault), found in sorted(wrong.items())
        if any(found)
    ]


def with_scores(
    faults: Mapping[tuple[str, str], bool], rows: Sequence[Row], score: Callable[[Row], float]
) -> list[Judged]:
    """The runs of labelled cells with a detector's score."""
    return [
        Judged(row["task"], row["mutation"], int(row["seed"]),
               faults[row["task"], row["mutation"]], score(row))
        for row in rows
        if (row["task"], row["mutation"]) in faults
    ]  # fmt: skip


def _arrays(judged: Sequence[Judged]) -> tuple[Booleans, Floats]:
    return np.array([j.fault for j in judged]), np.array([j.score for j in judged], dtype=float)


def _quantiles(values: list[float]) -> tuple[float, float]:
    kept = [value for value in values if value == value]
    if not kept:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, (0.025, 0.975))
    return float(low), float(high)
