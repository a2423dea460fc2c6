"""The leading Lyapunov exponents as a function that can be differentiated in the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnnguard.inspection.gates import GATES, Weights
from rnnguard.probe.steps import Trajectory, run
from rnnguard.records import Cell

LOST = 1e-12  # what is left of a direction that a step has wiped out, up to rounding


@dataclass(frozen=True)
class Stretch:
    """What exponents are taken along: inputs, and the directions that are followed.

    x: (T, B, F), in the order in which the steps are taken; the state starts at zero.
    directions: (B, n, k), orthonormal, of the joint state of n numbers.
    warmup: steps that are left out of the mean while the directions align; below T.
    """

    x: Tensor
    directions: Tensor
    warmup: int

    def leading(self, count: int) -> Stretch:
        """The same along the first `count` directions alone."""
        return Stretch(self.x, self.directions[..., :count], self.warmup)


def stretch(
    x: Tensor, state_size: int, *, count: int, warmup: int, generator: torch.Generator
) -> Stretch:
    """The stretch along x (T, B, F) of at most `count` directions, drawn by the generator."""
    # One direction after the other, as in `exponents_of`: asking for more moves none of them.
    drawn = [
        torch.randn(x.shape[1], state_size, generator=generator, dtype=torch.float64, device="cpu")
        for _ in range(min(count, state_size))
    ]
    directions = torch.linalg.qr(torch.stack(drawn, -1).to(x))[0]
    return Stretch(x, directions, min(warmup, len(x) - 1))


def state_size(cell: Cell, weights: Weights) -> int:
    """How many numbers a layer carries from step to step: those of (h, c) in an LSTM."""
    return weights.hh.shape[1] + (weights.hidden_size if GATES[cell].carries_cell_state else 0)


def leading_exponents(cell: Cell, weights: Weights, along: Stretch) -> Tensor:
    """The exponents (k,) in nats per step, the mean over steps and sequences, differentiable.

    Measured as by `lyapunov_exponents`, with the closed-form Jacobian and a QR at every step,
    and left in the order of the directions. Minus infinity, and of no use for a gradient, where
    a step wipes a direction out, as units of a ReLU do that are all off.

    Source: Engelken 2023, Gradient flossing (arXiv 2312.17306).
    """
    trajectory = trajectory_of(cell, weights, along.x)
    factors: list[dict[str, Tensor]] = [{} for _ in range(trajectory.steps)]
    for name, values in trajectory.factors.items():
        for step, value in zip(factors, values.unbind(0), strict=True):
            step[name] = value
    q, logs = along.directions, []
    for step in factors:
        q, r = torch.linalg.qr(trajectory.push(q.mT, step).mT)
        left = r.diagonal(dim1=-2, dim2=-1).abs()
        logs.append(left.where(left > LOST, 0.0).log())
    return torch.stack(logs[along.warmup :]).mean((0, 1))


def trajectory_of(cell: Cell, weights: Weights, x: Tensor) -> Trajectory:
    """One layer over x (T, B, F) from a state of zeros, in the caller's grad mode."""
    sizes = [weights.hh.shape[1], weights.hidden_size]
    state = tuple(
        x.new_zeros(x.shape[1], size)
        for size in sizes[: 2 if GATES[cell].carries_cell_state else 1]
    )
    lengths = torch.full((x.shape[1],), len(x), device=x.device)
    return run(cell, weights, x, state, lengths)
