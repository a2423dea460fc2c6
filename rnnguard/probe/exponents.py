"""Lyapunov exponents along the data-driven trajectory, by QR at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rnnguard.measurements import Exponent
from rnnguard.probe.steps import Trajectory

Push = Callable[[int, Tensor], Tensor]

FLOOR = -200.0  # nats per step; a cell with U = 0 rightly has exponents of minus infinity
_BLOCKS = 5


@torch.no_grad()
def exponents(
    trajectory: Trajectory, *, count: int, generator: torch.Generator, warmup: int | None = None
) -> tuple[Exponent, ...]:
    """The leading exponents of a trajectory in nats per step; see `exponents_of`."""

    def push(step: int, q: Tensor) -> Tensor:
        factors = {name: value[step] for name, value in trajectory.factors.items()}
        return trajectory.push(q.mT, factors).mT

    return exponents_of(
        push,
        batch=trajectory.batch,
        state_size=trajectory.state_size,
        steps=trajectory.steps,
        count=count,
        generator=generator,
        lengths=trajectory.lengths,
        warmup=warmup,
        like=trajectory.outputs,
    )


def exponents_of(
    push: Push,
    *,
    batch: int,
    state_size: int,
    steps: int,
    count: int,
    generator: torch.Generator,
    lengths: Tensor | None = None,
    warmup: int | None = None,
    like: Tensor | None = None,
) -> tuple[Exponent, ...]:
    """The leading exponents in nats per step, largest first, each with its standard error.

    push(step, q) gives J_step q for q (B, n, k), of the same shape: the Jacobian of the joint
    state of n numbers from `step` to `step + 1`, for step = 0 .. steps - 1 and each of the
    B = `batch` sequences. It is called once per step and in order, so that it may step a
    recurrence of its own; it runs in the caller's grad mode, and what it gives is detached.

    `count` exponents at most; lengths (B,) where sequences end early (push may give anything
    finite behind an end); `warmup` steps are left out while q aligns, half of them when None;
    `like` is a tensor with the dtype and device to work in, float64 on the CPU when None.
    Finite-time: the window is the length of the sequences. For a system that is no function of
    its own past alone (a stack of layers), n is the joint state or each part by itself.

    Source: Q R = J Q in forward order, lambda_i = mean of ln |R_ii| (Benettin et al. 1980;
    Vogt et al. 2022). The error is that of the mean over sequences; with one sequence, that
    over five blocks of time. In simulations of five networks the 95 % interval covered 89 to
    97 % with 4 or 8 sequences of 40 to 200 steps; with one sequence of 100 or 200 steps 81 to
    96 % for those that forget within 30 steps, and 62 to 77 % for an LSTM that keeps with 0.95,
    whose blocks depend on each other.
    """
    like = torch.zeros((), dtype=torch.float64, device="cpu") if like is None else like
    lengths = torch.tensor([steps] * batch, device="cpu") if lengths is None else lengths.cpu()
    # The spectrum of a wide layer is dense, so that q aligns only like 1/t: half the steps.
    longest = int(lengths.max())
    warmup = longest // 2 if warmup is None else min(warmup, longest - 1)
    # One direction after the other, so that asking for more changes nothing in the first.
    start = [
        torch.randn(batch, state_size, generator=generator, dtype=torch.float64, device="cpu")
        for _ in range(min(count, state_size))
    ]
    q = torch.linalg.qr(torch.stack(start, -1).to(like))[0]
    diagonals = []
    for step in range(steps):
        q, r = torch.linalg.qr(push(step, q).detach())
        diagonals.append(r.diagonal(dim1=-2, dim2=-1).abs())
    logs = torch.stack(diagonals).double().cpu().log().clamp_min(FLOOR)
    return _summarised(logs[warmup:], lengths - warmup)


def _summarised(logs: Tensor, lengths: Tensor) -> tuple[Exponent, ...]:
    """Mean over each sequence's own steps, then mean and standard error over sequences."""
    lengths = lengths.clamp_min(0)
    alive = torch.arange(len(logs), device="cpu")[:, None] < lengths[None, :]
    kept = lengths > 0
    means = (logs * alive[..., None]).sum(0)[kept] / lengths[kept][:, None]
    pieces = means
    if len(means) == 1:
        pieces = _blocks(logs[: int(lengths.max()), kept][:, 0])
    errors = [0.0] * means.shape[1]
    if len(pieces) > 1:
        errors = (pieces.std(0) / len(pieces) ** 0.5).tolist()
    found = zip(means.mean(0).tolist(), errors, strict=True)
    ranked = sorted(found, key=lambda pair: -pair[0])
    return tuple(Exponent(value=v, stderr=e, freedom=len(pieces) - 1) for v, e in ranked)


def _blocks(logs: Tensor) -> Tensor:
    """Means over blocks of time (steps, k) -> (blocks, k); what is left over goes unused.

    Single steps are correlated, so that their spread understates the error of the mean.
    """
    length = -(-len(logs) // _BLOCKS)
    whole = len(logs) // length
    return logs[: whole * length].reshape(whole, length, -1).mean(1)
