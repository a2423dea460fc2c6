"""The untouched models: six recurrences behind one embedding or input, and one linear head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Readout = Literal["last", "every"]
EMBEDDED = 16


class WrittenCell(nn.Module):
    """A gated recurrence as people write it: h' = z h + (1 - z) tanh(...), looped in Python."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = nn.Linear(inputs, 2 * hidden)
        self.recurrent = nn.Linear(hidden, 2 * hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden)
        states = []
        for step in self.input(x).unbind(1):
            keep, candidate = (step + self.recurrent(h)).chunk(2, -1)
            keep = torch.sigmoid(keep)
            h = keep * h + (1 - keep) * torch.tanh(candidate)
            states.append(h)
        return torch.stack(states, 1)


class WrittenReader(nn.Module):
    """The hand-written recurrence with a linear head."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int, readout: Readout, tokens: bool
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(inputs, EMBEDDED) if tokens else nn.Identity()
        self.cell = WrittenCell(EMBEDDED if tokens else inputs, hidden)
        self.head = nn.Linear(hidden, outputs)
        self.readout = readout

    def forward(self, x: Tensor) -> Tensor:
        out = self.cell(self.embedding(x))
        answer: Tensor = self.head(out[:, -1] if self.readout == "last" else out)
        return answer


class FusedReader(nn.Module):
    """One of torch's own recurrences with a linear head.

    readout: the answer after the last step or at every step. ahead: how many steps ahead the
    input lies that is asked for, which the backward direction must not have seen; 0 for none.
    """

    def __init__(
        self, rnn: nn.RNNBase, inputs: int, outputs: int, readout: Readout, tokens: bool, ahead: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(inputs, EMBEDDED) if tokens else nn.Identity()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), outputs)
        self.readout = readout
        self.ahead = ahead

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.rnn(self.embedding(x))
        if self.readout == "last":
            return self._answer(out[:, -1] if not self.rnn.bidirectional else _final(state))
        if self.ahead and self.rnn.bidirectional:
            forwards, backwards = out.chunk(2, -1)
            beyond = self.ahead + 1
            backwards = nn.functional.pad(backwards[:, beyond:], (0, 0, 0, beyond))
            out = torch.cat([forwards, backwards], -1)
        return self._answer(out)

    def _answer(self, out: Tensor) -> Tensor:
        answer: Tensor = self.head(out)
        return answer


def _final(state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    h = state[0] if isinstance(state, tuple) else state
    return torch.cat([h[-2], h[-1]], -1)


FUSED: dict[str, tuple[Callable[..., nn.RNNBase], dict[str, Any]]] = {
    "rnn": (nn.RNN, {}),
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "lstm x2": (nn.LSTM, {"num_layers": 2}),
    "bilstm": (nn.LSTM, {"bidirectional": True}),
}
MODELS = (*FUSED, "written")
"""Every model by name; names are for ever, since the results cite them."""


def built(
    model: str, *, inputs: int, outputs: int, hidden: int, readout: Readout, tokens: bool,
    ahead: int = 0,
) -> nn.Module:  # fmt: skip
    """An untouched model, its weights drawn from torch's global generator."""
    if model == "written":
        return WrittenReader(inputs, outputs, hidden, readout, tokens)
    kind, options = FUSED[model]
    rnn = kind(EMBEDDED if tokens else inputs, hidden, batch_first=True, **options)
    return FusedReader(rnn, inputs, outputs, readout, tokens, ahead)
