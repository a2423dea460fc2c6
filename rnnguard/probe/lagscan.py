"""Lag by lag: which steps before the target go with it, beyond what later steps tell."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rnnguard.probe.history import Array, Sequences, histories, standardised

DISCOVERIES = 0.05  # expected share of false lags among those found
SURE = 0.01  # chance of any false lag among the sure ones
WORTH = 0.01  # of the variance, below which a sure lag is no reason to remember
NEIGHBOURS = 8  # later steps whose part is taken out
ROWS_PER_COLUMN = 10  # of a regression on them
COLUMNS = 128  # of that regression, whose cost grows with their square
CLUSTERS = 64
WORK = 2_000_000_000  # multiplications of one scan
OVERHEAD = 4  # multiplications per feature beside those with the target


@dataclass(frozen=True)
class Scan:
    """p-values by lag; `sure` lags pass Bonferroni and explain enough to be worth remembering."""

    p_values: Array
    sure: tuple[int, ...]

    def found(self, partial: Array | None = None) -> tuple[int, ...]:
        """The lags that pass Benjamini and Hochberg, by either of two p-values where given."""
        if partial is None:
            return _discovered(self.p_values)
        short = np.minimum(partial, self.p_values[: len(partial)])
        both = np.concatenate([short, self.p_values[len(partial) :]])
        return _discovered(np.minimum(1, 2 * both))


def scan_lags(features: Array, sequences: Sequences, reach: int) -> Scan:
    """Tests each lag for association with the target; features: (B, T, D).

    Of every feature the part that up to eight later steps predict is taken out, since steps
    that go together with an informative one would be found in its place. The statistic is
    the sum of products with the target's ranks over its own root sum of squares over
    sequences, which no outlier moves and which holds under dependence within a sequence; a
    lag's p-value is the smallest over features and classes times their number (Bonferroni).
    Over lags the false discovery rate is held (Benjamini and Hochberg, JRSS B 57, 1995).
    """
    sums = _step_sums if sequences.per_step else _end_sums
    tests = [_test(*found) for found in sums(features, sequences, reach)]
    p_values, shares = np.array(tests).T
    sure = (p_values < SURE / len(p_values)) & (shares > WORTH)
    return Scan(p_values, _indices(sure))


def partial_p_values(x: Array, targets: Iterator[Array], classes: int) -> Array:
    """The p-value of each lag of x (n, L, D) with what all other lags leave of the target.

    targets: (n, K) for each lag. Finds lags that are each too faint beside all others.
    """
    tests = []
    for lag, target in enumerate(targets):
        part = _innovation(x, lag)
        y = _tested(target, classes)
        tests.append(_test(part[:, :, None] * y[:, None, :], _power(part, y), len(y))[0])
    return np.array(tests)


def _test(sums: Array, power: Array, count: int) -> tuple[float, float]:
    """The smallest p-value over features and classes, and the largest share explained.

    sums: (clusters, D, K), zero in expectation without association; power: (D, K), the
    product of the two sums of squares over `count` pairs, which bounds the square of the total.
    """
    from scipy.special import erfc

    # The second is their expectation between independent pairs, since rare features that
    # never meet a rare class leave next to nothing to see in the first.
    squares = np.maximum((sums**2).sum(0), power / count)
    z = np.abs(sums.sum(0)) / np.sqrt(np.where(squares > 0, squares, np.inf))
    tested = int((squares > 0).sum())
    p_value = min(1.0, float(erfc(z.max(initial=0.0) / np.sqrt(2))) * max(1, tested))
    shares = sums.sum(0) ** 2 / np.where(power > 0, power, np.inf)
    return p_value, float(shares.max(initial=0.0))


def _discovered(p_values: Array) -> tuple[int, ...]:
    ordered = np.sort(p_values)
    bounds = DISCOVERIES * np.arange(1, len(ordered) + 1) / len(ordered)
    passing = np.flatnonzero(ordered <= bounds)
    return _indices(p_values <= ordered[passing[-1]]) if len(passing) else ()


def _indices(chosen: Array) -> tuple[int, ...]:
    return tuple(np.flatnonzero(chosen).tolist())


def _tested(target: Array, classes: int) -> Array:
    """Ranks of real values, which no outlier moves; of two classes one says it all."""
    from scipy.stats import rankdata

    if classes:
        return standardised(target[:, :1] if classes == 2 else target)
    return standardised(rankdata(target, axis=0))


def _end_sums(
    features: Array, sequences: Sequences, reach: int
) -> Iterator[tuple[Array, Array, int]]:
    """Per lag the products (n, D, K) of innovation and target, their power and number."""
    x, y = histories(features, sequences, reach), _tested(sequences.target, sequences.classes)
    for lag in range(reach):
        part = _innovation(x, lag)
        yield part[:, :, None] * y[:, None, :], _power(part, y), len(y)


def _innovation(x: Array, lag: int) -> Array:
    """(n, D): the features at a lag without what the steps after it predict."""
    later = _later(len(x), x.shape[2])
    near = x[:, max(0, lag - later) : lag].reshape(len(x), -1)
    part: Array = x[:, lag] - _predicted(near, x[:, lag])
    return part


def _power(left: Array, right: Array) -> Array:
    """(D, K): sums of squares over all but the last axis of each, multiplied."""
    axes = "abc"[: left.ndim]
    into = f"{axes},{axes}->{axes[-1]}"
    return np.outer(np.einsum(into, left, left), np.einsum(into, right, right))


def _later(rows: int, width: int) -> int:
    """How many later steps a regression of so many rows can take out."""
    return min(NEIGHBOURS, COLUMNS // width, rows // (ROWS_PER_COLUMN * width))


def _predicted(near: Array, values: Array) -> Array:
    """Least squares of the values (n, D) on what is near (n, P), with a slight ridge."""
    if near.shape[1] == 0:
        return np.zeros_like(values)
    normal = near.T @ near + 1e-6 * len(near) * np.eye(near.shape[1])
    fitted: Array = near @ np.linalg.solve(normal, near.T @ values)
    return fitted


def _step_sums(
    features: Array, sequences: Sequences, reach: int
) -> Iterator[tuple[Array, Array, int]]:
    """Per lag the sums (clusters, D, K) over the targets of a sequence, their power, number."""
    batch, steps, width = features.shape
    y = _tested(sequences.target, sequences.classes)
    work = reach * steps * width * (y.shape[1] + OVERHEAD)
    batch = min(batch, max(CLUSTERS, WORK // work))
    target = np.zeros((len(features), steps, y.shape[1]))
    target[sequences.rows, sequences.times] = y
    given = np.zeros((len(features), steps, 1))
    given[sequences.rows, sequences.times] = 1
    target, given, features = target[:batch], given[:batch], features[:batch]
    # What both follow by the clock alone is no memory.
    target = (target - target.sum(0) / np.maximum(given.sum(0), 1)) * given
    centred = features - features.mean(0)
    for lag, part in zip(range(reach), _innovations(centred, reach), strict=False):
        pieces = _pieces(batch, steps - lag)
        left, right = part[:, : steps - lag], target[:, lag:]
        bounds = np.linspace(0, steps - lag, pieces + 1).astype(int)
        sums = [
            left[:, a:b].transpose(0, 2, 1) @ right[:, a:b] for a, b in itertools.pairwise(bounds)
        ]
        yield np.concatenate(sums), _power(left, right), left.shape[0] * left.shape[1]


def _pieces(batch: int, steps: int) -> int:
    """Into how many stretches few long sequences are cut, so that there is a spread to see."""
    return max(1, min(-(-CLUSTERS // batch), steps // 25))


def _innovations(centred: Array, reach: int) -> Iterator[Array]:
    """At lag 0, 1, ... the features without what the steps up to the target's predict."""
    batch, steps, width = centred.shape
    later = min(_later(batch * steps, width), steps - 1)
    part = centred
    for lag in range(reach):
        if lag <= later:
            ahead = [_shifted(centred, j) for j in range(1, lag + 1)]
            near = np.concatenate(ahead, axis=2) if ahead else centred[:, :, :0]
            flat = near.reshape(batch * steps, -1)
            part = centred - _predicted(flat, centred.reshape(-1, width)).reshape(centred.shape)
        yield part


def _shifted(values: Array, by: int) -> Array:
    """values[:, t + by] at t, and 0 behind the end."""
    moved = np.zeros_like(values)
    moved[:, :-by] = values[:, by:]
    return moved
