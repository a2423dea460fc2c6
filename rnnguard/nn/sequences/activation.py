"""The activations of plain recurrences, with their slope read off the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEAK = 0.01


@dataclass(frozen=True)
class Activation:
    """phi, the same in place, and phi'(a) as a new tensor, from phi(a)."""

    plain: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


# The slopes of NaN are torch's too: 1, and LEAK of the leaky one.
ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(torch.tanh, torch.tanh_, lambda y: complement_of_square(y)),
    "relu": Activation(torch.relu, torch.relu_, lambda y: (y <= 0).logical_not_().to(y.dtype)),
    "leaky_relu": Activation(
        lambda a: F.leaky_relu(a, LEAK),
        lambda a: F.leaky_relu_(a, LEAK),
        lambda y: torch.where(y > 0, torch.ones_like(y), LEAK),
    ),
    "elu": Activation(F.elu, F.elu_, lambda y: torch.where(y <= 0, y + 1, torch.ones_like(y))),
}


def complement_of_square(y: Tensor) -> Tensor:
    """1 - y^2, the slope of tanh."""
    return torch.addcmul(y.new_ones(()), y, y, value=-1)


def times_complement(y: Tensor) -> Tensor:
    """y (1 - y), the slope of sigma; y - y^2 would lose the digits of a gate near 1."""
    return (1 - y).mul_(y)
