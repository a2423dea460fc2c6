"""LSTM, GRU and their relatives written by hand: weight layouts, gate orders, variants."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zoo.specimen import drawn, floats, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class WideLSTM(nn.Module):
    """Weights (in, 4H), gates i, f, g, o by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_sz = HIDDEN
        self.W = nn.Parameter(torch.Tensor(FEATURES, HIDDEN * 4))
        self.U = nn.Parameter(torch.Tensor(HIDDEN, HIDDEN * 4))
        self.bias = nn.Parameter(torch.Tensor(HIDDEN * 4))
        stdv = 1.0 / math.sqrt(HIDDEN)
        for weight in self.parameters():
            weight.data.uniform_(-stdv, stdv)

    def forward(
        self, x: Tensor, init_states: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        bs, seq_sz, _ = x.size()
        if init_states is None:
            h_t, c_t = torch.zeros(bs, HIDDEN), torch.zeros(bs, HIDDEN)
        else:
            h_t, c_t = init_states
        seq = []
        HS = self.hidden_sz
        for t in range(seq_sz):
            gates = x[:, t, :] @ self.W + h_t @ self.U + self.bias
            i_t = torch.sigmoid(gates[:, :HS])
            f_t = torch.sigmoid(gates[:, HS : HS * 2])
            g_t = torch.tanh(gates[:, HS * 2 : HS * 3])
            o_t = torch.sigmoid(gates[:, HS * 3 :])
            c_t = f_t * c_t + i_t * g_t
            h_t = o_t * torch.tanh(c_t)
            seq.append(h_t.unsqueeze(0))
        return torch.cat(seq, dim=0).transpose(0, 1).contiguous(), (h_t, c_t)


class TallLSTMCell(nn.Module):
    """Weights (4H, in), gates f, i, o, g, forget bias one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(4 * HIDDEN, FEATURES) / 3)
        self.weight_hh = nn.Parameter(torch.randn(4 * HIDDEN, HIDDEN) / 3)
        self.bias = nn.Parameter(torch.zeros(4 * HIDDEN))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        gates = torch.mm(x, self.weight_ih.t()) + torch.mm(h, self.weight_hh.t()) + self.bias
        f, i, o, g = gates.chunk(4, 1)
        c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class TallLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = TallLSTMCell()

    def forward(self, inputs: Tensor) -> Tensor:
        state = (inputs.new_zeros(inputs.size(1), HIDDEN), inputs.new_zeros(inputs.size(1), HIDDEN))
        outputs = []
        for step in inputs.unbind(0):
            state = self.cell(step, state)
            outputs += [state[0]]
        return torch.stack(outputs)


class TwelveParameters(nn.Module):
    """One matrix for each gate and each source, as spelled in the equations."""

    def __init__(self) -> None:
        super().__init__()
        for gate in ("i", "f", "c", "o"):
            setattr(self, f"W_{gate}", nn.Parameter(torch.randn(FEATURES, HIDDEN) * 0.2))
            setattr(self, f"U_{gate}", nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.2))
            setattr(self, f"b_{gate}", nn.Parameter(torch.zeros(HIDDEN)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), HIDDEN)
        c = torch.zeros(x.size(0), HIDDEN)
        hs = []
        for t in range(x.size(1)):
            x_t = x[:, t]
            i = torch.sigmoid(x_t @ self.W_i + h @ self.U_i + self.b_i)
            f = torch.sigmoid(x_t @ self.W_f + h @ self.U_f + self.b_f)
            o = torch.sigmoid(x_t @ self.W_o + h @ self.U_o + self.b_o)
            c = f * c + i * torch.tanh(x_t @ self.W_c + h @ self.U_c + self.b_c)
            h = o * torch.tanh(c)
            hs.append(h)
        return torch.stack(hs, 1)


class CatLSTM(nn.Module):
    """One Linear on cat(x, h) for all gates, order i, f, o, g by split."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(FEATURES + HIDDEN, 4 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        hx, cx = x.new_zeros(x.size(0), HIDDEN), x.new_zeros(x.size(0), HIDDEN)
        out = []
        for t in range(x.size(1)):
            i, f, o, g = self.gates(torch.cat((x[:, t], hx), dim=1)).split(HIDDEN, dim=1)
            cx = cx * f.sigmoid() + i.sigmoid() * g.tanh()
            hx = cx.tanh() * o.sigmoid()
            out.append(hx)
        return torch.stack(out, dim=1)


class ResetBeforeGRU(nn.Module):
    """The reset gate acts on the state before the product; three Linears on cat."""

    def __init__(self) -> None:
        super().__init__()
        self.reset = nn.Linear(FEATURES + HIDDEN, HIDDEN)
        self.update = nn.Linear(FEATURES + HIDDEN, HIDDEN)
        self.candidate = nn.Linear(FEATURES + HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), HIDDEN)
        states = []
        for t in range(x.size(1)):
            both = torch.cat([x[:, t], h], 1)
            r, z = torch.sigmoid(self.reset(both)), torch.sigmoid(self.update(both))
            n = torch.tanh(self.candidate(torch.cat([x[:, t], r * h], 1)))
            h = (1 - z) * h + z * n
            states.append(h)
        return torch.stack(states, 1)


