"""Linear and elementwise recurrences stepped in Python, and recurrences over frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.specimen import drawn, floats, native, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class SimpleUnit(nn.Module):
    """SRU: all products before the loop, a highway to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(FEATURES, 4 * HIDDEN)
        self.v = nn.Parameter(torch.randn(2, HIDDEN) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        c, hs = x.new_zeros(x.size(1), HIDDEN), []
        for u, f, r, skip in zip(*self.w(x).chunk(4, -1), strict=True):
            f, r = torch.sigmoid(f + self.v[0] * c), torch.sigmoid(r + self.v[1] * c)
            c = f * c + (1 - f) * u
            hs.append(r * c + (1 - r) * skip)
        return torch.stack(hs)


class QuasiRNN(nn.Module):
    """A causal convolution makes the gates, pooling has no weights of its own but a start."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(FEATURES, 3 * HIDDEN, 2)
        self.decay = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.conv(functional.pad(x.permute(1, 2, 0), (1, 0))).permute(2, 0, 1)
        c, hs = torch.zeros(x.size(1), HIDDEN), []
        for g in gates:
            z, f, o = g.split(HIDDEN, dim=1)
            f = torch.sigmoid(f + self.decay)
            c = torch.addcmul((1 - f) * torch.tanh(z), f, c)
            hs.append(torch.sigmoid(o) * c)
        return torch.stack(hs)


class Diagonal(nn.Module):
    """LRU: a complex diagonal state inside the unit circle."""

    def __init__(self) -> None:
        super().__init__()
        self.nu_log = nn.Parameter(torch.log(-torch.log(torch.rand(HIDDEN) * 0.2 + 0.75)))
        self.theta = nn.Parameter(torch.rand(HIDDEN))
        self.B = nn.Parameter(torch.randn(FEATURES, HIDDEN, dtype=torch.cfloat) * 0.3)
        self.C = nn.Parameter(torch.randn(HIDDEN, 4, dtype=torch.cfloat) * 0.3)

    def forward(self, u: Tensor) -> Tensor:
        lam = torch.exp(torch.complex(-torch.exp(self.nu_log), self.theta))
        x, ys = torch.zeros(u.size(0), HIDDEN, dtype=torch.cfloat), []
        for u_t in u.to(torch.cfloat).unbind(1):
            x = lam * x + u_t @ self.B
            ys.append((x @ self.C).real)
        return torch.stack(ys, 1)


class StateSpace(nn.Module):
    """A dense linear state space, discretised by the bilinear transform."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.2 - torch.eye(HIDDEN))
        self.B = nn.Parameter(torch.randn(HIDDEN, FEATURES) * 0.5)
        self.C = nn.Parameter(torch.randn(2, HIDDEN))

    def forward(self, u: Tensor) -> Tensor:
        eye = torch.eye(HIDDEN)
        left = torch.linalg.inv(eye - 0.1 * self.A)
        A_bar, B_bar = left @ (eye + 0.1 * self.A), left @ (0.2 * self.B)
        state, ys = torch.zeros(u.size(0), HIDDEN, 1), []
        for t in range(u.size(1)):
            state = A_bar @ state + B_bar @ u[:, t].unsqueeze(-1)
            ys.append((self.C @ state).squeeze(-1))
        return torch.stack(ys, 1)


class Selective(nn.Module):
    """Mamba's scan: step size, write and read depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, 5.0)).repeat(HIDDEN, 1))
        self.lift, self.proj = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN + 8)

    def forward(self, x: Tensor) -> Tensor:
        u = functional.silu(self.lift(x))
        delta, B, C = self.proj(u).split([HIDDEN, 4, 4], dim=-1)
        dA = torch.exp(torch.einsum("bld,dn->bldn", functional.softplus(delta), -self.A_log.exp()))
        dBu = torch.einsum("bld,bln,bld->bldn", delta, B, u)
        h, ys = torch.zeros(x.size(0), HIDDEN, 4), []
        for i in range(x.size(1)):
            h = dA[:, i] * h + dBu[:, i]
            ys.append(torch.einsum("bdn,bn->bd", h, C[:, i]))
        return torch.stack(ys, dim=1)


class TimeMix(nn.Module):
    """RWKV: a weighted mean over the past, kept as numerator and denominator."""

    def __init__(self) -> None:
        super().__init__()
        self.rkv = nn.Linear(FEATURES, 3 * HIDDEN)
        self.time_decay = nn.Parameter(torch.zeros(HIDDEN))
        self.time_first = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        num = den = x.new_zeros(x.size(0), HIDDEN)
        out, decay = [], torch.exp(-torch.exp(self.time_decay))
        for t in range(x.size(1)):
            r, k, v = self.rkv(x[:, t]).chunk(3, -1)
            now = torch.exp(self.time_first + k)
            out.append(torch.sigmoid(r) * (num + now * v) / (den + now))
            num, den = decay * num + k.exp() * v, decay * den + k.exp()
        return torch.stack(out, 1)


class Smoothing(nn.Module):
    """Holt's exponential smoothing: level and trend with learned rates, one series each."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, y: Tensor) -> Tensor:
        a, b = torch.sigmoid(self.alpha), torch.sigmoid(self.beta)
        level, trend, forecasts = torch.zeros(y.size(0)), torch.zeros(y.size(0)), []
        for t in range(y.size(1)):
            before = level
            level = a * y[:, t] + (1 - a) * (level + trend)
            trend = b * (level - before) + (1 - b) * trend
            forecasts.append(level + trend)
        return torch.stack(forecasts, 1)


class FrameLSTM(nn.Module):
    """Convolutional LSTM over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 + 6, 4 * 6, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        b, steps, _, height, width = video.shape
        h, c = video.new_zeros(b, 6, height, width), video.new_zeros(b, 6, height, width)
        out = []
        for t in range(steps):
            i, f, o, g = torch.split(self.conv(torch.cat([video[:, t], h], dim=1)), 6, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return torch.stack(out, dim=1)


class FrameGRU(nn.Module):
    """Convolutional GRU with separate kernels, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.reset_update = nn.Conv2d(2 + 6, 2 * 6, 3, padding="same")
        self.candidate = nn.Conv2d(2 + 6, 6, 3, padding="same")

    def forward(self, video: Tensor) -> Tensor:
        h, out = None, []
        for frame in video:
            if h is None:
                h = frame.new_zeros(frame.size(0), 6, *frame.shape[2:])
            r, z = self.reset_update(torch.cat([frame, h], 1)).sigmoid().chunk(2, 1)
            h = (1 - z) * h + z * self.candidate(torch.cat([frame, r * h], 1)).tanh()
            out.append(h)
        return torch.stack(out)


class GraphOverTime(nn.Module):
    """Traffic: a graph convolution inside the gates of a GRU, over time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(6).roll(1, 0))
        self.gates, self.update = nn.Linear(2 + HIDDEN, 2 * HIDDEN), nn.Linear(2 + HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(*x.shape[1:3], HIDDEN), []
        for x_t in x:
            near = self.adjacency @ torch.cat([x_t, h], -1)
            r, z = torch.sigmoid(self.gates(near)).chunk(2, -1)
            n = torch.tanh(self.update(self.adjacency @ torch.cat([x_t, r * h], -1)))
            h = z * h + (1 - z) * n
            out.append(h)
        return torch.stack(out)


class PixelRows(nn.Module):
    """Rows of an image as time, with a fused GRU along each row: time in two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.GRU(1 + HIDDEN, HIDDEN, batch_first=True)

    def forward(self, image: Tensor) -> Tensor:
        above, rows = torch.zeros(image.size(0), image.size(2), HIDDEN), []
        for row in image.unbind(1):
            above, _ = self.along(torch.cat([row.unsqueeze(-1), above], -1))
            rows.append(above)
        return torch.stack(rows, 1)


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))
BATCH_MAJOR = drawn(floats(BATCH, 9, FEATURES))
GRU_CONVS = ("reset_update.weight", "candidate.weight")

