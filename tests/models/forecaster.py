"""A probabilistic forecaster: an autoregressive LSTM that gives mean and deviation of each value.

Every series is divided by its own scale; the inputs are the last value, the value a season ago,
the time of day and an embedding of the series. Made-up demand: a daily curve, a level, noise.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

Batch = tuple[Tensor, Tensor, Tensor]

SERIES, SEASON, CONTEXT, HORIZON, SIZE = 30, 12, 36, 24, 18
TIME_FEATURES = 2

MEMORY = 6  # the season comes in as an input, what is left is the level of the last values


class Forecaster(nn.Module):
    def __init__(self, series: int, embedding: int = 6, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(series, embedding)
        self.lstm = nn.LSTM(
            2 + TIME_FEATURES + embedding + 1, hidden, num_layers=2, dropout=0.1, batch_first=True
        )
        self.mean = nn.Linear(hidden, 1)
        self.deviation = nn.Linear(hidden, 1)
        for name, parameter in self.lstm.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
                if "bias_ih" in name:
                    nn.init.ones_(parameter.chunk(4)[1])
            elif "weight_hh" in name:
                for gate in parameter.chunk(4):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.xavier_uniform_(parameter)

    def forward(self, values: Tensor, times: Tensor, series: Tensor) -> tuple[Tensor, ...]:
        """Mean, deviation of every value from the first with a whole season before it, and scale.

        values: (B, T); times: (B, T, features); series: (B,). The scale is that of the context.
        """
        scale = 1.0 + values[:, :CONTEXT].abs().mean(dim=1, keepdim=True)
        scaled = values / scale
        last, season_ago = scaled[:, SEASON - 1 : -1], scaled[:, :-SEASON]
        known = torch.cat([self.embedding(series), scale.log()], dim=-1)
        inputs = torch.cat(
            [
                torch.stack([last, season_ago], dim=-1),
                times[:, SEASON:],
                known.unsqueeze(1).expand(-1, last.shape[1], -1),
            ],
            dim=-1,
        )
        out, _ = self.lstm(inputs)
        deviation = nn.functional.softplus(self.deviation(out).squeeze(-1)) + 1e-3
        return self.mean(out).squeeze(-1) * scale, deviation * scale, scale


def batches() -> list[Batch]:
    """Values, time features, number of the series."""
    generator = torch.Generator().manual_seed(7)
    length = SEASON + CONTEXT + HORIZON
    made = []
    for _ in range(3):
        series = torch.randint(0, SERIES, (SIZE,), generator=generator)
        start = torch.randint(0, SEASON, (SIZE, 1), generator=generator)
        angle = 2 * math.pi * (torch.arange(length) + start) / SEASON
        level = 5.0 * 1.15 ** series.unsqueeze(1)
        drift = 0.02 * torch.randn(SIZE, length, generator=generator).cumsum(dim=1)
        noise = 0.05 * torch.randn(SIZE, length, generator=generator)
        values = level * (1.0 + 0.6 * angle.sin() + drift + noise)
        made.append((values, torch.stack([angle.sin(), angle.cos()], dim=-1), series))
    return made


def build() -> Forecaster:
    return Forecaster(SERIES)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=5e-3)


def step(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of the values in units of their scale."""
    values, times, series = batch
    mean, deviation, scale = model(values, times, series)
    likelihood = torch.distributions.Normal(mean / scale, deviation / scale)
    loss: Tensor = -likelihood.log_prob(values[:, SEASON:] / scale).mean()
    return loss


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    model.train()
    optimizer.zero_grad()
    loss = step(model, batch)
    loss.backward()
    clip_grad_norm_(model.parameters(), max_norm=10.0)
    optimizer.step()
    return loss.detach()
