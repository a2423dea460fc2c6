"""Clippers that choose their own threshold, in code of our own after what is published."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.outcomes.policies import Case, Prepared

Parameters = list[nn.Parameter]


def zclip(case: Case) -> Prepared:
    """ZClip (2025): clips norms whose z-score is above 2.5."""
    return _before_updates(case, ZClip(), "zclip")


def autoclip(case: Case) -> Prepared:
    """AutoClip (arXiv 2007.14469): clips at the 10th percentile of all norms so far."""
    return _before_updates(case, AutoClip(), "autoclip")


def agc(case: Case) -> Prepared:
    """Adaptive gradient clipping (arXiv 2102.06171): rows of at most 1 % of their weights' norm."""
    return _before_updates(case, clip_rows_, "agc")


def _before_updates(case: Case, clip: Callable[[Parameters], None], name: str) -> Prepared:
    parameters = list(case.model.parameters())
    return Prepared(case.model, case.optimizer, name, lambda: clip(parameters))


class ZClip:
    """Mean and variance of the norm, learnt for 25 steps and then as moving averages."""

    warm_up, keep, limit, cap = 25, 0.97, 2.5, 1.0

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean, self.variance = 0.0, 0.0

    def __call__(self, parameters: Parameters) -> None:
        norm = total_norm(parameters)
        if not math.isfinite(norm):
            return
        scale_(parameters, min(self.threshold(norm), self.cap), norm)

    def threshold(self, norm: float) -> float:
        """What this norm is clipped to, apart from the cap; infinite during the warm-up."""
        if len(self.first) < self.warm_up:
            self.first.append(norm)
            self.mean = sum(self.first) / len(self.first)
            squares = sum((each - self.mean) ** 2 for each in self.first)
            self.variance = squares / len(self.first)
            return math.inf
        deviation = math.sqrt(self.variance)
        z = (norm - self.mean) / (deviation + 1e-6)
        found = norm if z <= self.limit else self.mean + self.limit**2 * deviation / z
        self.mean = self.keep * self.mean + (1 - self.keep) * found
        self.variance = self.keep * self.variance + (1 - self.keep) * (found - self.mean) ** 2
        return found


class AutoClip:
    """The percentile of an unbounded history."""

    def __init__(self, percentile: float = 10) -> None:
        self.percentile = percentile
        self.history: list[float] = []

    def __call__(self, parameters: Parameters) -> None:
        norm = total_norm(parameters)
        self.history.append(norm)
        scale_(parameters, float(np.percentile(self.history, self.percentile)), norm)


@torch.no_grad()
def clip_rows_(parameters: Parameters, share: float = 0.01, least: float = 1e-3) -> None:
    """Scales every row of a gradient to at most a share of the norm of its row of weights."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        limit = share * _row_norms(parameter).clamp_min(least)
        norms = _row_norms(parameter.grad)
        parameter.grad.mul_(torch.where(norms > limit, limit / norms.clamp_min(1e-6), 1.0))


def _row_norms(tensor: Tensor) -> Tensor:
    dims = (1,) if tensor.ndim > 1 else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=tensor.ndim > 1)
    return norms


def total_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The total norm of all gradients."""
    found: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    return float(nn.utils.get_total_norm(found)) if found else 0.0


def scale_(parameters: Parameters, limit: float, norm: float) -> None:
    """Scales the gradients, whose total norm is given, down to the limit."""
    if norm > limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm))
