"""A GRU whose reset gate acts on the output: c_t = z c_{t-1} + (1 - z) n, h_t = r c_t.

The state c runs past no matrix and no reset gate from step to step, which torch's cannot; h is
what the gates and the next layer see. Weights are torch's own, rows r, z, n, and z keeps as in
nn.GRU, so that a keep bias means the same in both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from rnnguard.inspection.gates import GATES
from rnnguard.nn.sequences.gate_last import gate_last_sequence
from rnnguard.nn.sequences.parts import GRUWeights, Kept
from rnnguard.nn.stack import Lane, Stack
from rnnguard.probe.stepping import State


class GateLastGRU(Stack, nn.GRU):
    """nn.GRU with the reset gate on the output; same weights and keys.

    Called as nn.GRU: `output, h_n = gru(input, h_0)`, where c starts as h_0. h_n alone cannot
    tell c; to carry the whole state from window to window, give a pair and a pair comes back:
    `output, (h_n, c_n) = gru(input, (h_0, c_0))`.
    """

    def takes_pair(self, hx: Any) -> bool:
        return isinstance(hx, tuple)

    def starting(self, state: State) -> State:
        return state[0], state[-1]

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        h, c = lane.states[0], lane.states[-1]
        y, *last = gate_last_sequence(
            lane.x, h, c, self._keeping(lane.rows()), Kept(lane.over, lane.over)
        )
        return y, *last[: len(lane.states)]

    def gates(self, lane: Lane) -> dict[str, Tensor]:
        held, h = lane.rows(), lane.states[0]
        sums = linear(lane.x[0], held.ih, held.bias_ih) + linear(h, held.hh, held.bias_hh)
        r, z, n = sums.chunk(3, -1)
        return {"r": r.sigmoid(), "z": z.sigmoid(), "n": n.tanh()}

    def _keeping(self, rows: GRUWeights) -> GRUWeights:
        """The weights for a sequence whose z writes: sigma(-a) is 1 - sigma(a)."""
        sign = rows.hh.new_ones(len(rows.hh), 1)
        sign[GATES["gru"].block("z", self.hidden_size)] = -1
        biases = (None if b is None else b * sign[:, 0] for b in (rows.bias_ih, rows.bias_hh))
        return GRUWeights(rows.ih * sign, rows.hh * sign, *biases)
