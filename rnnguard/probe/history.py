"""What came before each target, as arrays: sequences, their same-step features, and samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

KINDS = 32  # classes told apart; rarer ones count as one
TOKENS = 64  # token ids with a column of their own; rarer ones share
SHARED = 32
WIDEST = TOKENS + SHARED + 1  # channels; more are mixed down
PRODUCTS = 6  # channels up to which products within a step are formed


@dataclass(frozen=True)
class Sequences:
    """Inputs and targets of B sequences.

    values: (B, T, C), zero from each sequence's end on. A target stands at step `times` (n,)
    of sequence `rows` (n,): `target` (n, K) real values, or of `classes` many classes the
    one-hot rows; `classes` is 0 for real values.
    """

    values: Array
    rows: Array
    times: Array
    target: Array
    classes: int

    @property
    def longest(self) -> int:
        """The steps back from the latest target to the first step of its sequence."""
        return int(self.times.max()) + 1

    @property
    def per_step(self) -> bool:
        return len(self.rows) > len(np.unique(self.rows))

    @property
    def varies(self) -> bool:
        """Whether there is anything to predict."""
        return bool((self.target != self.target[0]).any())

    def drawn(self, count: int, seed: int) -> Sequences:
        """At most `count` of the targets, drawn at random."""
        if len(self.rows) <= count:
            return self
        picks = np.random.default_rng(seed).permutation(len(self.rows))[:count]
        picks.sort()
        return replace(
            self, rows=self.rows[picks], times=self.times[picks], target=self.target[picks]
        )


def one_hot(target: Array) -> tuple[Array, int]:
    """(n, K) one-hot rows of the classes of a target (n,), commonest first, and their number."""
    _, index = _by_frequency(target)
    index = np.minimum(index, KINDS - 1)
    classes = int(index.max()) + 1
    return np.eye(classes)[index], classes


def token_channels(ids: Array) -> Array:
    """(B, T, C) one-hot channels of token ids (B, T).

    Where there are many, the rarer ids share columns, and one more holds the id itself, since
    so many may be numbers.
    """
    found, index = _by_frequency(ids.ravel())
    many = len(found) > TOKENS
    index = np.where(index < TOKENS, index, TOKENS + index % SHARED)
    columns = np.eye(int(index.max()) + 1, dtype=np.float32)[index].reshape(*ids.shape, -1)
    return np.concatenate([columns, ids[:, :, None]], axis=2) if many else columns


def _by_frequency(values: Array) -> tuple[Array, Array]:
    """The distinct values, commonest first, and the place of each value among them."""
    found, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return found[order], rank[inverse.ravel()]


def scaled(values: Array, seed: int) -> Array:
    """The channels that vary, over their spread; more than WIDEST are mixed down at random."""
    values = np.asarray(values, dtype=np.float64)
    spread = values.std(axis=(0, 1))
    kept = spread > 1e-12 * np.abs(values).max(axis=(0, 1))
    values = values[:, :, kept] / spread[kept]
    if values.shape[2] > WIDEST:
        mixing = np.random.default_rng(seed).standard_normal((values.shape[2], WIDEST))
        values = values @ (mixing / np.sqrt(values.shape[2]))
    return values


def families(values: Array) -> Iterator[Array]:
    """Same-step features (B, T, D), simplest first: the channels, their products, degree two."""
    yield values
    channels = values.shape[2]
    # Of indicators that exclude each other no product tells anything new.
    if channels > PRODUCTS or _is_one_hot(values):
        return
    left, right = np.triu_indices(channels, 1)
    products = values[:, :, left] * values[:, :, right]
    if channels > 1:
        yield products
    yield np.concatenate([values, values**2, products], axis=2)


def _is_one_hot(values: Array) -> bool:
    binary = all(np.unique(channel).size == 2 for channel in np.moveaxis(values, 2, 0))
    return bool(binary and values.shape[2] > 1 and ((values != 0).sum(2) <= 1).all())


def histories(features: Array, sequences: Sequences, reach: int) -> Array:
    """(n, reach, D): the features at lag 0, 1, ... before each target; 0 before the start.

    Every column has mean 0 and spread 1, or is 0.
    """
    lags = np.arange(reach)
    back = sequences.times[:, None] - lags
    rows = features[sequences.rows[:, None], np.maximum(back, 0)]
    rows[back < 0] = 0
    return standardised(rows)


def standardised(columns: Array) -> Array:
    """Along the first axis: mean 0 and spread 1; what does not vary becomes 0."""
    columns = columns - columns.mean(0)
    spread = columns.std(0)
    varies = spread > 1e-9 * np.abs(columns).max(0, initial=0.0)
    columns /= np.where(varies, spread, 1)
    columns *= varies
    return columns
