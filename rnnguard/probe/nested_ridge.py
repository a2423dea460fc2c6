"""Ridge read-outs of a table's first columns, out of fold, for many widths and penalties at once.

With many samples each fold's normal matrix is factored once per penalty: the leading blocks of
a Cholesky factor are the factors of all narrower read-outs. With few samples the hat matrix of
all of them grows column by column, and its blocks tell what the others predict of each fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from rnnguard.probe.history import Array
from rnnguard.probe.samples import Samples
from rnnguard.probe.small_systems import solved

CROWDED = 1.25  # columns per sample from which hat matrices cost less than normal matrices
BLOCK = 128  # columns that a hat matrix grows by at once


class NestedRidge(Protocol):
    """Read-outs of the surprise from the columns of a table (n, m).

    Without an offset: the columns are taken from the mean of the samples outside the fold.
    """

    def predictions(self, widths: Sequence[int]) -> Array:
        """(penalties, widths, n, K): what the other folds predict from so many first columns.

        widths: ascending.
        """

    def weights(self, penalty: int, predictions: Array) -> Array:
        """(folds, m, K): the read-outs of all columns without each fold, at one of the penalties.

        predictions (n, K): that penalty's from all columns.
        """


def nested_ridge(table: Array, samples: Samples, penalties: Sequence[float]) -> NestedRidge:
    """The read-outs in the form that is cheaper for so many samples and columns."""
    few = table.shape[1] > CROWDED * _places(samples.folds).size
    return (_FewSamples if few else _ManySamples)(table, samples, penalties)


def middles(table: Array, samples: Samples) -> Array:
    """(folds, m): the mean of the samples outside of each fold."""
    total = table.sum(0)
    rests = [(total - table[test].sum(0)) / len(y) for _, y, test in samples.splits()]
    return np.stack(rests)


class _Equations(NamedTuple):
    """Who is held out, their columns, and of the others' columns the squares and moments."""

    test: Array
    held_out: Array
    normal: Array
    moments: Array


class _ManySamples:
    """By a Cholesky factor of each fold's normal matrix."""

    def __init__(self, table: Array, samples: Samples, penalties: Sequence[float]) -> None:
        self._shape, self._penalties = samples.target.shape, penalties
        self._folds = list(_equations(table, samples))

    def predictions(self, widths: Sequence[int]) -> Array:
        from scipy.linalg.lapack import dpotrf, dtrtrs

        most = widths[-1]
        found = np.empty((len(self._penalties), len(widths), *self._shape))
        for fold in self._folds:
            for p, penalty in enumerate(self._penalties):
                ridge = _with_penalty(fold.normal[:most, :most], penalty)
                # A symmetric matrix is its transpose, which LAPACK need not copy.
                factor = dpotrf(ridge.T, lower=1, clean=0, overwrite_a=1)[0]
                half = dtrtrs(factor, fold.moments[:most], lower=1)[0]
                solutions = _leading_solutions(factor, half, widths)
                told = [fold.held_out[:, : len(weights)] @ weights for weights in solutions]
                found[p][:, fold.test] = told
        return found

    def weights(self, penalty: int, predictions: Array) -> Array:
        by = self._penalties[penalty]
        return np.stack([solved(_with_penalty(f.normal, by), f.moments) for f in self._folds])


def _equations(table: Array, samples: Samples) -> Iterator[_Equations]:
    parts = [table[test] for _, _, test in samples.splits()]
    squares = [part.T @ part for part in parts]
    gram, total = sum(squares), table.sum(0)
    for (train, y, test), held_out, normal in zip(samples.splits(), parts, squares, strict=True):
        told = np.zeros_like(samples.target)
        told[train] = y
        middle = (total - held_out.sum(0)) / len(y)
        # In place, since these are large where there are many columns.
        np.subtract(gram, normal, out=normal)
        normal -= np.outer(len(y) * middle, middle)
        moments = table.T @ told - np.outer(middle, y.sum(0))
        yield _Equations(test, held_out - middle, normal, moments)


def _with_penalty(normal: Array, penalty: float) -> Array:
    ridge = np.array(normal)
    ridge.flat[:: len(ridge) + 1] += penalty
    return ridge


def _leading_solutions(factor: Array, half: Array, widths: Sequence[int]) -> Iterator[Array]:
    """For each width k the solution (k, K) of L^T w = h, of the first k rows and columns of both.

    From the last rows upwards, where only the widest still have a say.
    """
    from scipy.linalg.lapack import dtrtrs

    count = half.shape[1]
    found = np.zeros((len(half), len(widths) * count))
    for w, (low, high) in reversed(list(enumerate(pairwise((0, *widths))))):
        rest = np.tile(half[low:high], len(widths) - w)
        rest[:, count:] -= factor[high:, low:high].T @ found[high:, (w + 1) * count :]
        block = factor[low:high, low:high]
        found[low:high, w * count :] = dtrtrs(block, rest, lower=1, trans=1)[0]
    for w, k in enumerate(widths):
        yield found[:k, w * count : (w + 1) * count]


