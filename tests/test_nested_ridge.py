"""Ridge read-outs of many widths at once, against scikit-learn's one by one and each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from rnnguard.probe import nested_ridge as module
from rnnguard.probe.history import Sequences, standardised
from rnnguard.probe.nested_ridge import NestedRidge, middles, nested_ridge
from rnnguard.probe.samples import Samples, samples_of
from rnnguard.probe.window_readouts import DenseReadouts, dense_fit, without_each_lag

Array = NDArray[np.float64]
PENALTIES = (1e-2, 10.0, 300.0)


def ends(count: int, kinds: int, seed: int) -> Samples:
    """One target per sequence; 83 of them give folds of 17 and 16."""
    rng = np.random.default_rng(seed)
    target = standardised(rng.standard_normal((count, kinds)))
    rows, times = np.arange(count), np.full(count, 3)
    sequences = Sequences(np.zeros((count, 4, 1)), rows, times, target, 0)
    return samples_of(sequences, sequences, seed)


def steps(count: int, kinds: int, seed: int) -> Samples:
    """Targets at drawn steps of 9 sequences, so that folds differ and each step has its mean."""
    rng = np.random.default_rng(seed)
    rows, times = (index.ravel() for index in np.indices((9, 40)))
    target = standardised(rng.standard_normal((360, kinds)) + times[:, None] / 10)
    whole = Sequences(np.zeros((9, 40, 1)), rows, times, target, 0)
    return samples_of(whole.drawn(count, seed), whole, seed)


def table(count: int, columns: int, seed: int, keep: float = 0.0) -> Array:
    """Columns that go together more or less, one that never varies and one that comes twice."""
    rng = np.random.default_rng(100 + seed)
    found = rng.standard_normal((count, columns))
    for column in range(1, columns):
        found[:, column] += keep * found[:, column - 1]
    found[:, 2], found[:, 5] = 0, found[:, 4]
    return 0.3 + standardised(found)


def form(few: bool, x: Array, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> NestedRidge:
    monkeypatch.setattr(module, "CROWDED", 0.0 if few else np.inf)
    return nested_ridge(x, samples, PENALTIES)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("columns", [20, 300])
def test_read_outs_are_ridge_regressions_of_the_first_columns(
    few: bool, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, widths = ends(83, 2, seed=0), [1, 7, 8, columns]
    x = table(83, columns, seed=0)
    found = form(few, x, samples, monkeypatch).predictions(widths)
    assert found.shape == (3, 4, 83, 2)
    for p, penalty in enumerate(PENALTIES):
        for w, width in enumerate(widths):
            for train, y, test in samples.splits():
                ridge = Ridge(alpha=penalty, solver="svd").fit(x[train, :width], y)
                told = ridge.predict(x[test, :width]) - y.mean(0)
                np.testing.assert_allclose(found[p, w, test], told, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("keep", [0.0, 0.99])
@pytest.mark.parametrize("columns", [30, 150, 400])
@pytest.mark.parametrize("drawn", [ends, steps])
def test_both_forms_give_the_same(
    drawn: Callable[..., Samples], columns: int, keep: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, x = drawn(150, 3, seed=1), table(150, columns, seed=1, keep=keep)
    widths = [2, 9, 28, columns]
    by_columns, by_samples = (form(few, x, samples, monkeypatch) for few in (False, True))
    assert type(by_columns) is not type(by_samples)
    first, second = by_columns.predictions(widths), by_samples.predictions(widths)
    np.testing.assert_allclose(second, first, rtol=1e-8, atol=1e-8)
    for p in range(len(PENALTIES)):
        one, other = (r.weights(p, first[p, -1]) for r in (by_columns, by_samples))
        np.testing.assert_allclose(other, one, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("few", [False, True])
def test_weights_are_those_that_predicted(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, x = steps(150, 3, seed=2), table(150, 200, seed=2)
    ridge = form(few, x, samples, monkeypatch)
    found = ridge.predictions([200])[:, 0]
    for p in range(len(PENALTIES)):
        weights = ridge.weights(p, found[p])
        for fold, (_, _, test) in enumerate(samples.splits()):
            told = (x[test] - middles(x, samples)[fold]) @ weights[fold]
            np.testing.assert_allclose(told, found[p, test], rtol=1e-8, atol=1e-9)


def test_a_mean_is_that_of_the_samples_outside_the_fold() -> None:
    samples, x = steps(150, 1, seed=3), table(150, 9, seed=3)
    outside = [x[train].mean(0) for train, _, _ in samples.splits()]
    np.testing.assert_allclose(middles(x, samples), outside, atol=1e-12)


def test_each_form_serves_where_it_costs_less() -> None:
    samples = ends(100, 1, seed=0)
    wide, narrow = (nested_ridge(table(100, c, 0), samples, PENALTIES) for c in (400, 60))
    assert type(wide) is not type(narrow)


@pytest.mark.parametrize("lags", [8, 90])
def test_read_outs_fitted_in_turns_are_those_fitted_at_once(lags: int) -> None:
    samples, x = ends(83, 2, seed=4), table(83, 2 * lags, seed=4).reshape(83, lags, 2)
    readouts = DenseReadouts(x, samples)
    windows = (1, 3, lags)
    whole = dense_fit(x, samples, windows)
    for window, losses in zip(windows, whole.losses, strict=True):
        np.testing.assert_allclose(readouts.fit([window]).losses[0], losses, rtol=1e-10)
    alone = list(without_each_lag(x, samples))
    assert len(alone) == lags
    np.testing.assert_allclose(list(readouts.without_each_lag()), alone, atol=1e-10)
