"""Retention R(k): how much of the state gradient is left after k steps back through time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from rnnguard.probe.steps import Trajectory
from rnnguard.records import Direction

Pull = Callable[[int, Tensor], Tensor]

SILENCE = -1e4  # log10 of a gradient that is exactly zero


@dataclass(frozen=True)
class RetentionCurve:
    """log10 R(k) for lag k = 0, 1, ..., the standard error of each and its degrees of freedom."""

    log10: tuple[float, ...]
    stderr: tuple[float, ...]
    freedom: tuple[int, ...]

    @property
    def interval(self) -> tuple[tuple[float, float], ...]:
        """The 95 % interval of log10 R(k) at each lag, by Student's t; R(0) is 1 exactly."""
        from scipy.special import stdtrit

        reach = [0.0]
        for error, freedom in zip(self.stderr[1:], self.freedom[1:], strict=True):
            reach.append(error * float(stdtrit(freedom, 0.975)) if freedom else math.inf)
        return tuple((max(SILENCE, v - r), v + r) for v, r in zip(self.log10, reach, strict=True))

    def effective_length(self, epsilon: float = 1e-2) -> int:
        """T_eff(eps) in steps, at most the number of lags measured."""
        return effective_length(self.log10, epsilon)

    def effective_length_interval(self, epsilon: float = 1e-2) -> tuple[int, int]:
        """T_eff(eps) of the lower and of the upper bounds of the curve."""
        low, high = zip(*self.interval, strict=True)
        return effective_length(low, epsilon), effective_length(high, epsilon)

    def at(self, lag: int) -> float:
        """log10 R at the lag, extrapolated where the sequences were shorter."""
        return _at(self.log10, lag)

    def interval_at(self, lag: int) -> tuple[float, float]:
        """The 95 % interval of log10 R at the lag; each bound is extrapolated like the curve."""
        low, high = zip(*self.interval, strict=True)
        return _at(low, lag), _at(high, lag)


def weakest_direction(
    curves: Sequence[tuple[Direction, RetentionCurve]], lag: int
) -> tuple[Direction, RetentionCurve]:
    """The direction that keeps least at the lag, and the joint curve of its layers."""
    own: dict[Direction, list[RetentionCurve]] = {}
    for direction, curve in curves:
        own.setdefault(direction, []).append(curve)
    joint = {direction: upper_envelope(own[direction]) for direction in own}
    weakest = min(joint, key=lambda direction: joint[direction].at(lag))
    return weakest, joint[weakest]


def upper_envelope(curves: Sequence[RetentionCurve]) -> RetentionCurve:
    """At each lag the curve that keeps most: of stacked layers that one carries the signal."""
    points = [zip(c.log10, c.stderr, c.freedom, strict=True) for c in curves]
    best = [max(found) for found in zip(*points, strict=True)]
    values, errors, freedoms = zip(*best, strict=True)
    return RetentionCurve(values, errors, freedoms)


@torch.no_grad()
def log10_retention(
    trajectory: Trajectory, *, vectors: int, generator: torch.Generator
) -> RetentionCurve:
    """The retention of a trajectory from each last state back; see `log10_retention_of`."""

    def pull(lag: int, g: Tensor) -> Tensor:
        times = (trajectory.lengths - lag).clamp_min(0)
        return trajectory.pull(g, trajectory.factors_at(times))

    return log10_retention_of(
        pull,
        batch=trajectory.batch,
        state_size=trajectory.state_size,
        steps=trajectory.steps,
        vectors=vectors,
        generator=generator,
        lengths=trajectory.lengths,
        like=trajectory.outputs,
    )


