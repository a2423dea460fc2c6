"""Recurrences whose step is scripted, checkpointed, parametrised, generated or mixed."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.utils.checkpoint import checkpoint

from zoo.specimen import drawn, floats, native, tokens, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


def ugrnn_step(x: Tensor, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """An update gate RNN step without any module."""
    z, n = torch.mm(torch.cat([x, h], 1), w).add(b).chunk(2, 1)
    z = torch.sigmoid(z)
    return z * h + (1 - z) * torch.tanh(n)


class Scripted(nn.Module):
    """The step is compiled by TorchScript, the loop is not."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(FEATURES + HIDDEN, 2 * HIDDEN) * 0.3)
        self.b = nn.Parameter(torch.zeros(2 * HIDDEN))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # still common in public code
            self.step = torch.jit.script(ugrnn_step)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            h = self.step(x_t, h, self.w, self.b)
            out.append(h)
        return torch.stack(out)


class Checkpointed(nn.Module):
    """Each step is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(FEATURES + HIDDEN, HIDDEN)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.lin(torch.cat([x, h], 1)))

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            h = checkpoint(self.step, x_t, h, use_reentrant=False)
            out.append(h)
        return torch.stack(out)


class WeightNormed(nn.Module):
    """The recurrent Linear is parametrised by direction and length."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h = nn.Linear(FEATURES, HIDDEN)
        self.h2h = weight_norm(nn.Linear(HIDDEN, HIDDEN, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            h = torch.tanh(self.x2h(x_t) + self.h2h(h))
            out.append(h)
        return torch.stack(out)


class OrthogonalCell(nn.Module):
    """An RNNCell whose recurrent weight is kept orthogonal."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = orthogonal(nn.RNNCell(FEATURES, HIDDEN), "weight_hh")

    def forward(self, x: Tensor) -> Tensor:
        h, out = None, []
        for x_t in x:
            h = self.cell(x_t, h)
            out.append(h)
        return torch.stack(out)


class FunctionalCall(nn.Module):
    """A GRUCell called with parameters handed in, as meta-learners do."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: 0.9 * value for name, value in self.cell.named_parameters()}
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            h = functional_call(self.cell, weights, (x_t, h))
            out.append(h)
        return torch.stack(out)


class NativeFunction(nn.Module):
    """torch.gru_cell on parameters of one's own; no module of torch's is held."""

    def __init__(self) -> None:
        super().__init__()
        self.w_ih = nn.Parameter(torch.randn(3 * HIDDEN, FEATURES) * 0.3)
        self.w_hh = nn.Parameter(torch.randn(3 * HIDDEN, HIDDEN) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            h = torch.gru_cell(x_t, h, self.w_ih, self.w_hh)
            out.append(h)
        return torch.stack(out)


class Dropped(nn.RNNCellBase):
    """LSTM with dropout on the candidate only; RNNCellBase for its parameters."""

    def __init__(self) -> None:
        super().__init__(FEATURES, HIDDEN, bias=True, num_chunks=4)

    def forward(self, x: Tensor) -> Tensor:
        h, c, out = torch.zeros(x.size(1), HIDDEN), torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            gates = nn.functional.linear(x_t, self.weight_ih, self.bias_ih)
            gates = gates + nn.functional.linear(h, self.weight_hh, self.bias_hh)
            i, f, g, o = gates.unflatten(1, (4, -1)).unbind(1)
            g = nn.functional.dropout(g.tanh(), 0.2, self.training)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * g
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return torch.stack(out)


class Hyper(nn.Module):
    """A small recurrence makes the scales of the recurrent weights of a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(FEATURES + HIDDEN + 6, 6)
        self.scale = nn.Linear(6, HIDDEN)
        self.x2h, self.h2h = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, s, out = torch.zeros(x.size(1), HIDDEN), torch.zeros(x.size(1), 6), []
        for x_t in x:
            s = torch.tanh(self.small(torch.cat([x_t, h, s], 1)))
            h = torch.tanh(self.x2h(x_t) + self.scale(s) * self.h2h(h))
            out.append(h)
        return torch.stack(out)


class ChannelsFirst(nn.Module):
    """Time is the last axis, as behind a convolution; a residual step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(FEATURES, HIDDEN, 1)
        self.recur = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        h, out = torch.zeros(x.size(0), HIDDEN), []
        for t in range(x.size(-1)):
            h = h + 0.3 * torch.tanh(self.recur(h) + x[..., t])
            out.append(h)
        return torch.stack(out, dim=-1)


class ListOfSteps(nn.Module):
    """The input is a list with one tensor per step; so is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.i2h, self.h2h = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, frames: list[Tensor]) -> list[Tensor]:
        h, out = None, []
        for frame in frames:
            h = self.i2h(frame) if h is None else torch.tanh(self.i2h(frame) + self.h2h(h))
            out.append(h)
        return out


class HalfNative(nn.Module):
    """A fused encoder, a decoder by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, FEATURES)
        self.encoder = nn.GRU(FEATURES, HIDDEN, batch_first=True)
        self.word, self.state = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h, out = self.encoder(self.embed(source))[1][0], []
        for word in self.embed(target).unbind(1):
            h = torch.tanh(self.word(word) + self.state(h))
            out.append(h)
        return torch.stack(out, 1)


class ThenRounds(nn.Module):
    """Time first, by a fused GRU for each node; then four rounds of messages."""

    def __init__(self) -> None:
        super().__init__()
        self.over_time = nn.GRU(FEATURES, HIDDEN)
        self.message = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("adjacency", torch.eye(BATCH).roll(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.over_time(x)[1][0]
        for _ in range(4):
            h = torch.tanh(h + self.adjacency @ self.message(h))
        return h


class Dialogue(nn.Module):
    """Words inside turns inside a dialogue, both loops by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, FEATURES)
        self.word = nn.Linear(FEATURES + HIDDEN, HIDDEN)
        self.turn = nn.Linear(2 * HIDDEN, HIDDEN)

    def read(self, words: Tensor) -> Tensor:
        h = torch.zeros(words.size(0), HIDDEN)
        for word in self.embed(words).unbind(1):
            h = torch.tanh(self.word(torch.cat([word, h], 1)))
        return h

    def forward(self, turns: Tensor) -> Tensor:
        context, out = torch.zeros(turns.size(0), HIDDEN), []
        for turn in turns.unbind(1):
            context = torch.tanh(self.turn(torch.cat([self.read(turn), context], 1)))
            out.append(context)
        return torch.stack(out, 1)


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))
H2H = ("h2h.weight",)
NORMED = tuple(f"h2h.parametrizations.weight.original{n}" for n in (0, 1))
PAIR = drawn(tokens(BATCH, 9, below=20), tokens(BATCH, 9, below=20))

SPECIMENS = (
    written("scripted-step", Scripted, TIME_MAJOR, 11, ("w",), "torch.jit.script on the step"),
    written("checkpointed", Checkpointed, TIME_MAJOR, 11, ("lin.weight",), "steps run twice"),
    written("weight-norm", WeightNormed, TIME_MAJOR, 11, NORMED, "parametrised h2h"),
    native("rnncell-orthogonal", OrthogonalCell, TIME_MAJOR, 11, "parametrised weight_hh"),
    native("grucell-functional-call", FunctionalCall, TIME_MAJOR, 11, "weights handed in"),
    native("gru-cell-function", NativeFunction, TIME_MAJOR, 11, "torch.gru_cell, no bias"),
    written("recurrent-dropout", Dropped, TIME_MAJOR, 11, ("weight_hh",), "subclass RNNCellBase"),
    written(
        "hyper", Hyper, TIME_MAJOR, 11, ("h2h.weight", "scale.weight", "small.weight"),
        "one recurrence scales the weights of another; both move in one loop", sites=2,
    ),
    written(
        "channels-first", ChannelsFirst, drawn(floats(BATCH, FEATURES, 9)), 9, ("recur.weight",),
        "time is the last axis; residual",
    ),
    written(
        "list-of-steps", ListOfSteps,
        drawn(lambda g: [floats(BATCH, FEATURES)(g) for _ in range(9)]), 9, H2H,
        "no tensor has an axis of time", causal=False,
    ),
    written(
        "half-native", HalfNative, PAIR, 9, ("state.weight",), "fused encoder, written decoder",
        sites=2, causal=False,
    ),
    native("time-then-rounds", ThenRounds, TIME_MAJOR, 11, "a GRU, then messages", causal=False),
    written(
        "dialogue", Dialogue, drawn(tokens(BATCH, 4, 9, below=20)), 9,
        ("word.weight", "turn.weight"), "nine words in each of four turns", sites=2, causal=False,
    ),
)  # fmt: skip
