"""Activation and bound of a recurrence, as a child module without parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rnnguard.nn.sequences.activation import ACTIVATIONS


class Recurrence(nn.Module):
    """What a bounded cell does besides its weights.

    activation: one of tanh, relu, leaky_relu, elu; their slopes are at most 1, so that the bound
    on the weights is one on the gradient's gain per step.
    bound: above 0; infinite for none.
    """

    def __init__(self, activation: str, bound: float) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {[*ACTIVATIONS]}, got {activation!r}")
        if not bound > 0:
            raise ValueError(f"bound must be above 0, got {bound}")
        self.activation, self.bound = activation, float(bound)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, bound={self.bound:.6g}"


def chosen_activation(activation: str | None, sizes: tuple[Any, ...], options: Any) -> str:
    """For a class built by hand: what is asked for, as `nonlinearity` too, else relu.

    Sets `nonlinearity` to the nearer of torch's two, which is what others see of the cell.
    """
    asked = "relu" if activation is None else activation
    if activation is None and len(sizes) > 3:
        return str(sizes[3])
    if activation is None:
        asked = options.get("nonlinearity", asked)
    if len(sizes) <= 3:
        options.setdefault("nonlinearity", "tanh" if asked == "tanh" else "relu")
    return str(asked)


def within_entries(u: Tensor, bound: float) -> Tensor:
    """u clipped to [-bound, bound]; its gradient passes except where a descent would push out.

    What lies outside can thus come back in, as with the parameter clipping of Li et al. 2018,
    and stops there. The parameter itself is not written: a forward changes nothing.
    """
    clipped: Tensor = _Within.apply(u, bound)  # type: ignore[no-untyped-call]
    return clipped


class _Within(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, bound: float) -> Tensor:
        return u.clamp(-bound, bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        u, ctx.bound = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx: Any, into: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        outward = ((u > ctx.bound) & (into < 0)) | ((u < -ctx.bound) & (into > 0))
        return into.masked_fill(outward, 0), None

    @staticmethod
    def jvp(ctx: Any, along: Tensor, _: None) -> Tensor:
        return along


def within_norm(weight: Tensor, bound: float) -> Tensor:
    """weight scaled down to the spectral norm `bound`, or as it is where it lies within.

    Differentiable, exactly. By the largest eigenvalue of W^T W, which costs half of what singular
    values do.
    """
    if bound == float("inf"):
        return weight
    held = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with torch.autocast(weight.device.type, enabled=False):
        largest = torch.linalg.eigvalsh(held.t() @ held)[-1] / bound**2
    # Clamped before the root: a norm of 0 has no slope, and within the bound the factor is 1.
    scaled: Tensor = held * largest.clamp_min(1).rsqrt()
    return scaled.to(weight.dtype)
