"""Time scales spread over the units of a layer, without chance, so that a morph is repeatable."""

from __future__ import annotations

import torch
from torch import Tensor


def chrono(size: int, memory: float) -> Tensor:
    """Keep biases log tau (size,), tau even over 1 to memory - 1 steps; ValueError below 3.

    Tallec and Ollivier 2018 (arXiv 1804.11188), equation 16: b ~ log U(1, T_max - 1).
    """
    if memory < 3:
        raise ValueError(f"memory must be at least 3 steps, got {memory}")
    shares = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return (1 + (memory - 2) * shares).log().float()


def octaves(size: int, memory: float) -> Tensor:
    """Time scales tau (size,), even over the logarithm from 1 to memory steps."""
    if memory < 1:
        raise ValueError(f"memory must be at least 1 step, got {memory}")
    shares = torch.linspace(0, 1, size, dtype=torch.float64)
    return (memory**shares).float()


def share_of_gain(memory: float | None, layers: int) -> float:
    """The bound of one layer's gain per step: 2 in all over `memory` steps and all layers.

    Li et al. 2018 (arXiv 1803.04831), section 3.2, bound one layer by 2^(1/T); gains multiply
    over layers. 1 where no memory is given.
    """
    if memory is None:
        return 1.0
    if memory < 1:
        raise ValueError(f"memory must be at least 1 step, got {memory}")
    return float(2 ** (1 / (memory * layers)))