class ResetAfterGRU(nn.Module):
    """torch's own GRU spelled out: r, z, n by chunk, input gates for all steps at once."""

    def __init__(self) -> None:
        super().__init__()
        self.ih = nn.Linear(FEATURES, 3 * HIDDEN)
        self.hh = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gi_all, h, out = self.ih(x), torch.zeros(x.size(1), HIDDEN), []
        for gi in gi_all:
            i_r, i_z, i_n = gi.chunk(3, -1)
            h_r, h_z, h_n = self.hh(h).chunk(3, -1)
            r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
            n = torch.tanh(i_n + r * h_n)
            h = n + z * (h - n)
            out.append(h)
        return torch.stack(out), h


class Peephole(nn.Module):
    """The gates look at the cell state through vectors of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.wx = nn.Linear(FEATURES, 4 * HIDDEN)
        self.wh = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.peep_i = nn.Parameter(torch.randn(HIDDEN) * 0.1)
        self.peep_f = nn.Parameter(torch.randn(HIDDEN) * 0.1)
        self.peep_o = nn.Parameter(torch.randn(HIDDEN) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(1), HIDDEN)
        out = []
        for x_t in x:
            i, f, g, o = torch.chunk(self.wx(x_t) + self.wh(h), 4, dim=1)
            i = torch.sigmoid(i + self.peep_i * c)
            f = torch.sigmoid(f + self.peep_f * c)
            c = f * c + i * torch.tanh(g)
            h = torch.sigmoid(o + self.peep_o * c) * torch.tanh(c)
            out.append(h)
        return torch.stack(out)


class Coupled(nn.Module):
    """The input gate is what the forget gate leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(FEATURES + HIDDEN, 3 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, c, out = torch.zeros(x.size(1), HIDDEN), torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            f, o, g = self.lin(torch.cat([x_t, h], 1)).chunk(3, 1)
            f = torch.sigmoid(f)
            c = f * c + (1 - f) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return torch.stack(out)


class MinimalGated(nn.Module):
    """One gate that forgets and resets."""

    def __init__(self) -> None:
        super().__init__()
        self.Wf, self.Uf = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.Wh, self.Uh = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            f = torch.sigmoid(self.Wf(x_t) + self.Uf(h))
            h = (1 - f) * h + f * torch.tanh(self.Wh(x_t) + self.Uh(f * h))
            out.append(h)
        return torch.stack(out)


class Janet(nn.Module):
    """Only a forget gate; the input is let in by one minus a shifted gate."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(FEATURES, 2 * HIDDEN)
        self.h = nn.Linear(HIDDEN, 2 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        c, out = torch.zeros(x.size(1), HIDDEN), []
        for gates in self.x(x):
            s, g = (gates + self.h(c)).split(HIDDEN, -1)
            c = torch.sigmoid(s) * c + (1 - torch.sigmoid(s - 1.0)) * torch.tanh(g)
            out.append(c)
        return torch.stack(out)


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))
BATCH_MAJOR = drawn(floats(BATCH, 9, FEATURES))

SPECIMENS = (
    written("lstm-wide", WideLSTM, BATCH_MAJOR, 9, ("U",), "(in, 4H), i f g o, slices"),
    written("lstm-tall", TallLSTM, TIME_MAJOR, 11, ("cell.weight_hh",), "(4H, in), f i o g, chunk"),
    written(
        "lstm-twelve", TwelveParameters, BATCH_MAJOR, 9, ("U_i", "U_f", "U_c", "U_o"),
        "twelve parameters by setattr",
    ),
    written("lstm-cat", CatLSTM, BATCH_MAJOR, 9, ("gates.weight",), "i f o g by split"),
    written(
        "gru-reset-before", ResetBeforeGRU, BATCH_MAJOR, 9,
        ("reset.weight", "update.weight", "candidate.weight"), "cat(x, r * h)",
    ),
    written("gru-reset-after", ResetAfterGRU, TIME_MAJOR, 11, ("hh.weight",), "r z n by chunk"),
    written(
        "lstm-peephole", Peephole, TIME_MAJOR, 11, ("wh.weight", "peep_i", "peep_f", "peep_o"),
        "vectors of weights on the cell state",
    ),
    written("lstm-coupled", Coupled, TIME_MAJOR, 11, ("lin.weight",), "input gate is 1 - f"),
    written("mgu", MinimalGated, TIME_MAJOR, 11, ("Uf.weight", "Uh.weight"), "minimal gated unit"),
    written("janet", Janet, TIME_MAJOR, 11, ("h.weight",), "forget gate only; state is the cell"),
)  # fmt: skip
