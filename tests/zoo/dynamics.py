"""Irregular and continuous time, reservoirs and spikes, by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.specimen import drawn, floats, mask, native, positive, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class DecayGRU(nn.Module):
    """GRU-D: missing values decay to the mean, the state decays with the gap in time."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma_x = nn.Parameter(torch.full((FEATURES,), 0.1))
        self.gamma_h = nn.Linear(FEATURES, HIDDEN)
        self.zr = nn.Linear(2 * FEATURES + HIDDEN, 2 * HIDDEN)
        self.tilde = nn.Linear(2 * FEATURES + HIDDEN, HIDDEN)

    def forward(self, x: Tensor, m: Tensor, delta: Tensor) -> Tensor:
        h, last, out = torch.zeros(x.size(0), HIDDEN), torch.zeros_like(x[:, 0]), []
        for t in range(x.size(1)):
            x_t, m_t, d_t = x[:, t], m[:, t], delta[:, t]
            last = m_t * x_t + (1 - m_t) * last
            fade = torch.exp(-torch.relu(self.gamma_x * d_t))
            seen = m_t * x_t + (1 - m_t) * fade * last
            h = h * torch.exp(-torch.relu(self.gamma_h(d_t)))
            z, r = torch.sigmoid(self.zr(torch.cat([seen, m_t, h], 1))).chunk(2, 1)
            h = (1 - z) * h + z * torch.tanh(self.tilde(torch.cat([seen, m_t, r * h], 1)))
            out.append(h)
        return torch.stack(out, 1)


class Between(nn.Module):
    """Solver steps between two observations: iterations inside time."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(HIDDEN, 16), nn.Tanh(), nn.Linear(16, HIDDEN))

    def drift(self, h: Tensor, gap: Tensor) -> Tensor:
        for _ in range(4):
            h = h + gap / 4 * self.field(h)
        return h


class OdeRNN(Between):
    """The update at an observation is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.zn = nn.Linear(FEATURES + HIDDEN, 2 * HIDDEN)

    def forward(self, x: Tensor, gaps: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(0), HIDDEN), []
        for t in range(x.size(1)):
            h = self.drift(h, gaps[:, t])
            z, n = self.zn(torch.cat([x[:, t], h], -1)).chunk(2, -1)
            z = torch.sigmoid(z)
            h = z * h + (1 - z) * torch.tanh(n)
            out.append(h)
        return torch.stack(out, 1)


class OdeGRUCell(Between):
    """The update at an observation is a GRUCell."""

    def __init__(self) -> None:
        super().__init__()
        self.update = nn.GRUCell(FEATURES, HIDDEN)

    def forward(self, x: Tensor, gaps: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(0), HIDDEN), []
        for t in range(x.size(1)):
            h = self.update(x[:, t], self.drift(h, gaps[:, t]))
            out.append(h)
        return torch.stack(out, 1)


class Controlled(nn.Module):
    """Neural CDE: Euler steps along the increments of the data, so that it is time."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(FEATURES, HIDDEN)
        self.func = nn.Sequential(
            nn.Linear(HIDDEN, 16), nn.ReLU(), nn.Linear(16, HIDDEN * FEATURES)
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.start(x[:, 0])
        out = []
        increments = torch.diff(x, dim=1, prepend=torch.zeros_like(x[:, :1]))
        for dx in increments.unbind(1):
            matrix = torch.tanh(self.func(z)).view(-1, HIDDEN, FEATURES)
            z = z + torch.bmm(matrix, dx.unsqueeze(-1)).squeeze(-1)
            out.append(z)
        return torch.stack(out, 1)


class LiquidTime(nn.Module):
    """LTC: a fused implicit Euler step with input-dependent time constants."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES + HIDDEN, HIDDEN)
        self.A = nn.Parameter(torch.randn(HIDDEN))
        self.log_tau = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        h, out, dt = torch.zeros(x.size(0), HIDDEN), [], 0.5
        for t in range(x.size(1)):
            f = torch.sigmoid(self.net(torch.cat([x[:, t], h], 1)))
            h = (h + dt * f * self.A) / (1 + dt * (torch.exp(-self.log_tau) + f))
            out.append(h)
        return torch.stack(out, 1)


