"""The recurrent models of the benchmark: one module, described by a `Setting`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Kind = Literal["lstm", "gru", "tanh", "relu"]
Start = Literal["default", "chrono", "orthogonal", "identity", "gaussian"]
Readout = Literal["last", "every", "attention"]
# Which block of the stacked gates keeps the state; torch orders them i, f, g, o and r, z, n.
KEEP_BLOCK = {"lstm": 1, "gru": 1}
BLOCKS = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


@dataclass(frozen=True)
class Setting:
    """A model, its start and its training, before or after a mutation.

    memory: steps that the task needs, which sets the chrono dose. keep_bias: total bias of
    the keep gate, in bias_ih alone; doubled_bias: the value that stands in both bias vectors.
    window: steps between two detached states inside one forward. input_scale multiplies
    real inputs; length multiplies the sequence length that the task's data are drawn at, where
    the data are resizable.
    """

    cell: Kind
    inputs: int
    outputs: int
    memory: int
    hidden: int = 32
    layers: int = 1
    bidirectional: bool = False
    readout: Readout = "last"
    packed: bool = False
    embedded: bool = False
    stateful: bool = False
    start: Start = "default"
    optimizer: Literal["adam", "sgd"] = "adam"
    rate: float = 3e-3
    clip: float | None = 1.0
    steps: int = 250
    resizable: bool = True

    gain: float = 1.0
    keep_bias: float | None = None
    doubled_bias: float | None = None
    wrong_sign: bool = False
    window: int | None = None
    attached: bool = False
    half: bool = False
    input_scale: float = 1.0
    length: float = 1.0

    @property
    def gated(self) -> bool:
        """Whether the cell has a keep gate."""
        return self.cell in KEEP_BLOCK


class SequenceModel(nn.Module):
    """Embedding if the inputs are tokens, a recurrence, and a linear head."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        width = 16 if setting.embedded else setting.inputs
        self.embedding = nn.Embedding(setting.inputs, width) if setting.embedded else nn.Identity()
        self.rnn = _recurrence(setting, width)
        wide = setting.hidden * (2 if setting.bidirectional else 1)
        self.attention = nn.Linear(wide, 1) if setting.readout == "attention" else None
        self.head = nn.Linear(wide, setting.outputs)
        self.state: tuple[Tensor, ...] | Tensor | None = None
        start_(self.rnn, setting)
        if setting.half:
            self.half()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        embedded = self.embedding(x if self.setting.embedded else x.to(self.head.weight.dtype))
        out = self.outputs(embedded, lengths)
        if self.setting.readout == "every":
            return self._logits(out)
        if self.attention is not None:
            out = (self.attention(out).softmax(1) * out).sum(1)
        elif lengths is not None:
            out = out[torch.arange(len(out)), lengths - 1]
        else:
            out = out[:, -1]
        return self._logits(out)

    def _logits(self, out: Tensor) -> Tensor:
        logits: Tensor = self.head(out)
        # A loss in half precision would be a fault of its own.
        return logits.float()

    def outputs(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """The recurrence's outputs over all steps, with what the setting detaches detached."""
        setting = self.setting
        out: Tensor
        if setting.packed:
            assert lengths is not None
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return out
        if setting.stateful:
            out, state = self.rnn(x, self.state)
            self.state = state if setting.attached else detached(state)
            return out
        if setting.window is None:
            out, _ = self.rnn(x)
            return out
        state, pieces = None, []
        for piece in torch.split(x, setting.window, 1):
            out, state = self.rnn(piece, state)
            state = detached(state)
            pieces.append(out)
        return torch.cat(pieces, 1)


def detached(state: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The same state without its history."""
    if isinstance(state, Tensor):
        return state.detach()
    return tuple(part.detach() for part in state)


def _recurrence(setting: Setting, width: int) -> nn.RNNBase:
    shape = (width, setting.hidden, setting.layers)
    two = setting.bidirectional
    if setting.cell == "lstm":
        return nn.LSTM(*shape, batch_first=True, bidirectional=two)
    if setting.cell == "gru":
        return nn.GRU(*shape, batch_first=True, bidirectional=two)
    return nn.RNN(*shape, nonlinearity=setting.cell, batch_first=True, bidirectional=two)


@torch.no_grad()
def start_(rnn: nn.RNNBase, setting: Setting) -> None:
    """Draws the start that the setting names, then applies its mutations to it."""
    blocks = BLOCKS[setting.cell]
    for suffix in _suffixes(rnn):
        weight = getattr(rnn, f"weight_hh{suffix}")
        for block in weight.chunk(blocks):
            if setting.start == "orthogonal":
                block.copy_(torch.nn.init.orthogonal_(torch.empty_like(block)))
            elif setting.start == "identity":
                block.copy_(torch.eye(setting.hidden))
            elif setting.start == "gaussian":
                block.normal_(0, 1.4 / setting.hidden**0.5)
        weight.mul_(setting.gain)
        _start_biases_(rnn, suffix, setting, blocks)


def _start_biases_(rnn: nn.RNNBase, suffix: str, setting: Setting, blocks: int) -> None:
    first, second = (getattr(rnn, f"{name}{suffix}") for name in ("bias_ih", "bias_hh"))
    if setting.start == "identity":
        first.zero_()
        second.zero_()
    if not setting.gated:
        return
    keep, other = (bias.chunk(blocks)[KEEP_BLOCK[setting.cell]] for bias in (first, second))
    if setting.start == "chrono":
        first.zero_()
        second.zero_()
        keep.uniform_(1, max(setting.memory - 1, 2)).log_()
        if setting.wrong_sign:
            keep.neg_()
        if setting.cell == "lstm":
            first.chunk(blocks)[0].copy_(-keep)
    if setting.keep_bias is not None:
        keep.fill_(setting.keep_bias)
        other.zero_()
        if setting.start == "chrono" and setting.cell == "lstm":
            first.chunk(blocks)[0].zero_()
    if setting.doubled_bias is not None:
        keep.fill_(setting.doubled_bias)
        other.fill_(setting.doubled_bias)


def _suffixes(rnn: nn.RNNBase) -> list[str]:
    return [n.removeprefix("weight_hh") for n, _ in rnn.named_parameters() if "weight_hh" in n]
