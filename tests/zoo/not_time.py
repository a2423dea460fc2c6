"""Loops that are no time, and models without any recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.specimen import drawn, fixed, floats, not_time, tokens

FEATURES, HIDDEN, BATCH, NODES = 5, 8, 3, 6


class GatedGraph(nn.Module):
    """Messages along edges, a GRUCell updates every node, seven rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, HIDDEN)
        self.message = nn.Linear(HIDDEN, HIDDEN)
        self.update = nn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        h = self.embed(nodes)
        for _ in range(7):
            h = self.update(adjacency @ self.message(h), h)
        return h.sum(0)


class WrittenGraph(nn.Module):
    """The same with gather and scatter over an edge list, and no cell of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, HIDDEN)
        self.edge = nn.Linear(2 * HIDDEN, HIDDEN)
        self.node = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        h = self.embed(nodes)
        for _ in range(7):
            source, target = edges
            sent = torch.relu(self.edge(torch.cat([h[source], h[target]], -1)))
            heard = torch.zeros_like(h).index_add(0, target, sent)
            h = torch.tanh(self.node(torch.cat([h, heard], -1)))
        return h


class Equilibrium(nn.Module):
    """Fixed-point iteration to tolerance without gradient, then one step with it."""

    def __init__(self) -> None:
        super().__init__()
        self.inject = nn.Linear(FEATURES, HIDDEN)
        self.f = nn.Linear(HIDDEN, HIDDEN)
        nn.init.orthogonal_(self.f.weight, gain=0.5)

    def refine(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.f(z) + u)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)
        z = torch.zeros_like(u)
        with torch.no_grad():
            for _ in range(12):
                z = self.refine(z, u)
        return self.refine(z, u)


class WeightTied(nn.Module):
    """One transformer layer applied again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, HIDDEN)
        self.layer = nn.TransformerEncoderLayer(HIDDEN, 2, 16, batch_first=True)
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for _ in range(7):
            h = self.layer(h)
        return self.head(h)


class Refinement(nn.Module):
    """An estimate improved by the same network nine times, the loss of each kept."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES + 2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        y, guesses = x.new_zeros(x.size(0), 2), []
        for _ in range(9):
            y = y + self.net(torch.cat([x, y], dim=-1))
            guesses.append(y)
        return guesses


class Unrolled(nn.Module):
    """Learned shrinkage: a sparse code found by unrolled proximal steps."""

    def __init__(self) -> None:
        super().__init__()
        self.We = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.S = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.theta = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        b = self.We(x)
        z = torch.nn.functional.softshrink(b, 0.05)
        for _ in range(7):
            c = b + self.S(z)
            z = torch.sign(c) * torch.relu(c.abs() - self.theta)
        return z


class Euler(nn.Module):
    """A neural ODE by Euler steps from the input to the output; no data on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, HIDDEN)
        self.field = nn.Sequential(nn.Linear(HIDDEN, 16), nn.Tanh(), nn.Linear(16, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        dt = 1.0 / 12
        for _ in range(12):
            y = y + dt * self.field(y)
        return y


class TreeLSTM(nn.Module):
    """Child-sum over a parse tree given as nested pairs of word ids."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(20, HIDDEN)
        self.iou_x, self.iou_h = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.f_x, self.f_h = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def node(self, tree: tuple) -> tuple[Tensor, Tensor]:
        word, *children = tree
        x = self.word(torch.tensor([word]))
        below = [self.node(child) for child in children]
        h_sum = sum((h for h, _ in below), torch.zeros(1, HIDDEN))
        i, o, u = (self.iou_x(x) + self.iou_h(h_sum)).chunk(3, dim=1)
        c = torch.sigmoid(i) * torch.tanh(u)
        for h_k, c_k in below:
            c = c + torch.sigmoid(self.f_x(x) + self.f_h(h_k)) * c_k
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, tree: tuple) -> Tensor:
        return self.node(tree)[0]


class Composer(nn.Module):
    """Shift and reduce: pairs on a stack are composed until one is left."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(20, HIDDEN)
        self.compose = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, words: Tensor, moves: str) -> Tensor:
        buffer = list(self.word(words).unbind(0))[::-1]
        stack: list[Tensor] = []
        for move in moves:
            if move == "S":
                stack.append(buffer.pop())
            else:
                right, left = stack.pop(), stack.pop()
                stack.append(torch.tanh(self.compose(torch.cat([left, right]))))
        return stack[0]


class Hopfield(nn.Module):
    """A query falls into the nearest of stored patterns by repeated look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(10, FEATURES))

    def forward(self, query: Tensor) -> Tensor:
        for _ in range(7):
            query = torch.softmax(2.0 * query @ self.patterns.T, dim=-1) @ self.patterns
        return query


TREE = (1, (2, (3,), (4,)), (5, (6, (7,), (8,)), (9,)))
RING = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])

SPECIMENS = (
    not_time(
        "graph-grucell", GatedGraph, drawn(floats(NODES, FEATURES), fixed(torch.eye(6).roll(1, 0))),
        "iterations", 7, "message passing with a GRUCell",
    ),
    not_time(
        "graph-written", WrittenGraph, drawn(floats(NODES, FEATURES), fixed(RING)),
        "iterations", 7, "message passing over an edge list",
    ),
    not_time(
        "equilibrium", Equilibrium, drawn(floats(BATCH, FEATURES)),
        "iterations", 13, "DEQ: 12 steps to the fixed point without gradient, one with",
    ),
    not_time(
        "weight-tied-transformer", WeightTied, drawn(tokens(BATCH, 9, below=20)),
        "iterations", 7, "one layer shared by all depths",
    ),
    not_time("refinement", Refinement, drawn(floats(BATCH, FEATURES)), "iterations", 9, "y + f"),
    not_time("lista", Unrolled, drawn(floats(BATCH, FEATURES)), "iterations", 7, "proximal steps"),
    not_time("ode-euler", Euler, drawn(floats(BATCH, FEATURES)), "iterations", 12, "solver steps"),
    not_time("tree-lstm", TreeLSTM, drawn(fixed(TREE)), "tree", 9, "child-sum, by recursion"),
    not_time(
        "shift-reduce", Composer, drawn(tokens(4, below=20), fixed("SSRSSRR")),
        "tree", 7, "composition on a stack: seven moves, of which three compose",
    ),
    not_time("hopfield", Hopfield, drawn(floats(BATCH, FEATURES)), "iterations", 7, "look-ups"),
)  # fmt: skip
