"""A plain recurrence with a weighted residual: h_t = carry h_{t-1} + scale phi(a_t).

Kusupati et al. 2018, FastRNN (arXiv 1901.02358), equation 1: with carry + scale = 1 a step is a
leak towards phi(a), and a recurrent matrix of norm 1 or less cannot make the state or its
gradient grow. carry and scale are free here, one of each per unit, so that carry 0 and scale 1
are torch's own cell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rnnguard.nn.sequences.elman import elman_sequence
from rnnguard.nn.stack import Lane, Stack, suffixes
from rnnguard.nn.time_scales import octaves


class Residual(nn.Module):
    """carry and scale (H,), starting as leaks of 1 to `memory` steps.

    Units start at time scales tau spread over the octaves: carry 1 - 1/tau and scale 1/tau. The
    first is torch's own; the change is gentle, and some unit spans each lag up to `memory`.
    """

    def __init__(self, hidden_size: int, memory: float) -> None:
        super().__init__()
        self._tau = octaves(hidden_size, memory)
        self.carry = nn.Parameter(torch.empty(hidden_size))
        self.scale = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            scale = 1 / self._tau.to(self.scale)
            nn.init.zeros_(self.scale).add_(scale)
            nn.init.ones_(self.carry).sub_(scale)


def residual_parts(module: nn.RNNBase, *, memory: float = 20.0) -> dict[str, nn.Module]:
    """The children of a ResidualRNN: `residual_l0`, `residual_l0_reverse` and so on.

    memory: the longest time scale at the start, in steps; by default about that of FastRNN's
    own start, carry sigma(3).
    """
    made = module.hidden_size, memory
    return {f"residual_{suffix}": Residual(*made) for suffix in suffixes(module)}


class ResidualRNN(Stack, nn.RNN):
    """nn.RNN with h_t = carry h_{t-1} + scale phi(a_t); same weights and keys, plus `residual_l*`.

    memory: the longest time scale at the start, in steps.
    """

    def __init__(self, *sizes: Any, memory: float = 20.0, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.take(residual_parts(self, memory=memory))

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        part = self.get_submodule(f"residual_{lane.suffix}")
        assert isinstance(part, Residual)
        return elman_sequence(
            lane.x,
            lane.states[0],
            lane.rows(),
            self.nonlinearity,
            carry=part.carry,
            scale=part.scale,
            kept=lane.over,
        )
