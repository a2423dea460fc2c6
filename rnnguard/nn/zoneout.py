"""Zoneout: at each step of training, some units keep their old state.

Krueger et al. 2017 (arXiv 1606.01305): s_t = s_{t-1} where a mask drawn with probability p says
so, else the new state; outside of training every unit takes the expectation,
s_t = p s_{t-1} + (1 - p) s_new. One mask per step, unit and sequence, the same in the forward
and the backward pass. Without parameters: keys are torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rnnguard.nn.sequences.gru import gru_gates, gru_sequence
from rnnguard.nn.sequences.lstm import lstm_gates, lstm_sequence
from rnnguard.nn.sequences.parts import Kept
from rnnguard.nn.stack import Lane, Stack


class Zoneout(nn.Module):
    """The probabilities with which a unit's output and cell keep their old value at a step."""

    def __init__(self, hidden: float, cell: float = 0.0) -> None:
        super().__init__()
        for name, p in (("hidden", hidden), ("cell", cell)):
            if not 0 <= p <= 1:
                raise ValueError(f"zoneout of {name} must be in [0, 1], got {p}")
        self.hidden, self.cell = float(hidden), float(cell)

    def of_hidden(self, lane: Lane) -> Tensor | None:
        """Shares of h that stay (T, B, P or 1), those of ended sequences among them."""
        return self._kept(lane, self.hidden, lane.states[0])

    def of_cell(self, lane: Lane) -> Tensor | None:
        """Shares of c that stay (T, B, H or 1), those of ended sequences among them."""
        return self._kept(lane, self.cell, lane.states[1])

    def _kept(self, lane: Lane, p: float, state: Tensor) -> Tensor | None:
        if p == 0:
            return lane.over
        rows = lane.x.shape[:2]
        if self.training:
            kept = torch.full((*rows, state.shape[-1]), p, device=lane.x.device).bernoulli()
            kept = kept.to(lane.x.dtype)
        else:
            kept = lane.x.new_full((*rows, 1), p)
        return kept if lane.over is None else torch.maximum(kept, lane.over)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, cell={self.cell}"


class _ZonedOut(Stack):
    zoneout: Zoneout


class ZoneoutLSTM(_ZonedOut, nn.LSTM):
    """nn.LSTM with zoneout on output and cell; same weights and keys.

    zoneout_hidden, zoneout_cell: the probabilities, by default those of the paper on characters.
    """

    def __init__(
        self,
        *sizes: Any,
        zoneout_hidden: float = 0.05,
        zoneout_cell: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(*sizes, **options)
        self.take({"zoneout": Zoneout(zoneout_hidden, zoneout_cell)})

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        h, c = lane.states
        kept = Kept(self.zoneout.of_hidden(lane), self.zoneout.of_cell(lane))
        return lstm_sequence(lane.x, h, c, lane.lstm(), None, kept)

    def gates(self, lane: Lane) -> dict[str, Tensor]:
        return lstm_gates(lane.x[0], lane.states[0], lane.lstm())


class ZoneoutGRU(_ZonedOut, nn.GRU):
    """nn.GRU with zoneout on its state; same weights and keys.

    zoneout_hidden: the probability.
    """

    def __init__(self, *sizes: Any, zoneout_hidden: float = 0.05, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.take({"zoneout": Zoneout(zoneout_hidden)})

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        kept = self.zoneout.of_hidden(lane)
        return gru_sequence(lane.x, lane.states[0], lane.rows(), None, kept)

    def gates(self, lane: Lane) -> dict[str, Tensor]:
        return gru_gates(lane.x[0], lane.states[0], lane.rows())


ZONEOUT_CELLS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: ZoneoutLSTM,
    nn.GRU: ZoneoutGRU,
}
