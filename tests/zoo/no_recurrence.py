"""Models with sequences or loops and without any recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.specimen import drawn, floats, not_time, tokens

FEATURES, HIDDEN, BATCH = 5, 8, 3


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class EveryStep(nn.Module):
    """The same Linear in a loop over time: the steps do not hear of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for t in range(x.size(1)):
            out.append(torch.tanh(self.lin(x[:, t])))
        return torch.stack(out, 1)


class CellWithoutState(nn.Module):
    """A GRUCell that gets zeros at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.cell(x_t, x.new_zeros(x.size(0), HIDDEN)) for x_t in x.unbind(1)])


class RunningSum(nn.Module):
    """Scores of the steps are summed up; the sum itself is never read by a step."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.size(0), 2)
        for t in range(x.size(1)):
            total = total + self.score(x[:, t])
        return total / x.size(1)


class Neighbours(nn.Module):
    """Each step sees the input before it: a window of two, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2 * FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        before, out = torch.zeros_like(x[:, 0]), []
        for x_t in x.unbind(1):
            out.append(torch.relu(self.lin(torch.cat([x_t, before], 1))))
            before = x_t
        return torch.stack(out, 1)


class TemporalConv(nn.Module):
    """Dilated causal convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(FEATURES if d == 1 else HIDDEN, HIDDEN, 2, dilation=d) for d in (1, 2, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(1, 2)
        for conv in self.convs:
            h = torch.relu(conv(nn.functional.pad(h, (conv.dilation[0], 0))))
        return h.transpose(1, 2)


class CausalTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(20, HIDDEN), nn.Embedding(16, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + self.place(torch.arange(ids.size(1)))
        ahead = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).triu(1)
        return self.layers(h, mask=ahead)


class Depth(nn.Module):
    """Residual blocks of equal shape, each with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(9))

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return h


class Ensemble(nn.Module):
    """One network, dropout drawn nine times, the answers averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Dropout(0.3), nn.Linear(HIDDEN, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x) for _ in range(9)]).mean(0)


class UnusedRNN(nn.Module):
    """An LSTM that is built and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN)
        self.lin = nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).mean(1)


SEQUENCE = drawn(floats(BATCH, 9, FEATURES))

SPECIMENS = (
    not_time("mlp", Perceptron, drawn(floats(BATCH, FEATURES)), "none", 0, "plain"),
    not_time("every-step", EveryStep, SEQUENCE, "none", 0, "a Linear shared by all steps"),
    not_time("cell-without-state", CellWithoutState, SEQUENCE, "none", 0, "zeros at every step"),
    not_time("running-sum", RunningSum, SEQUENCE, "none", 0, "an accumulator nobody reads"),
    not_time("neighbours", Neighbours, SEQUENCE, "none", 0, "the input before, not a state"),
    not_time("temporal-conv", TemporalConv, SEQUENCE, "none", 0, "dilated, causal"),
    not_time("causal-transformer", CausalTransformer, drawn(tokens(BATCH, 9, below=20)), "none", 0,
             "attention to the past"),
    not_time("depth", Depth, drawn(floats(BATCH, HIDDEN)), "none", 0, "nine distinct blocks"),
    not_time("ensemble", Ensemble, drawn(floats(BATCH, FEATURES)), "none", 0, "nine draws"),
    not_time("unused-lstm", UnusedRNN, SEQUENCE, "none", 0, "built, never called"),
)  # fmt: skip
