"""Cross-validated read-outs of the last k steps, and how well each window predicts the target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rnnguard.probe.history import Array
from rnnguard.probe.nested_ridge import middles, nested_ridge
from rnnguard.probe.samples import Samples, squared

WIDEST = 1000  # columns of one dense read-out, whose cost grows with their cube
PENALTIES = (1e-2, 10.0, 300.0, 1e4)  # of standardised columns
CHOSEN_LAGS = (1, 4)  # lags of a sparse read-out
CLEAR = 2e-5  # chance of such a gain of one window without any signal
SUPPORTED = 2e-3  # the same where a test of single lags has found a signal too
LEAST = 0.02  # of the variance
NEGLIGIBLE = 0.005  # of what the best window explains


@dataclass(frozen=True)
class Fit:
    """One kind of read-out: out of fold, squared errors (W, n) and predictions (W, n, K).

    Predictions are of the surprise, what the target is beyond the expected.
    """

    windows: tuple[int, ...]
    losses: Array
    predictions: Array

    @property
    def best(self) -> int:
        """The place of the window that predicts best."""
        return int(self.losses.mean(1).argmin())

    def joined(self, other: Fit) -> Fit:
        """Both fits' windows in order; of a window in both the first fit's."""
        windows, first = np.unique(self.windows + other.windows, return_index=True)
        losses = np.concatenate([self.losses, other.losses])[first]
        predictions = np.concatenate([self.predictions, other.predictions])[first]
        return Fit(tuple(windows.tolist()), losses, predictions)


class DenseReadouts:
    """Ridge read-outs of all columns of each window that is not too wide.

    x: (n, L, D) standardised, nearest lag first, of which the first lags are kept.
    """

    def __init__(self, x: Array, samples: Samples) -> None:
        self.x = x[:, : max(1, WIDEST // x.shape[2])]
        self._samples = samples
        self._table = self.x.reshape(len(x), -1)
        self._ridge = nested_ridge(self._table, samples, PENALTIES)
        self._of_all: Array | None = None

    def fit(self, windows: Sequence[int]) -> Fit:
        """Of those of the windows that are not too wide."""
        windows = tuple(k for k in windows if k <= self.x.shape[1])
        found = self._ridge.predictions([k * self.x.shape[2] for k in windows])
        if windows[-1] == self.x.shape[1]:
            self._of_all = found[:, -1].copy()
        return _best_penalty(windows, found, self._samples)

    def without_each_lag(self) -> Iterator[Array]:
        """For each lag the targets (n, K) minus what a read-out makes of all other lags.

        Out of fold, at the penalty that predicts best.
        """
        samples, table = self._samples, self._table
        found = self._of_all
        if found is None:
            found = self._ridge.predictions([table.shape[1]])[:, 0]
        rest = samples.surprise - found
        best = int(squared(rest).sum(1).argmin())
        weights = self._ridge.weights(best, found[best])
        tests = [samples.folds == fold for fold in range(len(weights))]
        own = [table[t] - m for t, m in zip(tests, middles(table, samples), strict=True)]
        for low in range(0, table.shape[1], self.x.shape[2]):
            lag = slice(low, low + self.x.shape[2])
            left = rest[best].copy()
            for test, columns, weight in zip(tests, own, weights, strict=True):
                left[test] += columns[:, lag] @ weight[lag]
            yield left


def dense_fit(x: Array, samples: Samples, windows: Sequence[int]) -> Fit:
    """A ridge read-out of all columns of each window that is not too wide; x: (n, L, D)."""
    return DenseReadouts(x, samples).fit(windows)


def without_each_lag(x: Array, samples: Samples) -> Iterator[Array]:
    """For each lag the targets (n, K) minus what a dense read-out makes of all other lags."""
    return DenseReadouts(x, samples).without_each_lag()


def sparse_fit(x: Array, samples: Samples, windows: Sequence[int], *, lags: int) -> Fit:
    """A least-squares read-out of the few lags that go with the target most, per window.

    The lags are chosen anew within the training part of every fold.
    """
    width = x.shape[2]
    table = x.reshape(len(x), -1)
    found = np.empty((1, len(windows), *samples.target.shape))
    for (train, y, test), middle in zip(samples.splits(), middles(table, samples), strict=True):
        told, mean = np.zeros_like(samples.target), middle.reshape(x.shape[1:])
        told[train] = y - y.mean(0)
        moments = (table.T @ told).reshape(*x.shape[1:], -1)
        strength = (moments**2).sum((1, 2))
        solved: dict[tuple[int, ...], Array] = {}
        for w, k in enumerate(windows):
            chosen = tuple(sorted(np.argsort(-strength[:k], kind="stable")[:lags].tolist()))
            if chosen not in solved:
                columns = (x[:, chosen] - mean[chosen, :]).reshape(len(x), -1)
                seen = columns[train]
                normal = seen.T @ seen + len(seen) * 1e-3 * np.eye(len(chosen) * width)
                right = moments[chosen, :].reshape(len(normal), -1)
                solved[chosen] = columns[test] @ np.linalg.solve(normal, right)
            found[0, w, test] = solved[chosen]
    return _best_penalty(tuple(windows), found, samples)


def tree_fit(x: Array, samples: Samples, windows: Sequence[int], *, seed: int) -> Fit:
    """Randomised trees over all columns of each window."""
    from sklearn import config_context
    from sklearn.ensemble import ExtraTreesRegressor

    found = np.empty((1, len(windows), *samples.target.shape))
    trees = ExtraTreesRegressor(
        n_estimators=40, min_samples_leaf=3, max_features="sqrt", random_state=seed, n_jobs=1
    )
    columns = samples.target.shape[1]
    # Checking its own arguments tree by tree takes as long as growing the trees.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        for w, k in enumerate(windows):
            flat = x[:, :k].reshape(len(x), -1).astype(np.float32)
            for train, y, test in samples.splits():
                guess = trees.fit(flat[train], y if columns > 1 else y[:, 0]).predict(flat[test])
                found[0, w, test] = guess.reshape(-1, columns)
    return _best_penalty(tuple(windows), found, samples)


def _best_penalty(windows: tuple[int, ...], found: Array, samples: Samples) -> Fit:
    losses = squared(found - samples.surprise)
    best = losses.mean(-1).argmin(0)
    rungs = np.arange(len(windows))
    return Fit(windows, losses[best, rungs], found[best, rungs])


def clear_gain(fit: Fit, samples: Samples, chance: float = CLEAR) -> float:
    """The largest share of the baseline's error that a window takes away beyond chance, or 0."""
    from scipy.special import stdtrit

    base = samples.baseline
    needed = float(stdtrit(max(1, samples.freedom), 1 - chance))
    best = 0.0
    for losses in fit.losses:
        gain, error = samples.mean_and_error(base - losses)
        share = gain / float(base.mean())
        if gain > needed * error and share > LEAST:
            best = max(best, share)
    return best


