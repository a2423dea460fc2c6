"""Forward memory: how much of the input k steps ago a line reads out of the present state.

A reading that needs no gradient, beside the retention that looks back through them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rnnguard.errors import RefusedError
from rnnguard.probe.history import Array
from rnnguard.probe.small_systems import one_thread, solved
from rnnguard.records import Record

FOLDS = 5
SINGLE = 48  # lags taken one by one, before the ladder begins
FEWEST = 48  # pairs of state and input that a lag is judged by
VALUES = 200_000  # of the states' products that are held at once
PENALTIES = (1e-9, 1e-6, 1e-3, 0.1, 10.0)  # per pair, of units with spread 1
THRESHOLD = 0.1
SURE = 0.995  # one-sided; a false lag of the ladder counts for all lags beside it


class ForwardMemory(Record):
    """R^2 of linear read-outs of the input `lags` steps ago, 0 being the state's own step.

    `r2` is over all input channels together, out of fold, and at least 0; `stderr` is its
    standard error over folds. `capacity` is the sum of R^2 over lags and channels, counted
    where it exceeds its noise and interpolated between the lags measured; for white input it
    is at most the number of units. `reach` is the longest lag whose R^2 exceeds both
    `threshold` and its noise (one-sided 99.5 %, Student's t over folds), None without any.
    """

    lags: tuple[int, ...]
    r2: tuple[float, ...]
    stderr: tuple[float, ...]
    capacity: float
    reach: int | None
    threshold: float = THRESHOLD


def forward_memory(
    states: Tensor,
    inputs: Tensor,
    lengths: Tensor,
    *,
    seed: int = 0,
    lags: Sequence[int] | None = None,
) -> ForwardMemory:
    """How much of past inputs the present state still holds, by lag in steps.

    states: (T, B, n), each after its step's input; inputs: (T, B, F); lengths: (B,). `lags` as
    wanted, or None: up to 48 one by one, then a factor of 2^(1/4) apart, as far as 48 pairs of
    state and input are left. Ridge regression of x[t - k] on s[t], cross-validated by
    sequence, or by stretches of time where there is one sequence. The penalty is the one that
    predicts best over all folds.

    Raises RefusedError (RG912) for shapes that do not fit, values that are not finite, and
    lags beyond what the sequences allow. Memory capacity: Jaeger, Short term memory in echo
    state networks, GMD report 152 (2001).
    """
    _check(states, inputs, lengths)
    s = states.detach().double().cpu().numpy()
    x = inputs.detach().double().cpu().numpy()
    inside = (np.arange(len(s))[:, None] < lengths.cpu().numpy()).astype(bool)
    folds = folds_of(inside, seed)
    kept = tuple(_ladder(folds)) if lags is None else _checked(lags, folds)
    x = _varying(x, inside)
    # Squares beside the values, so that the past's own sums of squares are among the products.
    values = np.concatenate([x, x**2], axis=2)
    held, past = _by_fold(_standardised(s, inside), values, folds)
    with one_thread():
        shares = [_shares(*found) for found in _moments_by_lag(held, past, kept)]
    return _summarised(kept, np.concatenate(shares))


def _summarised(lags: tuple[int, ...], shares: Array) -> ForwardMemory:
    """shares: (lags, folds, 1 + F), R^2 over all channels and of each one."""
    from scipy.special import stdtrit

    count = shares.shape[1]
    mean, error = shares.mean(1), shares.std(1, ddof=1) / np.sqrt(count)
    certain = np.maximum(mean, 0) * (mean > error * float(stdtrit(count - 1, SURE)))
    between = np.arange(lags[0], lags[-1] + 1)
    capacity = sum(float(np.interp(between, lags, channel).sum()) for channel in certain[:, 1:].T)
    reaching = np.flatnonzero(certain[:, 0] > THRESHOLD)
    return ForwardMemory(
        lags=lags,
        r2=tuple(np.maximum(mean[:, 0], 0).tolist()),
        stderr=tuple(error[:, 0].tolist()),
        capacity=capacity,
        reach=lags[reaching[-1]] if len(reaching) else None,
    )


def _by_fold(s: Array, x: Array, folds: Array) -> tuple[Array, Array]:
    """States and inputs (folds, T, B', n) of the sequences that are in each fold.

    States are 0 outside of the fold, inputs outside of the sequences: the past of one
    sequence's stretch may lie in another.
    """
    own = [np.flatnonzero((folds == fold).any(0)) for fold in range(int(folds.max()) + 1)]
    shape = len(own), len(s), max(map(len, own))
    states, past = np.zeros((*shape, s.shape[2])), np.zeros((*shape, x.shape[2]))
    for fold, rows in enumerate(own):
        of = folds[:, rows, None]
        states[fold, :, : len(rows)] = np.where(of == fold, s[:, rows], 0)
        past[fold, :, : len(rows)] = np.where(of >= 0, x[:, rows], 0)
    return states, past


def _moments_by_lag(s: Array, x: Array, lags: Sequence[int]) -> Iterator[tuple[Array, Array]]:
    """Of a few lags at a time the products of states that stand so late, and of those and x.

    s: (folds, T, B, n + 1), the last column 1, so that sums and counts are among the products
    (lags, folds, n + 1, n + 1) and (lags, folds, n + 1, m); x: (folds, T, B, m).
    """
    at_once = max(1, VALUES // (len(s) * s.shape[3] ** 2))
    kept, start = _products(s, s), 0
    for first in range(0, len(lags), at_once):
        squares, crossed = [], []
        for lag in lags[first : first + at_once]:
            gone = s[:, start:lag]
            kept, start = kept - _products(gone, gone), lag
            squares.append(kept)
            crossed.append(_products(s[:, lag:], x[:, : x.shape[1] - lag]))
        yield np.stack(squares), np.stack(crossed)


def _products(left: Array, right: Array) -> Array:
    """(folds, n, m): the sum of products over each fold's steps."""
    rows, columns = (values.reshape(len(values), -1, values.shape[3]) for values in (left, right))
    found: Array = rows.swapaxes(1, 2) @ columns
    return found


def _shares(squares: Array, crossed: Array) -> Array:
    """(lags, folds, 1 + F): R^2 over all channels and of each one, at each lag's best penalty.

    crossed: (lags, folds, n + 1, 2 F), the products of the states with the past and its square.
    All errors are sums of products, so that no pair of state and input is looked at twice.
    """
    past, energy = np.split(crossed, 2, axis=3)
    normal, moments = (p.sum(1, keepdims=True) - p for p in (squares, past))
    count = normal[..., -1:, -1:]
    middle, mean = normal[..., :-1, -1:] / count, moments[..., -1:, :] / count
    weights = _ridges(
        normal[..., :-1, :-1] - count * middle * middle.swapaxes(2, 3),
        moments[..., :-1, :] - count * middle * mean,
        count,
    )
    totals = energy[..., -1, :] - (2 * mean * past[..., -1:, :])[..., 0, :]
    totals += mean[..., 0, :] ** 2 * squares[..., -1, -1:]
    # The last is the offset, by which the states are taken from the mean of the other folds.
    weights = np.concatenate([weights, -middle.swapaxes(2, 3) @ weights], axis=3)
    shared = past - squares[..., -1:] * mean
    errors = totals + (weights * (squares @ weights - 2 * shared)).sum(3)
    best = errors[errors.sum((2, 3)).argmin(0), np.arange(len(errors[0]))]
    best, totals = (np.concatenate([e.sum(2, keepdims=True), e], axis=2) for e in (best, totals))
    return np.where(totals > 0, 1 - np.maximum(best, 0) / np.where(totals > 0, totals, 1), 0)


def _ridges(normal: Array, moments: Array, count: Array) -> Array:
    """The weights (penalties, lags, folds, n, F)."""
    each = np.eye(normal.shape[-1])
    return np.stack([solved(normal + penalty * count * each, moments) for penalty in PENALTIES])


def folds_of(inside: Array, seed: int) -> Array:
    """(T, B): the fold of each step, -1 outside of the sequences."""
    steps, batch = inside.shape
    if batch == 1:
        whole = int(inside.sum())
        of = (np.arange(steps) * FOLDS // whole)[:, None]
    else:
        of = np.random.default_rng(seed).permutation(batch) % min(FOLDS, batch)
        of = np.broadcast_to(of, (steps, batch))
    return np.where(inside, of, -1)


def _allows(folds: Array, lag: int) -> bool:
    """Whether every fold has states at that lag, and all together enough."""
    left = folds[lag:][folds[lag:] >= 0]
    return len(left) >= FEWEST and bool(np.bincount(left, minlength=int(folds.max()) + 1).all())


def _ladder(folds: Array) -> Iterator[int]:
    lag = 0
    while lag < len(folds) and _allows(folds, lag):
        yield lag
        lag = lag + 1 if lag < SINGLE else round(lag * 2**0.25)


def _checked(lags: Sequence[int], folds: Array) -> tuple[int, ...]:
    wanted = tuple(sorted(set(lags)))
    for lag in wanted:
        if lag < 0 or not _allows(folds, lag):
            fact = f"a lag of {lag} leaves too few pairs of state and input."
            raise _refused("lags", fact, "Give longer sequences or shorter lags from 0 on.")
    if not wanted:
        raise _refused("lags", "there are none.", "Give lags in steps, or None.")
    return wanted


def _standardised(s: Array, inside: Array) -> Array:
    """Units of mean 0 and spread 1 and a column of 1; a unit that never moves stays 0."""
    mean, spread = s[inside].mean(0), s[inside].std(0)
    moves = spread > 1e-12 * np.abs(s[inside]).max(0)
    scaled: Array = np.where(moves, (s - mean) / np.where(moves, spread, 1), 0)
    return np.concatenate([scaled, np.ones_like(scaled[:, :, :1])], axis=2)


def _varying(x: Array, inside: Array) -> Array:
    """The channels that vary, each from its mean; one of zeros where none does."""
    spread = x[inside].std(0)
    varying = spread > 1e-12 * np.abs(x[inside]).max(0)
    kept = x[:, :, varying] if varying.any() else np.zeros_like(x[:, :, :1])
    centred: Array = kept - kept[inside].mean(0)
    return centred


def _check(states: Tensor, inputs: Tensor, lengths: Tensor) -> None:
    if states.dim() != 3 or inputs.dim() != 3 or states.shape[:2] != inputs.shape[:2]:
        shapes = f"states {tuple(states.shape)} and inputs {tuple(inputs.shape)} do not fit."
        raise _refused("states", shapes, "Give states (T, B, n) and inputs (T, B, F).")
    steps, batch = states.shape[:2]
    if lengths.shape != (batch,) or not bool(((lengths >= 1) & (lengths <= steps)).all()):
        fact = f"lengths are not {batch} numbers between 1 and {steps}."
        raise _refused("lengths", fact, "Give one length per sequence.")
    within = torch.arange(steps, device=lengths.device)[:, None] < lengths
    for name, values in (("states", states), ("inputs", inputs)):
        if not bool(torch.isfinite(values[within.to(values.device)]).all()):
            raise _refused(name, "a value is not finite.", "Give sequences before they diverge.")
    if int(lengths.sum()) < FEWEST:
        fact = f"there are {int(lengths.sum())} steps in all."
        raise _refused("lengths", fact, f"Give at least {FEWEST} steps.")


def _refused(place: str, fact: str, cure: str) -> RefusedError:
    return RefusedError.of("RG912", place, fact, cure)