def log10_retention_of(
    pull: Pull,
    *,
    batch: int,
    state_size: int,
    steps: int,
    vectors: int,
    generator: torch.Generator,
    lengths: Tensor | None = None,
    like: Tensor | None = None,
) -> RetentionCurve:
    """log10 R(k) for lag k = 0 .. T, from each sequence's own last state back to its first.

    pull(lag, g) gives g J for g (B, V, n), of the same shape: V = `vectors` gradients of each
    of the B = `batch` sequences, taken from the state after step `end - lag + 1` to the state
    before it, for lag = 1 .. steps, where a sequence's last step is number `end` (so that
    lag 1 is the Jacobian of its last step, number lengths[b] - 1 counted from 0). It is called
    once per lag and in order; it runs in the caller's grad mode, and what it gives is detached.
    Of sequences shorter than the lag it may give anything finite.

    lengths (B,) where sequences differ; `like` is a tensor with the dtype and device to work
    in, float64 on the CPU when None. R(k) is the rms over the sequences that reach back so far
    and `vectors` random directions v of the gradient of v . s_T at lag k over the same at lag
    0; E |J'v|^2 is the squared Frobenius norm. Renormalised every step, so nothing under- or
    overflows.

    The error is over sequences, or where one alone reaches so far over its vectors: the larger
    of the jackknife's and of the spread of the sequences' own log10 R. In simulations of 4 to
    16 sequences the 95 % interval covered 88 to 98 % where those differed by up to 0.2 decades
    (standard deviation), about 80 to 90 % at 0.4 and 70 % at 0.7 to 1, where a mean square
    rests on few sequences and comes out too small.
    """
    like = torch.zeros((), dtype=torch.float64, device="cpu") if like is None else like
    ends = torch.tensor([steps] * batch, device="cpu") if lengths is None else lengths.cpu()
    shape = (batch, vectors, state_size)
    g = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(like)
    logs, g = _normalised(g, torch.zeros(batch, vectors, dtype=torch.float64, device=g.device))
    start, pieces = logs, []
    for lag in range(1, int(ends.max()) + 1):
        logs, g = _normalised(pull(lag, g).detach(), logs)
        rows = (ends >= lag).nonzero()[:, 0].to(logs.device)
        pieces.append((_log_mean_squares(logs[rows]), _log_mean_squares(start[rows])))
    points = [(0.0, 0.0, 0)]
    # Read only now: every look at a value would wait for an accelerator.
    for _, alike in groupby(pieces, key=lambda pair: len(pair[0])):
        kept, whole = (torch.stack(parts).cpu() for parts in zip(*alike, strict=True))
        points += _points(kept, whole)
    values, errors, freedoms = zip(*points, strict=True)
    return RetentionCurve(values, errors, freedoms)


def _normalised(g: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the norm out of each vector and into the logarithm."""
    norm = torch.linalg.vector_norm(g, dim=-1, dtype=torch.float64)
    scale = norm.clamp_min(torch.finfo(torch.float64).tiny)
    unit = (g.double() / scale[..., None]).to(g.dtype)
    return logs + torch.where(norm > 0, scale.log(), -torch.inf), unit


def _log_mean_squares(logs: Tensor) -> Tensor:
    """ln of each sequence's mean of exp(2 logs) over its vectors; of one sequence, of each."""
    if len(logs) == 1:
        return 2 * logs[0]
    return torch.logsumexp(2 * logs, 1) - math.log(logs.shape[1])


def _points(kept: Tensor, whole: Tensor) -> list[tuple[float, float, int]]:
    """log10 of the ratio of root mean squares, its standard error, the degrees of freedom.

    kept, whole: ln of the mean squares of n pieces at the lags and at lag 0, (lags, n).
    """
    pieces = kept.shape[1]
    values = _log10_of_root(kept.logsumexp(1) - whole.logsumexp(1))
    errors = torch.zeros_like(values)
    if pieces > 1:
        without = _log10_of_root(_without_each(kept) - _without_each(whole))
        jackknife = (without.var(1, correction=0) * (pieces - 1)).sqrt()
        # Where one piece outweighs the rest, leaving out any other one changes nothing.
        errors = jackknife.maximum(_log10_of_root(kept - whole).std(1) / math.sqrt(pieces))
    freedoms = [pieces - 1] * len(kept)
    return list(zip(values.tolist(), errors.tolist(), freedoms, strict=True))


def _log10_of_root(logs: Tensor) -> Tensor:
    """log10 of the root of exp(logs), of nothing the log10 of silence."""
    return (logs / 2 / math.log(10)).clamp_min(SILENCE)


def _without_each(logs: Tensor) -> Tensor:
    """ln of the sum of exp(logs) along the second axis, without each entry in turn."""
    nothing = logs.new_full((len(logs), 1), -math.inf)
    before = torch.cat([nothing, logs.logcumsumexp(1)[:, :-1]], 1)
    behind = torch.cat([nothing, logs.flip(1).logcumsumexp(1)[:, :-1]], 1).flip(1)
    return torch.logaddexp(before, behind)


def effective_length(curve: Sequence[float], epsilon: float = 1e-2) -> int:
    """T_eff(eps): the largest k with R(j) >= eps for all j <= k; the curve is log10 R."""
    bound = math.log10(epsilon)
    return next((k - 1 for k, value in enumerate(curve) if value < bound), len(curve) - 1)


def _at(curve: Sequence[float], lag: int) -> float:
    """The curve at the lag; beyond what was measured along the slope of its second half."""
    if lag < len(curve):
        return curve[lag]
    last, half = len(curve) - 1, (len(curve) - 1) // 2
    slope = (curve[last] - curve[half]) / max(1, last - half)
    return max(SILENCE, curve[last] + slope * (lag - last))
