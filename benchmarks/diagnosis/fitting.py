"""Thresholds and a forest fitted to the training half alone; nothing here sees a held-out run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.diagnosis.scoring import Booleans, Floats
from benchmarks.diagnosis.verdicts import Readings, Threshold, score

ALLOWED_FALSE_ALARMS = 0.03
NEVER = 1e9
# Facts of the run that say nothing about its gradients, or that name the task.
LEFT_OUT = {"seed", "seconds", "batches", "batches_per_epoch", "total_steps", "steps", "batch",
            "input_rms", "loss", "hidden_size", "errors"}  # fmt: skip


def refitted(
    table: tuple[Threshold, ...], readings: Sequence[Readings], fault: Booleans, rounds: int = 3
) -> tuple[Threshold, ...]:
    """The table with the limits that catch most faults at no more false alarms than allowed.

    Row by row, each time over the middles between neighbouring values and never speaking.
    """
    for _ in range(rounds):
        for index, row in enumerate(table):
            others = (*table[:index], *table[index + 1 :])
            rest = np.array([score(r, others) for r in readings])
            values = [row.value(r) for r in readings]
            best = max(
                (_worth(_alarms(row, limit, values) | (rest > 0), fault), -abs(limit - row.limit))
                for limit in _candidates(row, values)
            )
            chosen = next(
                limit
                for limit in _candidates(row, values)
                if (_worth(_alarms(row, limit, values) | (rest > 0), fault),
                    -abs(limit - row.limit)) == best
            )  # fmt: skip
            table = (*table[:index], replace(row, limit=chosen), *table[index + 1 :])
    return table


def _worth(alarm: Booleans, fault: Booleans) -> float:
    recall = alarm[fault].mean()
    false = alarm[~fault].mean()
    return float(round(recall - false - 10 * max(0.0, false - ALLOWED_FALSE_ALARMS), 9))


def _alarms(row: Threshold, limit: float, values: Sequence[float | None]) -> Booleans:
    moved = np.array([np.nan if value is None else value for value in values])
    # Comparisons with NaN are False: no reading, no alarm.
    found: Booleans = moved > limit if row.side == "above" else moved < limit
    return found


def _candidates(row: Threshold, values: Sequence[float | None]) -> list[float]:
    known = np.unique([value for value in values if value is not None])
    middles = (known[1:] + known[:-1]) / 2
    if len(middles) > 60:
        middles = np.quantile(middles, np.linspace(0, 1, 60))
    never = NEVER if row.side == "above" else -NEVER
    return [row.limit, never, *map(float, middles)]


def forest(
    readings: Sequence[Readings], fault: Booleans, tasks: Sequence[str]
) -> Callable[[Sequence[Readings]], Floats]:
    """A random forest over all readings; its cut allows the false alarms on tasks left out.

    Gives a function from readings to scores, above zero for a fault.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import GroupKFold, cross_val_predict

    names = sorted({name for r in readings for name, value in r.items() if _numeric(name, value)})
    model = RandomForestClassifier(
        300, min_samples_leaf=5, class_weight="balanced", random_state=0, n_jobs=1
    )
    x = _matrix(readings, names)
    folds = GroupKFold(min(5, len(set(tasks))))
    left_out = cross_val_predict(model, x, fault, groups=tasks, cv=folds, method="predict_proba")
    cut = float(np.quantile(left_out[~fault, 1], 1 - ALLOWED_FALSE_ALARMS))
    model.fit(x, fault)
    return lambda found: np.asarray(model.predict_proba(_matrix(found, names))[:, 1] - cut)


def _numeric(name: str, value: Any) -> bool:
    return name not in LEFT_OUT and isinstance(value, bool | int | float)


def _matrix(readings: Sequence[Readings], names: Sequence[str]) -> Floats:
    """Readings as columns; large ones in a logarithm that keeps the sign, missing ones -1000."""
    raw = [[r.get(name) for name in names] for r in readings]
    filled = np.array([[np.nan if v is None else float(v) for v in row] for row in raw])
    folded = np.sign(filled) * np.log1p(np.abs(filled))
    return np.where(np.isnan(folded), -1000.0, folded)