def score(predictions: Array, samples: Samples) -> float:
    """Balanced accuracy of predictions (n, K) of classes; R^2 of real values."""
    if not samples.classes:
        error = squared(predictions - samples.surprise).sum()
        return 1 - float(error) / float(samples.baseline.sum())
    truth, shares = samples.target.argmax(1), samples.target.mean(0)
    # Over the classes' shares: with uneven classes the largest guess is always the commonest.
    guess = np.where(shares > 0, predictions / np.where(shares > 0, shares, 1), -np.inf).argmax(1)
    return float(np.mean([(guess[truth == k] == k).mean() for k in np.unique(truth)]))


def ladder(longest: int) -> tuple[int, ...]:
    """Windows 1, 2, 3, 4, 6, 8, 11, ... up to the longest, a factor of sqrt(2) apart."""
    powers = range(2 * math.ceil(math.log2(longest)) + 1)
    return tuple(sorted({min(longest, round(2 ** (p / 2))) for p in powers} | {longest}))


def fewest_within(fit: Fit, samples: Samples, errors: float) -> int:
    """The place of the shortest window whose loss is within so many standard errors of the best's.

    The error is that of the difference, sequence by sequence; where it is next to nothing, as
    without noise, a negligible difference counts as none.
    """
    best = fit.losses[fit.best]
    negligible = NEGLIGIBLE * float(samples.baseline.mean() - best.mean())
    for place, losses in enumerate(fit.losses):
        gap, error = samples.mean_and_error(losses - best)
        if gap <= max(errors * error, negligible):
            return place
    return fit.best
