"""Lyapunov exponents along the data-driven trajectory, by QR at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from rnnguard.probe.steps import Trajectory
from rnnguard.records import Exponent

_FLOOR = -200.0  # nats per step; a cell with U = 0 rightly has exponents of minus infinity


@torch.no_grad()
def exponents(
    trajectory: Trajectory, *, count: int, generator: torch.Generator, warmup: int | None = None
) -> tuple[Exponent, ...]:
    """The leading exponents in nats per step, largest first, each with its standard error.

    Q R = J Q in forward order; the mean of ln |R_ii| after the warm-up, with the spread
    over sequences, or over time when there is one sequence. Finite-time: the window is the
    length of the sequences.
    """
    count = min(count, trajectory.state_size)
    # The spectrum of a wide layer is dense, so that q aligns only like 1/t: half the steps.
    warmup = trajectory.steps // 2 if warmup is None else min(warmup, trajectory.steps - 1)
    like = trajectory.outputs
    shape = (trajectory.batch, trajectory.state_size, count)
    start = torch.randn(shape, generator=generator, dtype=torch.float64).to(like)
    q = torch.linalg.qr(start)[0]
    logs = torch.zeros(trajectory.steps, trajectory.batch, count, dtype=torch.float64)
    for step in range(trajectory.steps):
        factors = {name: value[step] for name, value in trajectory.factors.items()}
        pushed = trajectory.push(q.mT, factors).mT
        q, r = torch.linalg.qr(pushed)
        diagonal = r.diagonal(dim1=-2, dim2=-1).abs().double().cpu()
        logs[step] = diagonal.log().clamp_min(_FLOOR)
    return _summarised(logs[warmup:], trajectory.lengths.cpu() - warmup)


def _summarised(logs: Tensor, lengths: Tensor) -> tuple[Exponent, ...]:
    """Mean over each sequence's own steps, then mean and standard error over sequences."""
    lengths = lengths.clamp_min(0)
    alive = torch.arange(len(logs))[:, None] < lengths[None, :]
    kept = lengths > 0
    totals = (logs * alive[..., None]).sum(0)[kept] / lengths[kept][:, None]
    mean = totals.mean(0)
    if len(totals) > 1:
        error = totals.std(0) / len(totals) ** 0.5
    else:
        only = logs[: int(lengths.max())]
        # Without correction a single step has spread 0 and not a warning.
        error = only[:, 0].std(0, correction=0) / max(1, len(only) - 1) ** 0.5
    found = zip(mean.tolist(), error.tolist(), strict=True)
    ranked = sorted(found, key=lambda pair: -pair[0])
    return tuple(Exponent(value=v, stderr=e if e == e else 0.0) for v, e in ranked)
