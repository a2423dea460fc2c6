"""Cross-validated read-outs by window, against scikit-learn's own."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score

from rnnguard.probe.history import Sequences, histories, standardised
from rnnguard.probe.samples import Samples, samples_of
from rnnguard.probe.window_readouts import (
    PENALTIES,
    Fit,
    clear_gain,
    dense_fit,
    fewest_within,
    ladder,
    score,
    sparse_fit,
    tree_fit,
    without_each_lag,
)

Array = NDArray[np.float64]
COUNT, REACH = 120, 6


def ends(values: Array, target: Array, classes: int = 0) -> Sequences:
    """One target per sequence, after its last step."""
    count, steps = values.shape[:2]
    return Sequences(values, np.arange(count), np.full(count, steps - 1), target, classes)


def case(seed: int = 0, noise: float = 0.5) -> tuple[Array, Samples]:
    """The value of three steps back, with noise; two channels."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((COUNT, REACH, 2))
    target = values[:, -4, :1] + noise * rng.standard_normal((COUNT, 1))
    sequences = ends(values, standardised(target))
    return histories(values, sequences, REACH), samples_of(sequences, sequences, seed)


def test_a_dense_read_out_is_ridge_regression_window_by_window() -> None:
    x, samples = case()
    found = dense_fit(x, samples, (1, 4, 6))
    for place, k in enumerate(found.windows):
        flat = x[:, :k].reshape(COUNT, -1)
        losses = []
        for penalty in PENALTIES:
            rest = np.empty((COUNT, 1))
            for train, y, test in samples.splits():
                ridge = Ridge(alpha=penalty).fit(flat[train], y)
                guess = ridge.predict(flat[test]).reshape(-1, 1)
                rest[test] = samples.surprise[test] - guess
            losses.append((rest**2).sum(1))
        best = min(losses, key=lambda loss: float(loss.mean()))
        np.testing.assert_allclose(found.losses[place], best, rtol=1e-8, atol=1e-10)


def test_a_dense_read_out_leaves_out_what_is_too_wide() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 30, 64))
    sequences = ends(x, rng.standard_normal((40, 1)))
    samples = samples_of(sequences, sequences, 0)
    assert dense_fit(x, samples, (1, 8, 15, 16, 30)).windows == (1, 8, 15)


def test_a_sparse_read_out_sees_few_lags_and_chooses_them_without_the_held_out() -> None:
    x, samples = case(noise=0.1)
    found = sparse_fit(x, samples, (3, 4, 6), lags=1)
    rest = np.empty((COUNT, 1))
    for train, y, test in samples.splits():
        line = LinearRegression().fit(x[train, 3], y)
        rest[test] = samples.surprise[test] - line.predict(x[test, 3])
    np.testing.assert_allclose(found.losses[1], (rest**2).sum(1), rtol=0.1, atol=1e-3)
    np.testing.assert_array_equal(found.losses[1], found.losses[2])
    # Chosen on everything, the best of many lags of noise would seem to predict.
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((60, 100, 1))
        sequences = ends(noise, standardised(rng.standard_normal((60, 1))))
        drawn = samples_of(sequences, sequences, seed)
        fit = sparse_fit(noise, drawn, (100,), lags=1)
        gains.append(1 - fit.losses.mean() / drawn.baseline.mean())
    assert np.mean(gains) < 0


def test_trees_see_a_product_of_two_steps() -> None:
    rng = np.random.default_rng(0)
    values = rng.choice([-1.0, 1.0], (300, 4, 1))
    sequences = ends(values, values[:, 3] * values[:, 2])
    samples = samples_of(sequences, sequences, 0)
    fit = tree_fit(histories(values, sequences, 4), samples, (1, 2), seed=0)
    assert fit.losses[1].mean() < 0.1 < 0.9 < fit.losses[0].mean()


def test_without_each_lag_its_own_part_is_what_remains() -> None:
    """The target is the sum of three lags; without one of them, that one's value is left."""
    rng = np.random.default_rng(0)
    x = standardised(rng.standard_normal((200, 3, 1)))
    sequences = ends(x, x.sum(1))
    samples = samples_of(sequences, sequences, 0)
    for lag, left in enumerate(without_each_lag(x, samples)):
        assert np.corrcoef(left[:, 0], x[:, lag, 0])[0, 1] > 0.995


def test_a_gain_is_clear_only_beyond_its_error() -> None:
    x, samples = case()
    assert clear_gain(dense_fit(x, samples, (1, 4)), samples) == pytest.approx(0.8, abs=0.1)
    assert clear_gain(dense_fit(x, samples, (1, 3)), samples) == 0


def test_scores_are_those_of_scikit_learn() -> None:
    x, samples = case()
    fit = dense_fit(x, samples, (4,))
    whole = fit.predictions[0] + samples.target - samples.surprise
    assert score(fit.predictions[0], samples) == pytest.approx(
        r2_score(samples.target, whole), abs=0.01
    )
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 90, p=[0.7, 0.2, 0.1])
    hot = np.eye(3)[labels]
    classes = ends(rng.standard_normal((90, 2, 1)), hot, 3)
    samples = samples_of(classes, classes, 0)
    guesses = rng.standard_normal((90, 3))
    chosen = (guesses / hot.mean(0)).argmax(1)
    assert score(guesses, samples) == pytest.approx(balanced_accuracy_score(labels, chosen))
    assert score(np.zeros((90, 3)), samples) == pytest.approx(1 / 3)


def test_the_ladder_climbs_by_half_octaves_to_the_longest() -> None:
    assert ladder(1) == (1,)
    assert ladder(2) == (1, 2)
    assert ladder(12) == (1, 2, 3, 4, 6, 8, 11, 12)
    for longest in (3, 10, 100, 777, 1024):
        rungs = ladder(longest)
        assert rungs[0] == 1 and rungs[-1] == longest
        assert list(rungs) == sorted(set(rungs))
        assert all(high <= max(low + 1, 1.5 * low) for low, high in pairwise(rungs))


def test_the_fewest_steps_within_the_error_of_the_best_are_taken() -> None:
    _, samples = case()
    rng = np.random.default_rng(0)
    wave = standardised(rng.standard_normal((COUNT, 1)))[:, 0] * np.sqrt(COUNT) * 0.05
    gaps = (0.5, 0.09, 0.04, 0.0)
    losses = np.stack([0.2 + gap + (wave if gap else 0 * wave) for gap in gaps])
    fit = Fit((1, 2, 3, 4), losses, np.empty((4, COUNT, 1)))
    assert [fit.windows[fewest_within(fit, samples, errors)] for errors in (0.5, 1, 2)] == [4, 3, 2]


def test_without_noise_a_negligible_loss_counts_as_none() -> None:
    _, samples = case()
    losses = np.array([0.5, 0.0021, 0.002])[:, None] + np.zeros(COUNT)
    fit = Fit((1, 20, 30), losses, np.empty((3, COUNT, 1)))
    assert fit.windows[fewest_within(fit, samples, 1.0)] == 20


def test_joined_fits_are_in_order_of_their_windows() -> None:
    first = Fit((1, 4), np.array([[1.0], [4.0]]), np.array([[[1.0]], [[4.0]]]))
    second = Fit((2, 4), np.array([[2.0], [9.0]]), np.array([[[2.0]], [[9.0]]]))
    joined = first.joined(second)
    assert joined.windows == (1, 2, 4)
    assert joined.losses[:, 0].tolist() == joined.predictions[:, 0, 0].tolist() == [1, 2, 4]
