"""Thresholds and small models fitted to the training half; none sees a held-out run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.diagnosis.scoring import Booleans, Floats
from benchmarks.diagnosis.verdicts import Readings, Threshold, score

ALLOWED_FALSE_ALARMS = 0.03
NEVER = 1e9
FOLDS = 12
Table = tuple[Threshold, ...]


def refitted(table: Table, readings: Sequence[Readings], fault: Booleans, rounds: int = 3) -> Table:
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


def forest() -> Any:
    """A random forest whose trees are too short to learn single runs by heart."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(
        300, max_depth=6, min_samples_leaf=5, class_weight="balanced", random_state=0, n_jobs=1
    )


def logistic() -> Any:
    """A strongly regularized logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chosen = LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
    return make_pipeline(StandardScaler(), chosen)


def fitted(
    kind: Callable[[], Any], table: Table, readings: Sequence[Readings], fault: Booleans,
    tasks: Sequence[str],
) -> Callable[[Sequence[Readings]], Floats]:  # fmt: skip
    """A model over the table's signs; its cut allows the false alarms on tasks left out.

    Gives a function from readings to scores, above zero for a fault.
    """
    from sklearn.model_selection import GroupKFold, cross_val_predict

    model, x = kind(), signs(table, readings)
    folds = GroupKFold(min(len(set(tasks)), FOLDS))
    left_out = cross_val_predict(model, x, fault, groups=tasks, cv=folds, method="predict_proba")
    cut = float(np.quantile(left_out[~fault, 1], 1 - ALLOWED_FALSE_ALARMS))
    model.fit(x, fault)
    return lambda found: np.asarray(model.predict_proba(signs(table, found))[:, 1] - cut)


def signs(table: Table, readings: Sequence[Readings]) -> Floats:
    """One column per row of the table: its excess, where far below the limit is all the same.

    Raw readings name the task too well: on tasks left out of the training half they did worse.
    """
    return np.array([[np.clip(row.excess(r), -1.0, 3.0) for row in table] for r in readings])


MODELS = {"forest": partial(fitted, forest), "logistic": partial(fitted, logistic)}
