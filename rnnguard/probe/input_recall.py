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
from rnnguard.records import Record

FOLDS = 5
SINGLE = 48  # lags taken one by one, before the ladder begins
FEWEST = 48  # pairs of state and input that a lag is judged by
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
    s, x = _standardised(s, inside), _varying(x, inside)
    squares = _squares_by_lag(s, folds, kept)
    shares = [_shares(s, x, folds, lag, own) for lag, own in zip(kept, squares, strict=True)]
    return _summarised(kept, np.array(shares))


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


def _squares_by_lag(s: Array, folds: Array, lags: Sequence[int]) -> Iterator[Array]:
    """For each lag the products (folds, n + 1, n + 1) of the states that stand so late.

    The last column of `s` is 1, so that sums and counts are among them.
    """
    kept, start = _squares(s, folds, s, int(folds.max()) + 1), 0
    for lag in lags:
        gone = slice(start, lag)
        kept = kept - _squares(s[gone], folds[gone], s[gone], len(kept))
        start = lag
        yield kept


def _squares(left: Array, folds: Array, right: Array, count: int) -> Array:
    """(folds, n, m): the sum of products over each fold's steps."""
    return np.stack([left[folds == fold].T @ right[folds == fold] for fold in range(count)])


def _shares(s: Array, x: Array, folds: Array, lag: int, squares: Array) -> Array:
    """(folds, 1 + F): R^2 over all channels and of each one, at the penalty that is best."""
    count, past, folds = len(squares), x[: len(x) - lag], folds[lag:]
    crossed = _squares(s[lag:], folds, past, count)
    errors = np.empty((len(PENALTIES), count, x.shape[2]))
    totals = np.empty((count, x.shape[2]))
    for fold in range(count):
        normal, moments = squares.sum(0) - squares[fold], crossed.sum(0) - crossed[fold]
        middle, mean = normal[:-1, -1] / normal[-1, -1], moments[-1] / normal[-1, -1]
        test = folds == fold
        states, rest = s[lag:][test][:, :-1] - middle, past[test] - mean
        totals[fold] = (rest**2).sum(0)
        centred = normal[:-1, :-1] - normal[-1, -1] * np.outer(middle, middle)
        shared = moments[:-1] - np.outer(normal[:-1, -1], mean)
        for p, weights in enumerate(_ridges(centred, shared, normal[-1, -1])):
            errors[p, fold] = ((rest - states @ weights) ** 2).sum(0)
    best = errors[errors.sum((1, 2)).argmin()]
    left = np.column_stack([best.sum(1), best])
    whole = np.column_stack([totals.sum(1), totals])
    shares: Array = np.where(whole > 0, 1 - left / np.where(whole > 0, whole, 1), 0)
    return shares


def _ridges(normal: Array, moments: Array, count: float) -> Iterator[Array]:
    """The weights (n, F) for each penalty."""
    from scipy.linalg import cho_factor, cho_solve

    for penalty in PENALTIES:
        ridge = normal + penalty * count * np.eye(len(normal))
        yield cho_solve(cho_factor(ridge, check_finite=False), moments, check_finite=False)


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
    return len(left) >= FEWEST and len(np.unique(left)) == len(np.unique(folds[folds >= 0]))


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
    """The channels that vary; one of zeros where none does."""
    spread = x[inside].std(0)
    varying = spread > 1e-12 * np.abs(x[inside]).max(0)
    kept: Array = x[:, :, varying] if varying.any() else np.zeros_like(x[:, :, :1])
    return kept


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