SPECIMENS = (
    written("sru", SimpleUnit, TIME_MAJOR, 11, ("v",), "products before the loop"),
    written("qrnn", QuasiRNN, TIME_MAJOR, 11, ("decay",), "addcmul, gates by convolution"),
    written("lru", Diagonal, BATCH_MAJOR, 9, ("nu_log", "theta"), "complex diagonal state"),
    written("state-space", StateSpace, BATCH_MAJOR, 9, ("A",), "bilinear, dense, linear"),
    written("selective-scan", Selective, BATCH_MAJOR, 9, ("A_log",), "input-dependent decay"),
    written("rwkv", TimeMix, BATCH_MAJOR, 9, ("time_decay",), "numerator and denominator"),
    written(
        "smoothing", Smoothing, drawn(floats(BATCH, 9)), 9, ("alpha", "beta"), "level and trend"
    ),
    written("conv-lstm", FrameLSTM, drawn(floats(2, 9, 2, 4, 4)), 9, ("conv.weight",), "frames"),
    written("conv-gru", FrameGRU, drawn(floats(9, 2, 2, 4, 4)), 9, GRU_CONVS, "state made inside"),
    written(
        "graph-gru", GraphOverTime, drawn(floats(11, BATCH, 6, 2)), 11,
        ("gates.weight", "update.weight"), "graph convolution in the gates",
    ),
    native("pixel-rows", PixelRows, drawn(floats(BATCH, 11, 6)), 11, "a GRU per row"),
)  # fmt: skip
