"""A recurrence of one's own: a tanh cell with an orthogonal matrix, stepped by a loop.

Made-up task: which of several symbols stood at the start of a series, told after the noise that
followed it; the answer is read from the last state.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

Batch = tuple[Tensor, Tensor]

STEPS, SIZE, SYMBOLS, FEATURES = 30, 24, 5, 9

MEMORY = STEPS - 1


class OrthogonalCell(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(features, hidden)
        self.from_state = nn.Linear(hidden, hidden, bias=False)
        # Small inputs keep tanh near the identity, where an orthogonal matrix forgets nothing.
        nn.init.normal_(self.from_input.weight, std=0.1)
        nn.init.zeros_(self.from_input.bias)
        nn.init.orthogonal_(self.from_state.weight)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.from_input(x) + self.from_state(h))


class OwnRNN(nn.Module):
    def __init__(self, features: int, classes: int, hidden: int = 100) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell = OrthogonalCell(features, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, series: Tensor) -> Tensor:
        h = series.new_zeros(series.shape[0], self.hidden)
        for x in series.unbind(dim=1):
            h = self.cell(x, h)
        scores: Tensor = self.head(h)
        return scores


def batches() -> list[Batch]:
    """Series (B, T, features) and the symbol of their first step."""
    generator = torch.Generator().manual_seed(8)
    made = []
    for _ in range(3):
        symbols = torch.randint(0, SYMBOLS, (SIZE,), generator=generator)
        series = 0.2 * torch.randn(SIZE, STEPS, FEATURES, generator=generator)
        series[:, 0, :SYMBOLS] += 2.0 * nn.functional.one_hot(symbols, SYMBOLS)
        made.append((series, symbols))
    return made


def build() -> OwnRNN:
    return OwnRNN(FEATURES, SYMBOLS)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=2e-3)


loss = nn.CrossEntropyLoss()


def step(model: nn.Module, batch: Batch) -> Tensor:
    series, symbols = batch
    value: Tensor = loss(model(series), symbols)
    return value


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    model.train()
    optimizer.zero_grad()
    value = step(model, batch)
    value.backward()
    clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    return value.detach()