class _FewSamples:
    """By the hat matrix of all samples: Z Z^T, and for k columns of the table the first k of Z's.

    Where y - H y is what a read-out of all samples leaves, the one without fold F leaves
    (I - H_FF)^-1 (y - H y)_F there. Samples stand fold by fold, with zeros that fill up the
    smaller folds, so that all folds are solved as one stack.
    """

    def __init__(self, table: Array, samples: Samples, penalties: Sequence[float]) -> None:
        self._samples, self._penalties = samples, penalties
        self._places = _places(samples.folds)
        self._real = self._places < len(table)
        self._table = self._placed(table - table.mean(0))
        self._grown = np.stack([_grown(self._table, penalty) for penalty in penalties])

    def predictions(self, widths: Sequence[int]) -> Array:
        (folds, size), (count, kinds) = self._places.shape, self._samples.target.shape
        target, offsets = self._targets()
        own = target.reshape(folds, size, folds, kinds)[range(folds), :, range(folds)]
        shape = len(self._penalties), folds, size
        kept = np.broadcast_to(np.eye(size) - self._mean(), (*shape, size))
        rest = np.broadcast_to(own, (*shape, kinds))
        found = np.empty((shape[0], len(widths), count, kinds))
        for w, (low, high) in enumerate(pairwise((0, *widths))):
            columns = self._grown[:, :, low:high]
            told = (columns.swapaxes(1, 2) @ target).reshape(shape[0], -1, folds, kinds)
            block = columns.reshape(*shape, -1)
            kept = kept - block @ block.swapaxes(2, 3)
            rest = rest - block @ told.swapaxes(1, 2)
            guess = own - solved(kept, rest) + offsets
            found[:, w, self._places[self._real]] = guess[:, self._real]
        return found

    def weights(self, penalty: int, predictions: Array) -> Array:
        found, grown = [], self._grown[penalty]
        for fold, (_, y, test) in enumerate(self._samples.splits()):
            # A fold that has what the others predict of it adds nothing to their read-out.
            told = self._samples.target - self._samples.expected[fold]
            told[test] = predictions[test] + y.mean(0)
            told = self._placed(told - told.mean(0))
            left = told - grown @ (grown.T @ told)
            found.append(self._table.T @ left / self._penalties[penalty])
        return np.stack(found)

    def _placed(self, rows: Array) -> Array:
        """The rows (n, m) fold by fold, filled up with zeros."""
        filled = np.concatenate([rows, np.zeros((1, rows.shape[1]))])
        found: Array = filled[self._places.ravel()]
        return found

    def _mean(self) -> Array:
        """(folds, size, size): the blocks of the hat matrix of a mean."""
        real = self._real.astype(float)
        found: Array = real[:, :, None] * real[:, None, :] / real.sum()
        return found

    def _targets(self) -> tuple[Array, Array]:
        """What the read-outs are fitted to (samples, folds * K), each from its mean.

        With it (folds, 1, K), what is to be added to a prediction of it for one of the surprise.
        """
        targets, offsets = [], []
        for fold, (_, y, _) in enumerate(self._samples.splits()):
            surprise = self._samples.target - self._samples.expected[fold]
            targets.append(surprise - surprise.mean(0))
            offsets.append(surprise.mean(0) - y.mean(0))
        return self._placed(np.concatenate(targets, axis=1)), np.stack(offsets)[:, None]


def _places(folds: Array) -> Array:
    """(folds, size): the samples of each fold, and one past the last where it has fewer."""
    own = [np.flatnonzero(folds == fold) for fold in range(int(folds.max()) + 1)]
    found = np.full((len(own), max(map(len, own))), len(folds))
    for row, places in zip(found, own, strict=True):
        row[: len(places)] = places
    return found


def _grown(table: Array, penalty: float) -> Array:
    """(n, m): Z, each column what a ridge regression on those before it leaves, over its length.

    So that Z is the table times the inverse of the triangular factor of its normal matrix.
    """
    from scipy.linalg.lapack import dpotrf, dtrtrs

    found = np.empty_like(table)
    hat = np.zeros((len(table), len(table)))
    for start in range(0, table.shape[1], BLOCK):
        columns = table[:, start : start + BLOCK]
        rest = columns - hat @ columns
        factor = dpotrf(_with_penalty(columns.T @ rest, penalty), lower=1)[0]
        block = dtrtrs(factor, rest.T, lower=1)[0].T
        found[:, start : start + BLOCK] = block
        hat += block @ block.T
    return found
