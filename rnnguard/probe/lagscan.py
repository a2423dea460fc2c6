"""Lag by lag: which steps before the target go with it, beyond what later steps tell."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
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
VALUES = 200_000  # that are held at once beside the features
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


@dataclass(frozen=True)
class _Products:
    """What the tests of some lags rest on, each (lags, D, K).

    Sums and sums of squares of independent products of feature and target, of expectation zero
    without association; `power` is the product of the two sums of squares over `count` pairs,
    which bounds the square of the sum.
    """

    sums: Array
    squares: Array
    power: Array
    count: int


def scan_lags(features: Array, sequences: Sequences, reach: int) -> Scan:
    """Tests each lag for association with the target; features: (B, T, D).

    Of every feature the part that up to eight later steps predict is taken out, since steps
    that go together with an informative one would be found in its place. The statistic is
    the sum of products with the target's ranks over its own root sum of squares over
    sequences, which no outlier moves and which holds under dependence within a sequence; a
    lag's p-value is the smallest over features and classes times their number (Bonferroni).
    Over lags the false discovery rate is held (Benjamini and Hochberg, JRSS B 57, 1995).
    """
    products = _step_products if sequences.per_step else _end_products
    p_values, shares = _tests(products(features, sequences, reach))
    sure = (p_values < SURE / len(p_values)) & (shares > WORTH)
    return Scan(p_values, _indices(sure))


def partial_p_values(x: Array, targets: Iterator[Array], classes: int) -> Array:
    """The p-value of each lag of x (n, L, D) with what all other lags leave of the target.

    targets: (n, K) for each lag. Finds lags that are each too faint beside all others.
    """
    found = []
    for parts in _innovations(x):
        left = np.stack(list(itertools.islice(targets, len(parts))), axis=1)
        found.append(_products(parts, _tested(left, classes).swapaxes(0, 1)))
    return _tests(found)[0]


def _tests(found: Iterable[_Products]) -> tuple[Array, Array]:
    """By lag the smallest p-value over features and classes, and the largest share explained."""
    from scipy.special import erfc

    p_values, shares = [], []
    for products in found:
        # The second is their expectation between independent pairs, since rare features that
        # never meet a rare class leave next to nothing to see in the first.
        squares = np.maximum(products.squares, products.power / products.count)
        z = np.abs(products.sums) / np.sqrt(np.where(squares > 0, squares, np.inf))
        tested = np.maximum(1, (squares > 0).sum((1, 2)))
        p_values.append(np.minimum(1, erfc(z.max((1, 2), initial=0) / np.sqrt(2)) * tested))
        share = products.sums**2 / np.where(products.power > 0, products.power, np.inf)
        shares.append(share.max((1, 2), initial=0))
    return np.concatenate(p_values), np.concatenate(shares)


def _discovered(p_values: Array) -> tuple[int, ...]:
    ordered = np.sort(p_values)
    bounds = DISCOVERIES * np.arange(1, len(ordered) + 1) / len(ordered)
    passing = np.flatnonzero(ordered <= bounds)
    return _indices(p_values <= ordered[passing[-1]]) if len(passing) else ()


def _indices(chosen: Array) -> tuple[int, ...]:
    return tuple(np.flatnonzero(chosen).tolist())


def _tested(target: Array, classes: int) -> Array:
    """Ranks of real values (n, ..., K), which no outlier moves; of two classes one says it all."""
    from scipy.stats import rankdata

    if classes:
        return standardised(target[..., :1] if classes == 2 else target)
    return standardised(rankdata(target, axis=0))


def _end_products(features: Array, sequences: Sequences, reach: int) -> Iterator[_Products]:
    """Of the innovation at each lag and the target, sequence by sequence."""
    y = _tested(sequences.target, sequences.classes)
    for parts in _innovations(histories(features, sequences, reach)):
        yield _products(parts, y)


def _products(parts: Array, y: Array) -> _Products:
    """Of parts (lags, n, D) and targets (n, K) or (lags, n, K), sample by sample."""
    first, second = parts**2, y**2
    power = first.sum(1)[:, :, None] * second.sum(-2)[..., None, :]
    return _Products(parts.swapaxes(1, 2) @ y, first.swapaxes(1, 2) @ second, power, len(parts[0]))


def _innovations(x: Array) -> Iterator[Array]:
    """(lags, n, D), a few lags at a time: the features without what the steps after predict.

    x: (n, L, D), lag 0 first.
    """
    count, reach, width = x.shape
    later = _later(count, width)
    at_once = max(1, VALUES // (count * width * max(1, later)))
    for start in range(0, reach, at_once):
        values = x[:, start : start + at_once].swapaxes(0, 1)
        near = np.zeros((len(values), count, later * width))
        for lag, columns in enumerate(near, start):
            after = x[:, max(0, lag - later) : lag].reshape(count, -1)
            columns[:, : after.shape[1]] = after
        yield values - _predicted(near, values)


def _later(rows: int, width: int) -> int:
    """How many later steps a regression of so many rows can take out."""
    return min(NEIGHBOURS, COLUMNS // width, rows // (ROWS_PER_COLUMN * width))


def _predicted(near: Array, values: Array) -> Array:
    """Least squares of values (..., n, D) on what is near (..., n, P), with a slight ridge."""
    slight = 1e-6 * near.shape[-2] * np.eye(near.shape[-1])
    rows = near.swapaxes(-1, -2)
    fitted: Array = near @ np.linalg.solve(rows @ near + slight, rows @ values)
    return fitted


def _step_products(features: Array, sequences: Sequences, reach: int) -> Iterator[_Products]:
    """Of the innovation at each lag and the targets so much later, summed over each sequence."""
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
    second = np.einsum("btk,btk->tk", target, target)
    for lag, part in zip(range(reach), _step_innovations(centred), strict=False):
        pieces = _pieces(batch, steps - lag)
        left, right = part[:, : steps - lag], target[:, lag:]
        bounds = np.linspace(0, steps - lag, pieces + 1).astype(int)
        sums = np.concatenate([
            left[:, a:b].transpose(0, 2, 1) @ right[:, a:b] for a, b in itertools.pairwise(bounds)
        ])  # fmt: skip
        first = np.einsum("btd,btd->d", left, left)
        power = np.outer(first, second[lag:].sum(0))
        squares = np.einsum("cdk,cdk->dk", sums, sums)
        yield _Products(sums.sum(0)[None], squares[None], power[None], batch * (steps - lag))


def _pieces(batch: int, steps: int) -> int:
    """Into how many stretches few long sequences are cut, so that there is a spread to see."""
    return max(1, min(-(-CLUSTERS // batch), steps // 25))


def _step_innovations(centred: Array) -> Iterator[Array]:
    """At lag 0, 1, ... the features without what the steps up to the target's predict."""
    batch, steps, width = centred.shape
    later = min(_later(batch * steps, width), steps - 1)
    values = centred.reshape(-1, width)
    ahead = (_shifted(centred, by).reshape(-1, width) for by in range(1, later + 1))
    near = np.concatenate([values[:, :0], *ahead], axis=1)
    normal = near.T @ near + 1e-6 * len(near) * np.eye(near.shape[1])
    moments = near.T @ values
    part = centred
    for lag in itertools.count():
        if 0 < lag <= later:
            m = lag * width
            weights = np.linalg.solve(normal[:m, :m], moments[:m])
            part = centred - (near[:, :m] @ weights).reshape(centred.shape)
        yield part


def _shifted(values: Array, by: int) -> Array:
    """values[:, t + by] at t, and 0 behind the end."""
    moved = np.zeros_like(values)
    moved[:, :-by] = values[:, by:]
    return moved
