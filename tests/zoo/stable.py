"""Cells from research by hand that are stable, slow or lossless by construction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.research import Unrolled
from zoo.specimen import drawn, floats, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class Independent(Unrolled):
    """IndRNN: each unit only sees itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(FEATURES, HIDDEN)
        self.u = nn.Parameter(torch.empty(HIDDEN).uniform_(0.5, 1))

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (torch.relu(self.w(x) + self.u * h + 0.5),)


class Antisymmetric(Unrolled):
    """An Euler step with W - W.T and a little friction."""

    def __init__(self) -> None:
        super().__init__()
        self.V = nn.Linear(FEATURES, HIDDEN)
        self.W = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.3)

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        skew = self.W - self.W.T - 0.01 * torch.eye(HIDDEN)
        return (h + 0.1 * torch.tanh(h @ skew.T + self.V(x)),)


class Oscillators(Unrolled):
    """coRNN: position and velocity of coupled, damped oscillators."""

    states = 2

    def __init__(self) -> None:
        super().__init__()
        self.i2h, self.h2h = nn.Linear(FEATURES, HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.dt, self.gamma, self.epsilon = 0.1, 2.7, 4.7

    def step(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        force = torch.tanh(self.i2h(x) + self.h2h(torch.cat([z, y], 1)))
        z = z + self.dt * (force - self.gamma * y - self.epsilon * z)
        return y + self.dt * z, z


class LongExpressive(Unrolled):
    """LEM: two states, two learned time steps."""

    states = 2

    def __init__(self) -> None:
        super().__init__()
        self.inp2hid = nn.Linear(FEATURES, 4 * HIDDEN)
        self.hid2hid = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.transform_z = nn.Linear(HIDDEN, HIDDEN)

    def step(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        i_dt1, i_dt2, i_z, i_y = self.inp2hid(x).chunk(4, 1)
        h_dt1, h_dt2, h_y = self.hid2hid(y).chunk(3, 1)
        slow, fast = torch.sigmoid(i_dt1 + h_dt1), torch.sigmoid(i_dt2 + h_dt2)
        z = (1 - fast) * z + fast * torch.tanh(i_y + h_y)
        return (1 - slow) * y + slow * torch.tanh(self.transform_z(z) + i_z), z


class Orthogonal(Unrolled):
    """The recurrent matrix is the exponential of a skew matrix; modReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.T = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.A = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.3)
        self.b = nn.Parameter(torch.full((HIDDEN,), -0.01))

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        upper = self.A.triu(1)
        z = self.T(x) + h @ torch.linalg.matrix_exp(upper - upper.T)
        return (torch.sign(z) * functional.relu(z.abs() + self.b),)


class ChaosFree(Unrolled):
    """CFN: with silent input the state can only shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.U, self.V = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(FEATURES, 2 * HIDDEN)
        self.W = nn.Linear(FEATURES, HIDDEN)

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        theta, eta = torch.sigmoid(self.U(h) + self.V(x)).chunk(2, 1)
        return (theta * torch.tanh(h) + eta * torch.tanh(self.W(x)),)


class Fast(Unrolled):
    """FastRNN: a residual step with two learned scalars and one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.alpha, self.beta = nn.Parameter(torch.tensor(-1.0)), nn.Parameter(torch.tensor(1.0))

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        new = torch.tanh(self.W(x) + self.U(h))
        return (torch.sigmoid(self.alpha) * new + torch.sigmoid(self.beta) * h,)


class Context(Unrolled):
    """SCRN: slow context units without non-linearity beside the fast ones."""

    states = 2

    def __init__(self) -> None:
        super().__init__()
        self.B, self.A = nn.Linear(FEATURES, HIDDEN), nn.Linear(FEATURES, HIDDEN)
        self.P, self.R = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def step(self, x: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        s = 0.05 * self.B(x) + 0.95 * s
        return torch.sigmoid(self.P(s) + self.A(x) + self.R(h)), s


class Echo(nn.Module):
    """A skip connection in time: the state two steps ago is read as well."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(FEATURES, HIDDEN)
        self.one, self.two = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        hs = [torch.zeros(x.size(1), HIDDEN)] * 2
        for x_t in x:
            hs.append(torch.tanh(self.x(x_t) + self.one(hs[-1]) + self.two(hs[-2])))
        return torch.stack(hs[2:])


class Delayed(nn.Module):
    """The state four steps ago alone: four interleaved recurrences (a dilated RNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        zero, hs = torch.zeros(x.size(1), HIDDEN), []
        for t, x_t in enumerate(x):
            past = hs[t - 4] if t >= 4 else zero
            hs.append(torch.tanh(self.x(x_t) + self.h(past)))
        return torch.stack(hs).cumsum(0)


class Legendre(nn.Module):
    """LMU: a fixed linear memory in buffers, written by a learned unit and read by it."""

    def __init__(self) -> None:
        super().__init__()
        q = torch.arange(6.0)
        i, j = q[:, None], q[None, :]
        sign = torch.where(i < j, -torch.ones(6, 6), (-1.0) ** (i - j + 1))
        self.register_buffer("A", torch.linalg.matrix_exp((2 * i + 1) * sign / 20))
        self.register_buffer("B", (2 * q + 1) * (-1.0) ** q / 20)
        self.e_x, self.e_h = nn.Linear(FEATURES, 1), nn.Linear(HIDDEN, 1)
        self.W = nn.Linear(FEATURES + HIDDEN + 6, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, m, out = torch.zeros(x.size(1), HIDDEN), torch.zeros(x.size(1), 6), []
        for x_t in x:
            u = self.e_x(x_t) + self.e_h(h)
            m = m @ self.A.T + u * self.B
            h = torch.tanh(self.W(torch.cat([x_t, h, m], 1)))
            out.append(h)
        return torch.stack(out)


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))

SPECIMENS = (
    written("indrnn", Independent, TIME_MAJOR, 11, ("u",), "elementwise u * h"),
    written("antisymmetric", Antisymmetric, TIME_MAJOR, 11, ("W",), "W - W.T - friction"),
    written("cornn", Oscillators, TIME_MAJOR, 11, ("h2h.weight",), "position and velocity"),
    written("lem", LongExpressive, TIME_MAJOR, 11, ("hid2hid.weight", "transform_z.weight"), "LEM"),
    written("exprnn", Orthogonal, TIME_MAJOR, 11, ("A",), "matrix exponential in each step"),
    written("cfn", ChaosFree, TIME_MAJOR, 11, ("U.weight",), "chaos-free network"),
    written("fastrnn", Fast, TIME_MAJOR, 11, ("U.weight", "beta"), "residual, learned scalars"),
    written("scrn", Context, TIME_MAJOR, 11, ("R.weight", "P.weight"), "slow context units"),
    written("skip-in-time", Echo, TIME_MAJOR, 11, ("one.weight", "two.weight"), "h[t-1], h[t-2]"),
    written(
        "dilated", Delayed, TIME_MAJOR, 11, ("h.weight",),
        "only h[t-4] is read; the outputs are summed up over time",
    ),
    written("lmu", Legendre, TIME_MAJOR, 11, ("A", "e_h.weight", "W.weight"), "memory in buffers"),
)  # fmt: skip
