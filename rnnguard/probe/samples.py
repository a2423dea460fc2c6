"""Targets split into folds of whole sequences, with what is expected without any input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rnnguard.probe.history import Array, Sequences

FOLDS = 5
CLOCK = 10  # targets of one step at which its own mean and the overall mean count alike


@dataclass(frozen=True, eq=False)
class Samples:
    """Targets (n, K), one-hot for classes (0 classes: real values), and what must not be split.

    `groups` (n,) numbers the sequence of each sample, `folds` (n,) its fold; `expected`
    (folds, n, K) is what the other folds' targets alone let one expect.
    """

    target: Array
    classes: int
    groups: Array
    folds: Array
    expected: Array

    @property
    def surprise(self) -> Array:
        """(n, K): the targets minus what was expected without their fold."""
        found: Array = self.target - self.expected[self.folds, np.arange(len(self.folds))]
        return found

    @property
    def baseline(self) -> Array:
        """(n,) squared errors of the expectation, which looks at no input."""
        return squared(self.surprise)

    @property
    def freedom(self) -> int:
        return int(self.groups.max())

    def splits(self) -> Iterator[tuple[Array, Array, Array]]:
        """For each fold the samples outside, what they hold beyond the expected, those inside."""
        for fold, expected in enumerate(self.expected):
            train = self.folds != fold
            yield train, self.target[train] - expected[train], ~train

    def mean_and_error(self, values: Array) -> tuple[float, float]:
        """The mean over samples, and its standard error over whole sequences."""
        mean = float(values.mean())
        sums = np.bincount(self.groups, weights=values - mean)
        count = len(sums)
        return mean, math.sqrt(float((sums**2).sum()) * count / max(1, count - 1)) / len(values)


def squared(rest: Array) -> Array:
    """Squared lengths along the last axis."""
    found: Array = (rest**2).sum(-1)
    return found


def samples_of(drawn: Sequences, whole: Sequences, seed: int) -> Samples:
    """The drawn targets; what is expected rests on all of them."""
    _, groups = np.unique(drawn.rows, return_inverse=True)
    count = int(groups.max()) + 1
    fold_of = np.random.default_rng(seed).permutation(count) % min(FOLDS, count)
    fold_of_row = np.full(len(whole.values), -1)
    fold_of_row[drawn.rows] = fold_of[groups]
    folds = range(int(fold_of.max()) + 1)
    expected = [_expected(drawn, whole, fold_of_row[whole.rows] != fold) for fold in folds]
    return Samples(drawn.target, drawn.classes, groups, fold_of[groups], np.stack(expected))


def _expected(drawn: Sequences, whole: Sequences, known: Array) -> Array:
    """The mean of the known targets, and with a target at every step that step's own.

    What all sequences follow by the clock is no memory of the inputs, but the zeros before
    a sequence's start would tell a read-out the time.
    """
    target, times = whole.target[known], whole.times[known]
    mean = target.mean(0)
    if not whole.per_step:
        return np.broadcast_to(mean, drawn.target.shape)
    steps = whole.values.shape[1]
    counts = np.bincount(times, minlength=steps)
    sums = [np.bincount(times, column, steps) for column in (target - mean).T]
    found: Array = mean + (np.stack(sums, axis=1) / (counts + CLOCK)[:, None])[drawn.times]
    return found
