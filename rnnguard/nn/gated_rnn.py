"""nn.RNN with an update gate, which still returns what nn.RNN returns.

    z = sigma(W_z x_t + U_z h_{t-1} + b_z)        h_t = h_{t-1} + z (phi(a_t) - h_{t-1})

The minimal gated unit without its reset (Zhou et al. 2016, arXiv 1603.09420; Ravanelli et al.
2018, arXiv 1803.10225). Unlike an nn.GRU put in its place it keeps torch's weights as the
candidate's, and the shape of the weights, keys and states. z = 1 is torch's own cell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rnnguard.nn.sequences.gated import gated_sequence
from rnnguard.nn.sequences.parts import GRUWeights
from rnnguard.nn.stack import Lane, Stack, suffixes
from rnnguard.nn.time_scales import chrono


class UpdateGate(nn.Module):
    """weight_ih (H, F), weight_hh (H, H) and bias (H,) of z; weights drawn as torch's are.

    The bias starts low, so that the unit remembers: at -log tau of the chrono dose for `memory`
    steps, or at `bias` where the memory needed is unknown.
    """

    def __init__(
        self, input_size: int, hidden_size: int, memory: float | None, bias: float
    ) -> None:
        super().__init__()
        low = torch.full((hidden_size,), bias)
        self._start = low if memory is None else -chrono(hidden_size, memory)
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reach = len(self._start) ** -0.5
        nn.init.uniform_(self.weight_ih, -reach, reach)
        nn.init.uniform_(self.weight_hh, -reach, reach)
        with torch.no_grad():
            nn.init.zeros_(self.bias).add_(self._start.to(self.bias))


def gated_parts(
    module: nn.RNNBase, *, memory: float | None = None, bias: float = -1.0
) -> dict[str, nn.Module]:
    """The children of a GatedRNN: `gate_l0`, `gate_l0_reverse`, `gate_l1` and so on.

    memory: steps that the task needs, at least 3. bias: where b_z starts without it.
    """
    made: dict[str, nn.Module] = {}
    for suffix in suffixes(module):
        weight = getattr(module, f"weight_ih_{suffix}")
        made[f"gate_{suffix}"] = UpdateGate(weight.shape[1], module.hidden_size, memory, bias)
    return made


class GatedRNN(Stack, nn.RNN):
    """nn.RNN with an update gate; same weights, keys and states, plus `gate_l*`.

    Takes what nn.RNN takes, and the options of `gated_parts`, `bias` there being `gate_bias`.
    """

    def __init__(
        self, *sizes: Any, memory: float | None = None, gate_bias: float = -1.0, **options: Any
    ) -> None:
        super().__init__(*sizes, **options)
        self.take(gated_parts(self, memory=memory, bias=gate_bias))

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        gate = self.get_submodule(f"gate_{lane.suffix}")
        assert isinstance(gate, UpdateGate)
        held = GRUWeights(gate.weight_ih, gate.weight_hh, gate.bias)
        phi = self.nonlinearity
        return gated_sequence(lane.x, lane.states[0], lane.rows(), held, phi, lane.over)
