"""Retention R(k): how much of the state gradient is left after k steps back through time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rnnguard.probe.steps import Trajectory

SILENCE = -1e4  # log10 of a gradient that is exactly zero


@torch.no_grad()
def log10_retention(
    trajectory: Trajectory, *, vectors: int, generator: torch.Generator
) -> list[float]:
    """log10 R(k) for lag k = 0 .. T, from each sequence's own last state back to its first.

    R(k) is the rms over the sequences that reach back so far and `vectors` random directions
    of the gradient of v . s_T at lag k over the same at lag 0; E |J'v|^2 is the squared
    Frobenius norm.
    Renormalised every step, so nothing under- or overflows.
    """
    batch, size = trajectory.batch, trajectory.state_size
    like = trajectory.outputs
    g = torch.randn(batch, vectors, size, generator=generator, dtype=torch.float64)
    g = g.to(device=like.device, dtype=like.dtype)
    logs, g = _normalised(g, torch.zeros(batch, vectors, dtype=torch.float64, device=g.device))
    start, curve = logs, [0.0]
    for lag in range(1, trajectory.steps + 1):
        times = trajectory.lengths - lag
        present = times >= 0
        if not bool(present.any()):
            break
        pulled = trajectory.pull(g, trajectory.factors_at(times.clamp_min(0)))
        logs, g = _normalised(pulled, logs)
        kept = _log_mean_square(logs[present]) - _log_mean_square(start[present])
        curve.append(kept / 2 / math.log(10))
    return [max(value, SILENCE) for value in curve]


def _normalised(g: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the norm out of each vector and into the logarithm."""
    norm = torch.linalg.vector_norm(g, dim=-1, dtype=torch.float64)
    scale = norm.clamp_min(torch.finfo(torch.float64).tiny)
    unit = (g.double() / scale[..., None]).to(g.dtype)
    return logs + torch.where(norm > 0, scale.log(), -torch.inf), unit


def _log_mean_square(logs: Tensor) -> float:
    """ln of the mean of exp(2 logs)."""
    flat = 2 * logs.flatten()
    return float(torch.logsumexp(flat, 0)) - math.log(len(flat))


def effective_length(curve: list[float], epsilon: float = 1e-2) -> int:
    """T_eff(eps): the largest k with R(j) >= eps for all j <= k; the curve is log10 R."""
    bound = math.log10(epsilon)
    return next((k - 1 for k, value in enumerate(curve) if value < bound), len(curve) - 1)
