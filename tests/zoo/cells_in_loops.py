"""torch's own cells, stepped by the user's loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.specimen import drawn, floats, mask, native, tokens

FEATURES, HIDDEN, BATCH = 5, 8, 3


class CellLoop(nn.Module):
    """An LSTMCell over time, batch first, from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(FEATURES, HIDDEN)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        h_t = torch.zeros(x.size(0), HIDDEN)
        c_t = torch.zeros(x.size(0), HIDDEN)
        outputs = []
        for input_t in x.split(1, dim=1):
            h_t, c_t = self.cell(input_t.squeeze(1), (h_t, c_t))
            outputs.append(self.head(h_t))
        return torch.stack(outputs, 1)


class SineCells(nn.Module):
    """Two stacked cells that first read a series and then continue it from their own output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm1 = nn.LSTMCell(1, HIDDEN)
        self.lstm2 = nn.LSTMCell(HIDDEN, HIDDEN)
        self.linear = nn.Linear(HIDDEN, 1)

    def forward(self, series: Tensor, future: int = 2) -> Tensor:
        outputs = []
        zero = torch.zeros(series.size(0), HIDDEN)
        one, two = (zero, zero), (zero, zero)
        for value in series.split(1, dim=1):
            one = self.lstm1(value, one)
            two = self.lstm2(one[0], two)
            outputs.append(self.linear(two[0]))
        for _ in range(future):
            one = self.lstm1(outputs[-1], one)
            two = self.lstm2(one[0], two)
            outputs.append(self.linear(two[0]))
        return torch.cat(outputs, dim=1)


class ModuleListStack(nn.Module):
    """Layers inside time: a list of GRU cells and a list of states."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [FEATURES, HIDDEN]
        self.layers = nn.ModuleList([nn.GRUCell(size, HIDDEN) for size in sizes])
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = [x.new_zeros(x.size(1), HIDDEN) for _ in self.layers]
        tops = []
        for t in range(x.size(0)):
            inner = x[t]
            for i, layer in enumerate(self.layers):
                hidden[i] = layer(inner, hidden[i])
                inner = self.drop(hidden[i]) if i + 1 < len(self.layers) else hidden[i]
            tops.append(inner)
        return torch.stack(tops)


class ActorCritic(nn.Module):
    """State reset where an episode ended: the mask multiplies it before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRUCell(FEATURES, HIDDEN)
        self.actor, self.critic = nn.Linear(HIDDEN, 4), nn.Linear(HIDDEN, 1)

    def forward(self, obs: Tensor, hxs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, values = [], []
        for o, m in zip(obs, masks, strict=True):
            hxs = self.gru(o, hxs * m)
            logits.append(self.actor(hxs))
            values.append(self.critic(hxs))
        return torch.stack(logits), torch.stack(values), hxs


class BothWays(nn.Module):
    """Two cells, one from each end, joined at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_cell = nn.LSTMCell(FEATURES, HIDDEN)
        self.backward_cell = nn.LSTMCell(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        steps, batch = x.shape[:2]
        hf = cf = hb = cb = torch.zeros(batch, HIDDEN)
        left, right = [], []
        for t in range(steps):
            hf, cf = self.forward_cell(x[t], (hf, cf))
            hb, cb = self.backward_cell(x[steps - t - 1], (hb, cb))
            left.append(hf)
            right.insert(0, hb)
        return torch.cat([torch.stack(left), torch.stack(right)], -1)


class TruncatedLoop(nn.Module):
    """The state is cut every four steps inside one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNNCell(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for t, x_t in enumerate(x):
            if t % 4 == 0:
                h = h.detach()
            h = self.rnn(x_t, h)
            out.append(h)
        return torch.stack(out)


class NoStateGiven(nn.Module):
    """The first step leaves the state out, the cell makes zeros by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, FEATURES)
        self.cell = nn.GRUCell(FEATURES, HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        h, hs = None, []
        for e in self.embed(ids).unbind(1):
            h = self.cell(e, h)
            hs.append(h)
        return torch.stack(hs, 1)


class LearnedStart(nn.Module):
    """A learned initial state expanded to the batch; cells in a Sequential called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.h0 = nn.Parameter(torch.randn(1, HIDDEN) * 0.1)
        self.parts = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.RNNCell(FEATURES, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        h, hs = self.h0.expand(x.size(1), -1), []
        for t in range(x.size(0)):
            h = self.parts[1](torch.tanh(self.parts[0](x[t])), h)
            hs.append(h)
        return torch.stack(hs)


class DirectForward(nn.Module):
    """cell.forward called by name, so that forward hooks never fire."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        state = (torch.zeros(x.size(1), HIDDEN),) * 2
        hs = []
        for x_t in x:
            state = self.cell.forward(x_t, state)
            hs.append(state[0])
        return torch.stack(hs)


class ResidualCell(nn.Module):
    """The cell adds to the state instead of replacing it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, hs = torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            h = h + self.cell(x_t, self.norm(h))
            hs.append(h)
        return torch.stack(hs)


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))
BATCH_MAJOR = drawn(floats(BATCH, 9, FEATURES))

SPECIMENS = (
    native("lstmcell-loop", CellLoop, BATCH_MAJOR, 9, "split along time"),
    native(
        "sine-cells", SineCells, drawn(floats(BATCH, 9)), 11,
        "nine values read, two continued: eleven steps of two stacked cells",
        sites=2, causal=False,
    ),
    native("grucell-stack", ModuleListStack, TIME_MAJOR, 11, "layers inside time", sites=2),
    native(
        "actor-critic", ActorCritic,
        drawn(floats(11, BATCH, FEATURES), floats(BATCH, HIDDEN), mask(11, BATCH, 1)), 11,
        "done-mask resets the state",
    ),
    native("cells-both-ways", BothWays, TIME_MAJOR, 11, "by hand", sites=2, causal=False),
    native("rnncell-truncated", TruncatedLoop, TIME_MAJOR, 11, "cut every 4 steps", window=4),
    native("grucell-no-state", NoStateGiven, drawn(tokens(BATCH, 9, below=20)), 9, "None first"),
    native("rnncell-learned-start", LearnedStart, TIME_MAJOR, 11, "learned initial state"),
    native("lstmcell-direct-forward", DirectForward, TIME_MAJOR, 11, "no hooks fire"),
    native("grucell-residual", ResidualCell, TIME_MAJOR, 11, "h + cell(x, norm(h))"),
)  # fmt: skip
