"""Hand-written recurrences by the shape of what they carry and who carries it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.specimen import drawn, floats, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class Update(nn.Module):
    """An LSTM step on cat(x, h)."""

    def __init__(self, size: int = FEATURES) -> None:
        super().__init__()
        self.lin = nn.Linear(size + HIDDEN, 4 * HIDDEN)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = self.lin(torch.cat([x, h], -1)).chunk(4, -1)
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Update()

    def forward(self, x: Tensor) -> Tensor:
        carry = {"h": torch.zeros(x.size(1), HIDDEN), "c": torch.zeros(x.size(1), HIDDEN)}
        out = []
        for x_t in x:
            carry["h"], carry["c"] = self.cell(x_t, **carry)
            out.append(carry["h"])
        return torch.stack(out)


class Memory(NamedTuple):
    hidden: Tensor
    cell: Tensor


class NamedTuples(nn.Module):
    """Layers inside time, a list of named tuples; returned as well."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([Update(), Update(HIDDEN)])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Memory]]:
        zero = torch.zeros(x.size(1), HIDDEN)
        memories, out = [Memory(zero, zero) for _ in self.cells], []
        for x_t in x:
            for n, cell in enumerate(self.cells):
                memories[n] = Memory(*cell(x_t, memories[n].hidden, memories[n].cell))
                x_t = memories[n].hidden
            out.append(x_t)
        return torch.stack(out), memories


@dataclass
class Agent:
    belief: Tensor
    slow: Tensor
    seen: list[Tensor] = field(default_factory=list)


class DataClass(nn.Module):
    """A mutable object with two states on two time scales."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.Linear(FEATURES + 2 * HIDDEN, HIDDEN)
        self.slow = nn.Linear(HIDDEN, HIDDEN)

    def observe(self, agent: Agent, x: Tensor) -> None:
        agent.belief = torch.tanh(self.fast(torch.cat([x, agent.belief, agent.slow], -1)))
        agent.slow = 0.9 * agent.slow + 0.1 * self.slow(agent.belief)
        agent.seen.append(agent.belief)

    def forward(self, x: Tensor) -> Tensor:
        agent = Agent(x.new_zeros(x.size(1), HIDDEN), x.new_zeros(x.size(1), HIDDEN))
        for x_t in x:
            self.observe(agent, x_t)
        return torch.stack(agent.seen)


class Attribute(nn.Module):
    """self.h moves in forward; detached between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.i2h, self.h2h = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.h: Tensor | None = None

    def step(self, x: Tensor) -> Tensor:
        self.h = torch.tanh(self.i2h(x) + self.h2h(self.h))
        return self.h

    def forward(self, x: Tensor) -> Tensor:
        self.h = torch.zeros(x.size(1), HIDDEN) if self.h is None else self.h.detach()
        return torch.stack([self.step(x_t) for x_t in x])


class KeptAttribute(Attribute):
    """The same without the cut: the second call hangs on the first one's graph."""

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros(x.size(1), HIDDEN)
        return torch.stack([self.step(x_t) for x_t in x])


class BufferState(nn.Module):
    """The state is a buffer without its graph, so that nothing passes between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.rec = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("state", torch.zeros(BATCH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for x_t in x:
            h = torch.tanh(self.lin(x_t) + self.rec(self.state.clone()))
            self.state.copy_(h.detach())
            out.append(h)
        return torch.stack(out)


class SideBySide(nn.Module):
    """h and c in one tensor, batch first, given from outside or made here."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Update()

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = x.new_zeros(x.size(0), 2 * HIDDEN)
        out = []
        for t in range(x.size(1)):
            h, c = state.split(HIDDEN, dim=-1)
            state = torch.cat(self.cell(x[:, t], h, c), dim=-1)
            out.append(state[:, :HIDDEN])
        return torch.stack(out, 1), state


