"""LayerNorm inside the recurrence, in the form of Ba et al. 2016 (arXiv 1607.06450).

    LSTM   a = norm_x(W_ih x + b_ih) + norm_h(W_hh h + b_hh)        h = o tanh(norm_c(c))
    GRU    as torch's, of norm_x(W_ih x + b_ih) and norm_h(W_hh h + b_hh)
    RNN    h = phi(norm_x(W_ih x + b_ih) + norm_h(W_hh h + b_hh))

Each norm runs over all gates of a step at once. Where a sum is 0 its norm multiplies gradients by
1 / sqrt(eps), and a state of 0 under silent input stays 0: step by step that overflows. Three
things stand against it: eps is 1e-3, the biases stand inside the normalised sums, and the shift
of the candidate starts off 0, so that the state leaves 0 where the biases are 0 or absent. A bias
in a normalised sum is rescaled, so the offset of the keep gate lies in the norms' shift.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rnnguard.inspection.gates import GATES, cell_of
from rnnguard.nn.output_norm import EPSILON
from rnnguard.nn.sequences.elman import elman_sequence
from rnnguard.nn.sequences.gru import gru_gates, gru_sequence
from rnnguard.nn.sequences.lstm import lstm_gates, lstm_sequence
from rnnguard.nn.sequences.normed import norm as normed
from rnnguard.nn.sequences.parts import GateNorms, Kept, LSTMNorms
from rnnguard.nn.stack import Lane, Stack, suffixes
from rnnguard.nn.time_scales import chrono


class GateNorm(nn.Module):
    """Gains (n,) of the input's and of the recurrent norm, and the shift (n,) of their sum.

    active: False gives the plain sum, the cell of torch, for a comparison.
    """

    def __init__(self, start: Tensor, gain: float, eps: float) -> None:
        super().__init__()
        self.eps, self.active, self._start, self._gain = eps, True, start, gain
        self.gain_ih = nn.Parameter(torch.empty_like(start))
        self.gain_hh = nn.Parameter(torch.empty_like(start))
        self.shift = nn.Parameter(torch.empty_like(start))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain_ih, self._gain)
        nn.init.constant_(self.gain_hh, self._gain)
        with torch.no_grad():
            nn.init.zeros_(self.shift).add_(self._start.to(self.shift))

    def gate_norms(self) -> GateNorms | None:
        """What a sequence takes."""
        if not self.active:
            return None
        return GateNorms(self.gain_ih, self.gain_hh, self.shift, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self._start)}, eps={self.eps}" + ("" if self.active else ", active=False")


class GateAndCellNorm(GateNorm):
    """A GateNorm, and gain and shift (H,) of the norm through which an LSTM reads its cell."""

    def __init__(self, start: Tensor, gain: float, eps: float, hidden_size: int) -> None:
        super().__init__(start, gain, eps)
        self.gain_cell = nn.Parameter(torch.ones(hidden_size))
        self.shift_cell = nn.Parameter(torch.zeros(hidden_size))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # Not yet there at the first call, by the base class.
        if "gain_cell" in self._parameters:
            nn.init.ones_(self.gain_cell)
            nn.init.zeros_(self.shift_cell)

    def lstm_norms(self) -> LSTMNorms | None:
        """What a sequence takes."""
        gates = self.gate_norms()
        if gates is None:
            return None
        return LSTMNorms(*gates[:3], self.gain_cell, self.shift_cell, self.eps)


def layer_norm_parts(
    module: nn.RNNBase,
    *,
    forget: float = 1.0,
    memory: float | None = None,
    gain: float = 1.0,
    eps: float = EPSILON,
) -> dict[str, nn.Module]:
    """The children of a layer-normed cell: `norm_l0`, `norm_l0_reverse`, `norm_l1` and so on.

    forget: where the shift of the keep gate (f of the LSTM, z of the GRU) starts.
    memory: steps that the task needs; the shift then starts at the chrono dose (log tau, and
    -log tau on an LSTM's i) in place of `forget`.
    gain: where the gains of the gates' norms start.
    """
    if not (eps > 0 and math.isfinite(gain)):
        raise ValueError(f"eps must be above 0 and gain finite, got {eps} and {gain}")
    cell = cell_of(module)
    assert cell is not None
    gates, hidden = GATES[cell], module.hidden_size
    start = torch.zeros(len(gates.blocks) * hidden)
    # As far from 0 as torch draws its biases.
    start[gates.block(gates.candidate, hidden)] = torch.linspace(-1, 1, hidden) * hidden**-0.5
    if gates.keep is not None:
        kept = torch.full((hidden,), forget) if memory is None else chrono(hidden, memory)
        start[gates.block(gates.keep, hidden)] = kept
        if gates.write is not None and memory is not None:
            start[gates.block(gates.write, hidden)] = -kept
    return {
        f"norm_{suffix}": GateAndCellNorm(start, gain, eps, hidden)
        if gates.carries_cell_state
        else GateNorm(start, gain, eps)
        for suffix in suffixes(module)
    }


class _Normed(Stack):
    def norm_of(self, suffix: str) -> GateNorm:
        """The norm of a layer in a direction, such as `l0_reverse`."""
        norm = self.get_submodule(f"norm_{suffix}")
        assert isinstance(norm, GateNorm)
        return norm

    def drive(self, lane: Lane) -> Tensor:
        norms = self.norm_of(lane.suffix).gate_norms()
        driven = linear(lane.x, lane.weights.ih, lane.weights.bias_ih)
        return driven if norms is None else normed(driven, norms.gain_ih, norms.shift, norms.eps)


class _GatesNormed(_Normed):
    def __init__(
        self,
        *sizes: Any,
        forget: float = 1.0,
        memory: float | None = None,
        gain: float = 1.0,
        eps: float = EPSILON,
        **options: Any,
    ) -> None:
        super().__init__(*sizes, **options)
        self.take(layer_norm_parts(self, forget=forget, memory=memory, gain=gain, eps=eps))

    def keep_bias(self, suffix: str) -> Tensor | None:
        norm, cell = self.norm_of(suffix), cell_of(self)
        assert cell is not None
        gates = GATES[cell]
        if gates.keep is None or not norm.active:
            return None
        return norm.shift.detach()[gates.block(gates.keep, self.hidden_size)]


class LayerNormLSTM(_GatesNormed, nn.LSTM):
    """nn.LSTM with LayerNorm inside the recurrence; same weights and keys, plus `norm_l*`.

    Takes what nn.LSTM takes, and the options of `layer_norm_parts`. The raw cell is carried: the
    form of Ba et al. 2016, not that which carries the normalised cell and breaks the
    constant-error path.
    """

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        h, c = lane.states
        kept = Kept(lane.over, lane.over)
        return lstm_sequence(lane.x, h, c, lane.lstm(), self._norms(lane), kept)

    def gates(self, lane: Lane) -> dict[str, Tensor]:
        return lstm_gates(lane.x[0], lane.states[0], lane.lstm(), self._norms(lane))

    def _norms(self, lane: Lane) -> LSTMNorms | None:
        norm = self.norm_of(lane.suffix)
        assert isinstance(norm, GateAndCellNorm)
        return norm.lstm_norms()


class LayerNormGRU(_GatesNormed, nn.GRU):
    """nn.GRU with LayerNorm inside the recurrence; same weights and keys, plus `norm_l*`.

    Takes what nn.GRU takes, and the options of `layer_norm_parts`. The reset gate acts on the
    normalised recurrent sum, as torch's acts on the plain one.
    """

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        norms = self.norm_of(lane.suffix).gate_norms()
        return gru_sequence(lane.x, lane.states[0], lane.rows(), norms, lane.over)

    def gates(self, lane: Lane) -> dict[str, Tensor]:
        norms = self.norm_of(lane.suffix).gate_norms()
        return gru_gates(lane.x[0], lane.states[0], lane.rows(), norms)


class LayerNormRNN(_Normed, nn.RNN):
    """nn.RNN with LayerNorm inside the recurrence; same weights and keys, plus `norm_l*`.

    Takes what nn.RNN takes, and `gain` and `eps` of `layer_norm_parts`; it has no gate to shift.
    """

    def __init__(
        self, *sizes: Any, gain: float = 1.0, eps: float = EPSILON, **options: Any
    ) -> None:
        super().__init__(*sizes, **options)
        self.take(layer_norm_parts(self, gain=gain, eps=eps))

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        phi, norms = self.nonlinearity, self.norm_of(lane.suffix).gate_norms()
        return elman_sequence(lane.x, lane.states[0], lane.rows(), phi, norms, kept=lane.over)


LAYER_NORM_CELLS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: LayerNormRNN,
    nn.LSTM: LayerNormLSTM,
    nn.GRU: LayerNormGRU,
}
