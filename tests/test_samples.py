"""Folds of whole sequences, and what is expected without any input."""

from __future__ import annotations

import numpy as np
import pytest

from rnnguard.probe.history import Sequences
from rnnguard.probe.samples import CLOCK, FOLDS, samples_of


def every_step(target: np.ndarray) -> Sequences:
    rows, times = (index.ravel() for index in np.indices(target.shape))
    return Sequences(np.zeros((*target.shape, 1)), rows, times, target.reshape(-1, 1), 0)


def test_no_sequence_is_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    whole = every_step(rng.standard_normal((23, 40)))
    drawn = whole.drawn(300, seed=0)
    samples = samples_of(drawn, whole, seed=0)
    assert len(list(samples.splits())) == FOLDS
    for train, _, test in samples.splits():
        assert not set(drawn.rows[train]) & set(drawn.rows[test])
        assert (train ^ test).all()


def test_ends_are_expected_at_the_mean_of_the_other_folds() -> None:
    rng = np.random.default_rng(0)
    target = rng.standard_normal((30, 2))
    ends = Sequences(np.zeros((30, 4, 1)), np.arange(30), np.full(30, 3), target, 0)
    samples = samples_of(ends, ends, seed=0)
    for train, y, test in samples.splits():
        np.testing.assert_allclose(y, target[train] - target[train].mean(0))
        np.testing.assert_allclose(samples.surprise[test], target[test] - target[train].mean(0))
    np.testing.assert_allclose(samples.baseline, (samples.surprise**2).sum(1))


def test_steps_are_expected_at_their_own_mean_as_far_as_many_tell_it() -> None:
    rng = np.random.default_rng(0)
    clock = 5 * np.sin(np.arange(40))
    whole = every_step(clock + rng.standard_normal((500, 40)))
    samples = samples_of(whole.drawn(1000, 0), whole, seed=0)
    assert samples.baseline.mean() == pytest.approx(1, abs=0.15)
    # A third of the way where the others are half as many as count for certain.
    few = every_step(np.broadcast_to(clock, (5 * CLOCK // 8, 40)) + 0.0)
    expected = samples_of(few, few, seed=0).expected
    others = len(few.values) * (FOLDS - 1) / FOLDS
    share = others / (others + CLOCK)
    spread = expected.std() / clock.std()
    assert spread == pytest.approx(share, abs=0.05)


def test_the_error_is_over_sequences_and_not_over_steps() -> None:
    """Steps that repeat one value per sequence tell no more than the sequences."""
    rng = np.random.default_rng(0)
    own = rng.standard_normal(50)
    whole = every_step(np.repeat(own[:, None], 20, axis=1))
    samples = samples_of(whole, whole, seed=0)
    mean, error = samples.mean_and_error(whole.target[:, 0])
    assert mean == pytest.approx(own.mean())
    assert error == pytest.approx(own.std(ddof=1) / np.sqrt(50))
    assert samples.freedom == 49