class StackedTensor(nn.Module):
    """The states of all layers in one tensor (layers, batch, hidden)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)])
        self.recur = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        hidden, out = torch.zeros(2, x.size(1), HIDDEN), []
        for x_t in x:
            new = []
            for layer in range(2):
                x_t = torch.tanh(self.inner[layer](x_t) + self.recur[layer](hidden[layer]))
                new.append(x_t)
            hidden = torch.stack(new)
            out.append(hidden[-1])
        return torch.stack(out)


class Layer(nn.Module):
    """A whole layer over time, from either end."""

    def __init__(self, size: int, reverse: bool = False) -> None:
        super().__init__()
        self.w_ih = nn.Parameter(torch.randn(HIDDEN, size) * 0.3)
        self.w_hh = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.3)
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        x = x.flip(0) if self.reverse else x
        h, out = x.new_zeros(x.size(1), HIDDEN), []
        for x_t in x:
            h = torch.tanh(x_t @ self.w_ih.t() + h @ self.w_hh.t())
            out.append(h)
        result = torch.stack(out)
        return result.flip(0) if self.reverse else result


class TimeInsideLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(FEATURES), nn.LayerNorm(HIDDEN), Layer(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = Layer(FEATURES), Layer(FEATURES, reverse=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.there(x), self.back(x)], -1)


class OwnLSTMCell(nn.LSTMCell):
    """torch's parameters, but layer norm inside: forward is the user's."""

    def __init__(self) -> None:
        super().__init__(FEATURES, HIDDEN)
        self.ln = nn.LayerNorm(4 * HIDDEN)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        gates = x @ self.weight_ih.t() + hx[0] @ self.weight_hh.t() + self.bias_ih + self.bias_hh
        i, f, g, o = self.ln(gates).chunk(4, 1)
        c = f.sigmoid() * hx[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class OwnBase(nn.RNNBase):
    """Derived from RNNBase for its parameters alone; no native call is ever made."""

    def __init__(self) -> None:
        super().__init__("GRU", FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = self.all_weights[0]
        h, out = x.new_zeros(x.size(1), HIDDEN), []
        for x_t in x:
            xr, xz, xn = nn.functional.linear(x_t, w_ih, b_ih).chunk(3, 1)
            hr, hz, hn = nn.functional.linear(h, w_hh, b_hh).chunk(3, 1)
            z = torch.sigmoid(xz + hz)
            h = z * h + (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
            out.append(h)
        return torch.stack(out)


class CellUser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = OwnLSTMCell()

    def forward(self, x: Tensor) -> Tensor:
        states = [(torch.zeros(x.size(1), HIDDEN), torch.zeros(x.size(1), HIDDEN))]
        for x_t in x:
            states.append(self.cell(x_t, states[-1]))
        return torch.stack([h for h, _ in states[1:]])


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))
LIN = ("cell.lin.weight",)

SPECIMENS = (
    written("state-dict", Dictionary, TIME_MAJOR, 11, LIN, "carry['h'], carry['c']"),
    written(
        "state-named-tuples", NamedTuples, TIME_MAJOR, 11,
        ("cells.0.lin.weight", "cells.1.lin.weight"), "list of pairs, layers in time", sites=2,
    ),
    written(
        "state-dataclass", DataClass, TIME_MAJOR, 11, ("fast.weight", "slow.weight"),
        "two time scales in a mutable object",
    ),
    written("state-attribute", Attribute, TIME_MAJOR, 11, ("h2h.weight",), "self.h, cut between"),
    written("state-kept", KeptAttribute, TIME_MAJOR, 11, ("h2h.weight",), "self.h with its graph"),
    written(
        "state-buffer", BufferState, TIME_MAJOR, 11, ("rec.weight",), "copied into a buffer",
        window=1,
    ),
    written(
        "state-side-by-side", SideBySide, drawn(floats(BATCH, 9, FEATURES)), 9, LIN,
        "h and c in one tensor",
    ),
    written(
        "state-stacked", StackedTensor, TIME_MAJOR, 11, ("recur.0.weight", "recur.1.weight"),
        "(layers, batch, hidden)", sites=2,
    ),
    written(
        "time-inside-layers", TimeInsideLayers, TIME_MAJOR, 11, ("layers.0.w_hh", "layers.2.w_hh"),
        "layer after layer", sites=2,
    ),
    written(
        "both-ways", Bidirectional, TIME_MAJOR, 11, ("there.w_hh", "back.w_hh"), "flip by hand",
        sites=2, causal=False,
    ),
    written("own-lstmcell", CellUser, TIME_MAJOR, 11, ("cell.weight_hh",), "subclass of LSTMCell"),
    written("own-rnnbase", OwnBase, TIME_MAJOR, 11, ("weight_hh_l0",), "subclass of RNNBase"),
)  # fmt: skip
