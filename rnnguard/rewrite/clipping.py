"""The gradients of one step: how large they are, and how they are brought down."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from rnnguard.rewrite.schedule import Clip

EPSILON = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to the norm before it divides by it."""


@dataclass(frozen=True)
class Gradients:
    """The gradients that an optimizer is about to use, and what a GradScaler multiplied them by.

    groups: the entries of each parameter group that has any, as dense tensors that share memory
    with the gradients; scale: None, or the factor that a fused optimizer has yet to divide by.
    """

    groups: list[list[Tensor]]
    scale: Tensor | None

    @classmethod
    def of(cls, optimizer: Optimizer) -> Self:
        """Sparse gradients are coalesced for it, since entries that meet count as one."""
        groups = [[*_entries(group["params"])] for group in optimizer.param_groups]
        scale = getattr(optimizer, "grad_scale", None)
        return cls([group for group in groups if group], scale)

    @property
    def every(self) -> list[Tensor]:
        return [gradient for group in self.groups for gradient in group]

    def sizes(self, clip: Clip | None) -> list[Tensor]:
        """What the clip bounds, without the scaler's factor: a norm, several, or an entry."""
        if clip == "group":
            return [self._size(group) for group in self.groups]
        return [self._size(self.every, _largest_entry if clip == "value" else _norm)]

    def _size(
        self, gradients: list[Tensor], measure: Callable[[list[Tensor]], Tensor] | None = None
    ) -> Tensor:
        # Dividing the size, not the gradients, is enough: norms are homogeneous.
        norm = (measure or _norm)(gradients)
        if self.scale is not None:
            norm = norm / self.scale.to(norm.device)
        # The norm of sharded gradients (DTensor) is a sum over ranks that is still to be made.
        return _whole(norm)

    def limit_(self, clip: Clip, sizes: list[Tensor], bound: float | Tensor) -> None:
        """Brings the gradients down so that no size exceeds the bound; smaller ones stay."""
        parts = self.groups if clip == "group" else [self.every]
        for part, size in zip(parts, sizes, strict=True):
            factor = _factor(size, bound)
            if _is_seen_to_be_one(factor):
                continue
            if clip == "value":
                self._limit_values_(bound)
            else:
                multiply_(part, factor)

    def _limit_values_(self, bound: float | Tensor) -> None:
        limit: Any = bound if self.scale is None else bound * self.scale
        for gradient in self.every:
            here = limit.to(gradient.device) if isinstance(limit, Tensor) else limit
            gradient.clamp_(-here, here)


Trace = tuple[Callable[[], Tensor | None], int, int]


def trace(optimizer: Optimizer) -> Trace:
    """What tells later whether the gradients are as they were left.

    It does not keep them alive, which would hold their memory after a step that raised.
    """
    now = _present(optimizer)
    first = weakref.ref(now[0]) if now else _nothing
    return first, len(now), sum(gradient._version for gradient in now)


def untouched_since(left: Trace, optimizer: Optimizer) -> bool:
    """Whether there are gradients, and none was made or changed since."""
    now, (first, count, versions) = _present(optimizer), left
    if not now or first() is not now[0] or count != len(now):
        return False
    return versions == sum(gradient._version for gradient in now)


def _nothing() -> None:
    return None


def _present(optimizer: Optimizer) -> list[Tensor]:
    every = (param.grad for group in optimizer.param_groups for param in group["params"])
    return [gradient for gradient in every if gradient is not None]


def _alike(gradients: list[Tensor]) -> bool:
    """Whether these are plain tensors of one kind in one place, as in most models."""
    device, dtype = gradients[0].device, gradients[0].dtype
    return all(type(g) is Tensor and g.dtype == dtype and g.device == device for g in gradients)


def _norm(gradients: list[Tensor]) -> Tensor:
    if not _alike(gradients):
        return get_total_norm(gradients)
    # The same operations without the search for kinds and places, which would cost as much.
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def _largest_entry(gradients: list[Tensor]) -> Tensor:
    plain = all(type(gradient) is Tensor and gradient.is_cpu for gradient in gradients)
    if not plain:
        return get_total_norm(gradients, math.inf)
    # On the CPU torch's infinity norm takes thirty times as long as this.
    ends = [end for gradient in gradients for end in torch.aminmax(gradient)]
    return torch.stack(ends).abs().max()


def _whole(norm: Any) -> Tensor:
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def whole_and_largest(sizes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The size of the whole step, over several groups the norm of their norms, and the largest."""
    if len(sizes) == 1:
        return sizes[0], sizes[0]
    together = torch.stack([size.to(sizes[0].device) for size in sizes])
    return torch.linalg.vector_norm(together), together.max()


def multiply_(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiplies in place, on each device by a copy of the factor that lies there."""
    if _alike(gradients) and gradients[0].device == factor.device:
        torch._foreach_mul_(gradients, factor)
        return
    there: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        there.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, _), those in there.items():
        here = factor.to(device)
        if all(type(gradient) is Tensor for gradient in those):
            torch._foreach_mul_(those, here)
        else:
            for gradient in those:  # kinds such as DTensor do not all know the fast form
                gradient.mul_(here)


def _factor(size: Tensor, bound: float | Tensor) -> Tensor:
    if isinstance(bound, Tensor):
        bound = bound.to(size.device, size.dtype)
    return (size + EPSILON).reciprocal_().mul_(bound).clamp_(max=1.0)


def _is_seen_to_be_one(factor: Tensor) -> bool:
    """Whether nothing is to be done, where that can be told without waiting for a device.

    On the CPU the number lies there to be read; a pass over all gradients that multiplies them
    by 1 costs as much as their norm. Elsewhere they are always multiplied.
    """
    plain = (
        type(factor) is Tensor and factor.is_cpu and factor.dtype in (torch.float32, torch.float64)
    )
    return plain and factor.numpy().item() == 1.0


def _entries(params: Iterable[Any]) -> Iterable[Tensor]:
    for param in params:
        gradient = param.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            if not gradient.is_coalesced():
                param.grad = gradient = gradient.coalesce()
            gradient = gradient.values()
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient)
        if gradient.numel():
            yield gradient
