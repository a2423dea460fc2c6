"""Plain recurrences written by hand: one product with the state, in every spelling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.specimen import drawn, floats, tokens, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class CharStep(nn.Module):
    """One step: both read-outs look at the character and the state side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = HIDDEN
        self.i2h = nn.Linear(FEATURES + HIDDEN, HIDDEN)
        self.i2o = nn.Linear(FEATURES + HIDDEN, 4)

    def forward(self, line: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        combined = torch.cat((line, hidden), 1)
        return functional.log_softmax(self.i2o(combined), dim=1), self.i2h(combined)

    def init_hidden(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.hidden_size)


class CharRNN(nn.Module):
    """The tutorial's training loop as a module: the caller of the step owns time."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = CharStep()

    def forward(self, lines: Tensor) -> Tensor:
        hidden = self.rnn.init_hidden(lines.size(1))
        outputs = []
        for i in range(lines.size(0)):
            output, hidden = self.rnn(lines[i], hidden)
            outputs.append(output)
        return torch.stack(outputs)


class TwoLinears(nn.Module):
    """x2h and h2h, batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h = nn.Linear(FEATURES, HIDDEN)
        self.h2h = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], HIDDEN, device=x.device)
        hs = []
        for t in range(x.shape[1]):
            h = torch.tanh(self.x2h(x[:, t]) + self.h2h(h))
            hs.append(h)
        return self.out(torch.stack(hs, dim=1))


class LastStepOnly(nn.Module):
    """Inputs projected before the loop, one class per sequence after it."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(FEATURES, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN)
        self.cls = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.inp(x)
        h = projected.new_zeros(x.size(0), HIDDEN)
        for step in projected.unbind(1):
            h = (step + self.rec(h)).relu()
        return self.cls(h)


class Plain(nn.Module):
    """The parameters and the loop that the spellings below share; each spells one step."""

    def __init__(self) -> None:
        super().__init__()
        self.W_ih = nn.Parameter(torch.randn(FEATURES, HIDDEN) * 0.3)
        self.W_hh = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.3)
        self.b = nn.Parameter(torch.zeros(HIDDEN))

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ self.W_ih + h @ self.W_hh + self.b)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(1), HIDDEN)
        states = []
        for x_t in x:
            h = self.step(x_t, h)
            states.append(h)
        return torch.stack(states)


class Transposed(Plain):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return functional.relu(x @ self.W_ih + self.b + h @ self.W_hh.T)


class Addmm(Plain):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.addmm(torch.mm(x, self.W_ih) + self.b, h, self.W_hh).tanh()


class Einsum(Plain):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        carried = torch.einsum("bi,ij->bj", h, self.W_hh)
        return torch.tanh(torch.einsum("bf,fh->bh", x, self.W_ih) + carried + self.b)


class Functional(Plain):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(functional.linear(h, self.W_hh, self.b) + torch.matmul(x, self.W_ih))


class Normalised(Plain):
    """The state divided by its length after each step."""

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return functional.normalize(super().step(x, h), dim=-1)


class Columns(Plain):
    """The state as columns, the matrix on the left, as in the textbook."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(HIDDEN, x.size(1))
        states = []
        for t in range(len(x)):
            h = torch.tanh(self.W_ih.t().mm(x[t].t()) + self.W_hh.mm(h) + self.b[:, None])
            states.append(h.t())
        return torch.stack(states)


