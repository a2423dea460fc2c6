"""More loops that are no time: routing, solvers, inner optimisation, pondering, diffusion."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.specimen import drawn, floats, not_time

FEATURES, HIDDEN, BATCH = 5, 8, 3


class Capsules(nn.Module):
    """Routing by agreement between two layers of capsules."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(6, 4, FEATURES, HIDDEN) * 0.3)

    def forward(self, u: Tensor) -> Tensor:
        votes = torch.einsum("bif,ijfh->bijh", u, self.W)
        b = torch.zeros(votes.shape[:3])
        for _ in range(7):
            s = (b.softmax(2).unsqueeze(-1) * votes).sum(1)
            norm = s.norm(dim=-1, keepdim=True)
            v = norm / (1 + norm**2) * s
            b = b + (votes * v.unsqueeze(1)).sum(-1)
        return v


class Slots(nn.Module):
    """Slot attention: a GRUCell refines the slots over one set of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(4, HIDDEN))
        self.k, self.v = nn.Linear(FEATURES, HIDDEN), nn.Linear(FEATURES, HIDDEN)
        self.q, self.gru = nn.Linear(HIDDEN, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.start.expand(x.size(0), -1, -1)
        k, v = self.k(x), self.v(x)
        for _ in range(7):
            attn = (k @ self.q(slots).transpose(1, 2)).softmax(-1)
            updates = attn.transpose(1, 2) @ v
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots


class SetReader(nn.Module):
    """Set2Set: an LSTMCell reads the same unordered set seven times."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(2 * FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), FEATURES)
        q_star = x.new_zeros(x.size(0), 2 * FEATURES)
        for _ in range(7):
            h, c = self.lstm(q_star, (h, c))
            a = torch.softmax((x * h.unsqueeze(1)).sum(-1, keepdim=True), dim=1)
            q_star = torch.cat([h, (a * x).sum(1)], dim=-1)
        return q_star


class Flow(nn.Module):
    """RAFT-like: a convolutional GRU improves a flow field between two frames."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Conv2d(4, 6, 1)
        self.zr, self.q = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1)
        self.enter, self.delta = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, one: Tensor, other: Tensor) -> list[Tensor]:
        both = torch.cat([one, other], 1)
        net, flow, flows = torch.tanh(self.context(both)), torch.zeros_like(one), []
        for _ in range(7):
            flow = flow.detach()
            x = torch.relu(self.enter(torch.cat([flow, both], 1)))
            z, r = self.zr(torch.cat([net, x], 1)).sigmoid().chunk(2, 1)
            net = (1 - z) * net + z * self.q(torch.cat([r * net, x], 1)).tanh()
            flow = flow + self.delta(net)
            flows.append(flow)
        return flows


class Ponder(nn.Module):
    """Adaptive computation: up to nine inner steps on one input, weighted by halting."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.cell = nn.Linear(FEATURES, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)
        self.halt = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.enter(x)
        h, left, answer = torch.zeros_like(u), torch.ones(x.size(0), 1), torch.zeros_like(u)
        for n in range(9):
            h = self.cell(u, h)
            p = torch.sigmoid(self.halt(h)) if n < 8 else torch.ones_like(left)
            answer = answer + left * p * h
            left = left * (1 - p)
        return answer


class InnerDescent(nn.Module):
    """A latent found by gradient descent on a reconstruction, differentiated through."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros(x.size(0), 6, requires_grad=True)
        for _ in range(7):
            error = (self.decoder(z) - x).square().sum()
            z = z - 0.1 * torch.autograd.grad(error, z, create_graph=True)[0]
        return self.decoder(z)


class Denoiser(nn.Module):
    """A sampler that walks the noise down in nine steps, told the step as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES + 1, 16), nn.SiLU(), nn.Linear(16, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        for step in reversed(range(9)):
            level = torch.full((x.size(0), 1), step / 9)
            x = x - 0.2 * self.net(torch.cat([x, level], 1))
        return x


class Hamiltonian(nn.Module):
    """Leapfrog through a learned potential from one initial condition."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = nn.Sequential(nn.Linear(FEATURES, 16), nn.Softplus(), nn.Linear(16, 1))

    def force(self, q: Tensor) -> Tensor:
        return -torch.autograd.grad(self.potential(q).sum(), q, create_graph=True)[0]

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        q = q.clone().requires_grad_()
        p = torch.zeros_like(q)
        for _ in range(7):
            p = p + 0.05 * self.force(q)
            q = q + 0.1 * p
            p = p + 0.05 * self.force(q)
        return q, p


class Balance(nn.Module):
    """Sinkhorn: rows and columns normalised in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(FEATURES, 6)

    def forward(self, x: Tensor) -> Tensor:
        log_p = self.score(x)
        for _ in range(12):
            log_p = log_p - log_p.logsumexp(dim=1, keepdim=True)
            log_p = log_p - log_p.logsumexp(dim=2, keepdim=True)
        return log_p.exp()


class ValueIteration(nn.Module):
    """A planner: the same convolution and maximum over actions, twelve times."""

    def __init__(self) -> None:
        super().__init__()
        self.reward = nn.Conv2d(2, 1, 1)
        self.q = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        r = self.reward(grid)
        v = torch.zeros_like(r)
        for _ in range(12):
            v = self.q(torch.cat([r, v], 1)).max(dim=1, keepdim=True)[0]
        return v


class Shared(nn.Module):
    """Depth by repetition: one residual MLP block, seven times, input added back each time."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.block = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        first = h = self.enter(x)
        for _ in range(7):
            h = self.norm(h + functional.gelu(self.block(h)) + first)
        return h


SET = drawn(floats(BATCH, 6, FEATURES))
FLAT = drawn(floats(BATCH, FEATURES))

SPECIMENS = (
    not_time("capsules", Capsules, SET, "iterations", 7, "routing by agreement"),
    not_time("slot-attention", Slots, SET, "iterations", 7, "a GRUCell over rounds"),
    not_time("set2set", SetReader, SET, "iterations", 7, "an LSTMCell over rounds"),
    not_time(
        "raft", Flow, drawn(floats(BATCH, 2, 4, 4), floats(BATCH, 2, 4, 4)),
        "iterations", 7, "convolutional GRU, flow detached each round",
    ),
    not_time("ponder", Ponder, FLAT, "iterations", 9, "the same input in each inner step"),
    not_time("inner-descent", InnerDescent, FLAT, "iterations", 7, "autograd inside forward"),
    not_time("denoiser", Denoiser, FLAT, "iterations", 9, "the step enters as a number"),
    not_time("leapfrog", Hamiltonian, FLAT, "iterations", 7, "autograd inside a solver"),
    not_time("sinkhorn", Balance, SET, "iterations", 12, "no weights in the loop"),
    not_time(
        "value-iteration", ValueIteration, drawn(floats(BATCH, 2, 4, 4)), "iterations", 12, "plan"
    ),
    not_time("shared-depth", Shared, FLAT, "iterations", 7, "one block for all depths"),
)  # fmt: skip