class TimeGate(nn.Module):
    """Phased LSTM: a learned rhythm opens and shuts the update."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(FEATURES + HIDDEN, 4 * HIDDEN)
        self.period = nn.Parameter(torch.rand(HIDDEN) * 2 + 1)
        self.shift = nn.Parameter(torch.rand(HIDDEN))

    def openness(self, time: Tensor) -> Tensor:
        phase = torch.fmod(time + self.shift, self.period) / self.period
        ramp = torch.where(phase < 0.25, 4 * phase, 2 - 4 * phase)
        return torch.where(phase < 0.5, ramp, 0.1 * phase)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        h = c = torch.zeros(x.size(0), HIDDEN)
        out = []
        for t in range(x.size(1)):
            i, f, g, o = self.lin(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            k = self.openness(times[:, t])
            new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            c = k * new_c + (1 - k) * c
            h = k * torch.sigmoid(o) * torch.tanh(c) + (1 - k) * h
            out.append(h)
        return torch.stack(out, 1)


class Reservoir(nn.Module):
    """Echo state: leaky, fixed weights in buffers, only the read-out learns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w_in", torch.rand(FEATURES, 16) - 0.5)
        w = torch.randn(16, 16)
        self.register_buffer("w_res", 0.9 * w / torch.linalg.eigvals(w).abs().max())
        self.readout = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        s, states, leak = torch.zeros(x.size(0), 16), [], 0.6
        for u in x.transpose(0, 1):
            s = (1 - leak) * s + leak * torch.tanh(u @ self.w_in + s @ self.w_res)
            states.append(s)
        return self.readout(torch.stack(states, 1))


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grad / (1 + 5 * v.abs()) ** 2


class LeakyIntegrateFire(nn.Module):
    """Spiking neurons: potential and spikes are carried, a surrogate stands for the step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(FEATURES, HIDDEN)
        self.recurrent = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.beta = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        mem, spk, out = torch.zeros(x.size(0), HIDDEN), torch.zeros(x.size(0), HIDDEN), []
        for t in range(x.size(1)):
            mem = self.beta * mem + self.fc(x[:, t]) + self.recurrent(spk) - spk.detach()
            spk = Spike.apply(mem - 1.0)
            out.append(mem)
        return torch.stack(out, 1)


BATCH_MAJOR = drawn(floats(BATCH, 9, FEATURES))
GAPPED = drawn(floats(BATCH, 9, FEATURES), positive(BATCH, 9, 1))

SPECIMENS = (
    written(
        "gru-d", DecayGRU,
        drawn(floats(BATCH, 9, FEATURES), mask(BATCH, 9, FEATURES), positive(BATCH, 9, FEATURES)),
        9, ("zr.weight", "tilde.weight"), "masks, gaps, decays to the last value",
    ),
    written(
        "ode-rnn", OdeRNN, GAPPED, 9, ("zn.weight", "field.0.weight", "field.2.weight"),
        "four solver steps between nine observations",
    ),
    native("ode-grucell", OdeGRUCell, GAPPED, 9, "solver steps around a GRUCell"),
    written(
        "neural-cde", Controlled, BATCH_MAJOR, 9, ("func.0.weight", "func.2.weight"),
        "driven by increments of the data",
    ),
    written(
        "liquid-time", LiquidTime, BATCH_MAJOR, 9, ("net.weight", "log_tau"), "the state divided",
    ),
    written("phased-lstm", TimeGate, GAPPED, 9, ("lin.weight",), "a rhythm gates the update"),
    written("echo-state", Reservoir, BATCH_MAJOR, 9, ("w_res",), "fixed weights in a buffer"),
    written(
        "spiking", LeakyIntegrateFire, BATCH_MAJOR, 9, ("recurrent.weight", "beta"),
        "surrogate gradient through spikes",
    ),
)  # fmt: skip