class Unbatched(nn.Module):
    """One sequence, the state a vector, the product a matrix times a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, FEATURES)
        self.U = nn.Parameter(torch.empty(HIDDEN, FEATURES).uniform_(-0.4, 0.4))
        self.W = nn.Parameter(torch.empty(HIDDEN, HIDDEN).uniform_(-0.4, 0.4))
        self.V = nn.Parameter(torch.empty(20, HIDDEN).uniform_(-0.4, 0.4))

    def forward(self, sentence: Tensor) -> Tensor:
        s = torch.zeros(HIDDEN)
        logits = []
        for word in sentence:
            s = torch.tanh(torch.mv(self.U, self.emb(word)) + torch.mv(self.W, s))
            logits.append(self.V.mv(s))
        return torch.stack(logits)


class Blocks(nn.Module):
    """Four small recurrences side by side in one batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(FEATURES, 4 * 6)
        self.recurrent = nn.Parameter(torch.randn(4, 6, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        steps, batch, _ = x.shape
        driven = self.inp(x).view(steps, batch, 4, 6).transpose(1, 2)
        h = torch.zeros(4, batch, 6)
        outputs = []
        for t in range(steps):
            h = torch.tanh(torch.baddbmm(driven[t], h, self.recurrent))
            outputs.append(h.transpose(0, 1).reshape(batch, -1))
        return torch.stack(outputs)


class Jordan(nn.Module):
    """The output, and not the hidden layer, is fed back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(FEATURES + 2, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.size(0), 2)
        ys = []
        for t in range(x.size(1)):
            y = self.fc2(torch.tanh(self.fc1(torch.cat([x[:, t, :], y], dim=-1))))
            ys.append(y)
        return torch.stack(ys, 1)


class DeepTransition(nn.Module):
    """Two layers between one state and the next, with dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FEATURES + HIDDEN, 16), nn.ELU(), nn.Dropout(0.1), nn.Linear(16, HIDDEN)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN)
        hs = []
        for t in range(x.size(1)):
            h = torch.tanh(self.mlp(torch.cat([x[:, t], h], -1)))
            hs.append(h)
        return torch.stack(hs, 1)


class LowRank(nn.Module):
    """The recurrent matrix as a product of two thin ones."""

    def __init__(self) -> None:
        super().__init__()
        self.wx = nn.Linear(FEATURES, HIDDEN)
        self.m = nn.Parameter(torch.randn(HIDDEN, 2))
        self.n = nn.Parameter(torch.randn(HIDDEN, 2))

    def forward(self, x: Tensor) -> Tensor:
        h, hs = x.new_zeros(x.size(0), HIDDEN), []
        for t in range(x.size(1)):
            h = 0.5 * h + 0.5 * (
                h.tanh().matmul(self.n).matmul(self.m.t()) / HIDDEN + self.wx(x[:, t])
            )
            hs.append(h)
        return torch.stack(hs, 1)


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))
BATCH_MAJOR = drawn(floats(BATCH, 9, FEATURES))
RAW = ("W_hh",)

SPECIMENS = (
    written("char-rnn", CharRNN, TIME_MAJOR, 11, ("rnn.i2h.weight",), "one Linear on cat(x, h)"),
    written("two-linears", TwoLinears, BATCH_MAJOR, 9, ("h2h.weight",), "x2h and h2h"),
    written(
        "last-step-only", LastStepOnly, BATCH_MAJOR, 9, ("rec.weight",), "read at the end",
        causal=False,
    ),
    written("raw-parameter", Plain, TIME_MAJOR, 11, RAW, "h @ W"),
    written("transposed", Transposed, TIME_MAJOR, 11, RAW, "h @ W.T, ReLU"),
    written("addmm", Addmm, TIME_MAJOR, 11, RAW, "torch.addmm and torch.mm"),
    written("einsum", Einsum, TIME_MAJOR, 11, RAW, "torch.einsum"),
    written("functional-linear", Functional, TIME_MAJOR, 11, RAW, "F.linear, sigmoid"),
    written("normalised-state", Normalised, TIME_MAJOR, 11, RAW, "state on the unit sphere"),
    written("columns", Columns, TIME_MAJOR, 11, RAW, "W @ h with the batch last"),
    written("unbatched", Unbatched, drawn(tokens(12, below=20)), 12, ("W",), "torch.mv, tokens"),
    written("blocks", Blocks, TIME_MAJOR, 11, ("recurrent",), "torch.baddbmm over blocks"),
    written("jordan", Jordan, BATCH_MAJOR, 9, ("fc1.weight", "fc2.weight"), "output fed back"),
    written(
        "deep-transition", DeepTransition, BATCH_MAJOR, 9, ("mlp.0.weight", "mlp.3.weight"),
        "an MLP between the states",
    ),
    written("low-rank", LowRank, BATCH_MAJOR, 9, ("m", "n"), "leaky rate network, m n^T"),
)  # fmt: skip
