"""Gated cells from research by hand: normalised, regularised, multiplicative, multi-rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.specimen import drawn, floats, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class Unrolled(nn.Module):
    """Runs self.step(x_t, *state) over time; the first of the state is the output."""

    states = 1

    def forward(self, x: Tensor) -> Tensor:
        state = tuple(x.new_zeros(x.size(1), HIDDEN) for _ in range(self.states))
        out = []
        for x_t in x:
            state = self.step(x_t, *state)
            out.append(state[0])
        return torch.stack(out)


class NormLSTM(Unrolled):
    """Layer norm on both sums and on the cell state."""

    states = 2

    def __init__(self) -> None:
        super().__init__()
        self.wx = nn.Linear(FEATURES, 4 * HIDDEN, bias=False)
        self.wh = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.nx, self.nh = nn.LayerNorm(4 * HIDDEN), nn.LayerNorm(4 * HIDDEN)
        self.nc = nn.LayerNorm(HIDDEN)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = (self.nx(self.wx(x)) + self.nh(self.wh(h))).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.nc(c).tanh(), c


class NormGRU(Unrolled):
    """Dreamer's: one Linear without bias on cat(x, h), norm, update gate shifted by -1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES + HIDDEN, 3 * HIDDEN, bias=False)
        self.norm = nn.LayerNorm(3 * HIDDEN)

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        reset, cand, update = self.norm(self.layer(torch.cat([x, h], -1))).chunk(3, -1)
        update = torch.sigmoid(update - 1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return (update * cand + (1 - update) * h,)


class Zoneout(Unrolled):
    """Each unit keeps its old value with some chance; the mean of that in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        new = torch.tanh(self.x(x) + self.h(h))
        keep = torch.bernoulli(torch.full_like(h, 0.3)) if self.training else 0.3
        return (keep * h + (1 - keep) * new,)


class VariationalDropout(nn.Module):
    """One mask on the state for the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        keep = functional.dropout(torch.ones_like(h), 0.2, self.training)
        for x_t in x:
            h = torch.tanh(self.x(x_t) + self.h(h * keep))
            out.append(h)
        return torch.stack(out)


class Multiplicative(Unrolled):
    """The state is first multiplied by a view of the input."""

    states = 2

    def __init__(self) -> None:
        super().__init__()
        self.wmx, self.wmh = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.wx, self.wm = nn.Linear(FEATURES, 4 * HIDDEN), nn.Linear(HIDDEN, 4 * HIDDEN)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        m = self.wmx(x) * self.wmh(h)
        g, i, o, f = (self.wx(x) + self.wm(m)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.tanh(c * torch.sigmoid(o)), c


class Highway(Unrolled):
    """Three highway layers between one step and the next; the input enters the first."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(FEATURES, 2 * HIDDEN)
        self.r = nn.ModuleList(nn.Linear(HIDDEN, 2 * HIDDEN) for _ in range(3))

    def step(self, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        for depth, layer in enumerate(self.r):
            h, t = (layer(s) + (self.x(x) if depth == 0 else 0)).chunk(2, -1)
            t = torch.sigmoid(t - 1)
            s = torch.tanh(h) * t + s * (1 - t)
        return (s,)


class Clockwork(nn.Module):
    """Two blocks of units; the second moves every second step only."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for t, x_t in enumerate(x):
            new = torch.tanh(self.x(x_t) + self.h(h))
            active = HIDDEN if t % 2 == 0 else HIDDEN // 2
            h = torch.cat([new[:, :active], h[:, active:]], dim=1)
            out.append(h)
        return torch.stack(out)


class Skip(nn.Module):
    """A binary gate with a straight-through gradient chooses between copy and update."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(FEATURES + HIDDEN, HIDDEN)
        self.delta = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, u, out = torch.zeros(x.size(1), HIDDEN), torch.ones(x.size(1), 1), []
        for x_t in x:
            gate = u + (torch.round(u) - u).detach()
            new = torch.tanh(self.cell(torch.cat([x_t, h], 1)))
            h = gate * new + (1 - gate) * h
            more = torch.sigmoid(self.delta(h))
            u = gate * more + (1 - gate) * (u + torch.minimum(more, 1 - u))
            out.append(h)
        return torch.stack(out)


class ExponentialGate(nn.Module):
    """sLSTM: exponential gates with a normaliser and a running maximum for safety."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.R = nn.Linear(FEATURES, 4 * HIDDEN), nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = c = n = m = torch.zeros(x.size(1), HIDDEN)
        out = []
        for pre in self.W(x):
            z, i, f, o = (pre + self.R(h)).chunk(4, 1)
            log_f = functional.logsigmoid(f)
            new_m = torch.maximum(log_f + m, i)
            f, i, m = torch.exp(log_f + m - new_m), torch.exp(i - new_m), new_m
            c, n = f * c + i * torch.tanh(z), f * n + i
            h = torch.sigmoid(o) * c / n.clamp(min=1.0)
            out.append(h)
        return torch.stack(out)


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))

SPECIMENS = (
    written("lstm-layernorm", NormLSTM, TIME_MAJOR, 11, ("wh.weight",), "three norms"),
    written("gru-layernorm", NormGRU, TIME_MAJOR, 11, ("layer.weight",), "order r n z, on cat"),
    written("zoneout", Zoneout, TIME_MAJOR, 11, ("h.weight",), "units keep their value by chance"),
    written("variational-dropout", VariationalDropout, TIME_MAJOR, 11, ("h.weight",), "one mask"),
    written("mlstm", Multiplicative, TIME_MAJOR, 11, ("wmh.weight", "wm.weight"), "multiplicative"),
    written(
        "highway", Highway, TIME_MAJOR, 11, tuple(f"r.{depth}.weight" for depth in range(3)),
        "recurrent highway of depth three",
    ),
    written("clockwork", Clockwork, TIME_MAJOR, 11, ("h.weight",), "blocks at two rates"),
    written("skip-rnn", Skip, TIME_MAJOR, 11, ("cell.weight", "delta.weight"), "straight-through"),
    written("slstm", ExponentialGate, TIME_MAJOR, 11, ("R.weight",), "four states, exp gates"),
)  # fmt: skip
