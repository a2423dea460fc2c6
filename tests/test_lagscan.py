"""Tests lag by lag: what they find, and how often they find what is not there."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rnnguard.probe.history import Sequences, one_hot, standardised
from rnnguard.probe.lagscan import DISCOVERIES, SURE, Scan, partial_p_values, scan_lags

Array = NDArray[np.float64]


def ends(values: Array, target: Array, classes: int = 0) -> Sequences:
    count, steps = values.shape[:2]
    return Sequences(values, np.arange(count), np.full(count, steps - 1), target, classes)


def steps_of(values: Array, target: Array) -> Sequences:
    """A target at every step; target: (B, T)."""
    rows, times = np.indices(target.shape)
    return Sequences(values, rows.ravel(), times.ravel(), target.reshape(-1, 1), 0)


def test_of_independent_lags_those_that_matter_are_found() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((400, 50, 2))
    target = values[:, -1, :1] + values[:, -30, 1:] + rng.standard_normal((400, 1))
    scan = scan_lags(values, ends(values, target), 50)
    assert set(scan.found()) >= {0, 29}
    assert scan.sure == (0, 29)


def test_classes_are_told_by_the_features_that_go_with_them() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((400, 20, 3))
    hot, classes = one_hot(values[:, 7].argmax(1))
    assert scan_lags(values, ends(values, hot, classes), 20).sure == (12,)


@pytest.mark.parametrize("keep", [0.6, 0.95])
def test_earlier_steps_that_go_together_with_an_informative_one_are_not_found(keep: float) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((600, 60, 1))
    for t in range(1, 60):
        values[:, t] += keep * values[:, t - 1]
    error = rng.standard_normal((600, 1))
    end = scan_lags(values, ends(values, values[:, -5] + error), 60)
    assert max(end.sure) == 4
    assert len([lag for lag in end.found() if lag > 4]) <= 1
    late = np.roll(values[:, :, 0], 4, axis=1) + rng.standard_normal((600, 60))
    every = scan_lags(values[:, 4:], steps_of(values[:, 4:], late[:, 4:]), 50)
    assert max(every.sure) == 4
    assert len([lag for lag in every.found() if lag > 4]) <= 1


NULLS = {
    "numbers": lambda rng: ends(rng.standard_normal((96, 40, 2)), rng.standard_normal((96, 1))),
    "heavy tails": lambda rng: ends(rng.standard_cauchy((96, 40, 2)), rng.standard_cauchy((96, 1))),
    "rare marks and a rare class": lambda rng: ends(
        (rng.random((96, 40, 2)) < 0.03).astype(float), *one_hot(rng.random(96) < 0.1)
    ),
    "walks at every step": lambda rng: steps_of(
        rng.standard_normal((64, 40, 1)).cumsum(1), rng.standard_normal((64, 40)).cumsum(1)
    ),
    "rare tokens at every step": lambda rng: Sequences(
        np.eye(20)[rng.integers(20, size=(64, 40))],
        *(index.ravel() for index in np.indices((64, 40))),
        *one_hot(rng.integers(20, size=64 * 40)),
    ),
}


@pytest.mark.parametrize("name", NULLS)
def test_where_nothing_goes_together_hardly_anything_is_found(name: str) -> None:
    """Of 60 draws 5 % with a discovery and 1 % with a sure one are meant; 8 of 60 has p = 1 %."""
    scans = []
    for seed in range(60):
        sequences = NULLS[name](np.random.default_rng(seed))
        scans.append(scan_lags(sequences.values, sequences, 30))
    assert sum(bool(scan.found()) for scan in scans) < 8
    assert sum(bool(scan.sure) for scan in scans) < 4


def test_a_sure_lag_is_also_worth_remembering() -> None:
    """One thousandth of the variance is certain among so many steps, and no reason."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 100))
    y = np.roll(x, 3, axis=1) + 0.03 * np.roll(x, 9, axis=1)
    scan = scan_lags(x[:, 10:, None], steps_of(x[:, 10:, None], y[:, 10:]), 30)
    assert set(scan.found()) >= {3, 9}
    assert scan.sure == (3,)


def test_discoveries_step_up_as_benjamini_and_hochberg_do() -> None:
    from scipy.stats import false_discovery_control

    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = rng.random(30) ** 3
        expected = np.flatnonzero(false_discovery_control(p_values) <= DISCOVERIES)
        assert Scan(p_values, ()).found() == tuple(expected)
    # Of two p-values the smaller one counts double; without a second one it stands alone.
    alone = np.array([0.2, 0.02, 0.9])
    assert Scan(alone, ()).found() == ()
    assert Scan(alone, ()).found(np.array([1e-4, 1.0])) == (0,)


def test_beside_the_others_a_faint_lag_stands_out() -> None:
    rng = np.random.default_rng(0)
    x = standardised(rng.standard_normal((150, 40, 1)))
    whole = ends(x[:, ::-1], x.sum(1))
    assert len(scan_lags(whole.values, whole, 40).sure) < 10
    p_values = partial_p_values(x, (x[:, lag] for lag in range(40)), 0)
    assert (p_values < SURE / 40).all()
    others = partial_p_values(x, (rng.standard_normal((150, 1)) for _ in range(40)), 0)
    assert (others < SURE / 40).sum() == 0
