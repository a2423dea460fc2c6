"""A short training: the batches' order, its losses, and when it is given up."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

from rnnguard.inspection.batches import given_batches
from rnnguard.probe.course import losses_of, order_of
from rnnguard.probe.snapshot import Snapshot, fingerprint
from rnnguard.probe.subject import Subject

STEPS, BATCH, FEATURES = 6, 4, 3


class LastStep(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.rnn = nn.GRU(FEATURES, 5, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.drop(self.rnn(x)[0][:, -1]))
        return output


def subject(count: int = 5, rate: float = 0.1, optimizer: Any = SGD, dropout: float = 0) -> Subject:
    torch.manual_seed(0)
    model = LastStep(dropout).double()
    x = [torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64) for _ in range(count)]
    data = [(each, each[:, -1, :1]) for each in x]
    batches = given_batches(model, data, None, nn.MSELoss(), None, count)
    assert batches is not None
    return Subject(model, optimizer(model.parameters(), lr=rate), batches, None, None, 0, False)


def by_hand(mine: Subject, numbers: list[int]) -> list[float]:
    losses = []
    for number in numbers:
        batch, optimizer = mine.batches.batches[number], mine.optimizer
        assert isinstance(optimizer, Optimizer)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(mine.model(*batch.args), batch.target)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_every_batch_comes_once_before_any_comes_again() -> None:
    numbers = order_of(5, 12, seed=3)
    assert sorted(numbers[:5]) == sorted(numbers[5:10]) == list(range(5))
    assert numbers[:5] != numbers[5:10] and order_of(5, 12, seed=3) == numbers
    assert order_of(50, 10, seed=3) != order_of(50, 10, seed=4)


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_losses_are_those_of_the_loop_that_everybody_writes(optimizer: Any) -> None:
    losses, stopped = losses_of(subject(optimizer=optimizer), 9, seed=1)
    assert stopped is None
    assert list(losses) == by_hand(subject(optimizer=optimizer), order_of(5, 9, seed=1))


def test_an_optimizer_that_evaluates_the_loss_itself_is_given_it() -> None:
    losses, _ = losses_of(subject(count=1, rate=1.0, optimizer=LBFGS), 4, seed=0)
    assert losses[-1] < losses[0] / 10


def test_the_seed_draws_what_the_model_draws() -> None:
    first, second, other = (losses_of(subject(dropout=0.5), 6, seed=seed)[0] for seed in (1, 1, 2))
    assert first == second != other


def test_a_diverging_course_ends_early() -> None:
    losses, stopped = losses_of(subject(rate=30.0), 200, seed=0)
    assert len(losses) < 100
    assert stopped is not None and ("risen" in stopped or "not finite" in stopped)


def test_a_loss_that_is_not_finite_ends_it_at_once() -> None:
    mine = subject()
    with torch.no_grad():
        mine.model.get_parameter("head.bias").fill_(math.nan)
    losses, stopped = losses_of(mine, 9, seed=0)
    assert len(losses) == 1 and stopped == "the loss was not finite at step 1"


def test_it_ends_when_time_is_up() -> None:
    assert losses_of(subject(), 9, seed=0, until=time.perf_counter()) == ((), "time was up")


def test_under_a_snapshot_nothing_has_happened() -> None:
    mine = subject(optimizer=Adam, dropout=0.5)
    before = fingerprint(mine.model, mine.optimizer)
    snapshot = Snapshot(mine.model, optimizer=mine.optimizer, others=(mine.batches,))
    losses_of(mine, 5, seed=7)
    assert fingerprint(mine.model, mine.optimizer) != before
    snapshot.restore()
    assert fingerprint(mine.model, mine.optimizer) == before
