"""Runs that differ only by what went in."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from factories import subject
from torch import Tensor, nn

from rnnguard.probe.snapshot import fingerprint, untouched
from rnnguard.probe.stillness import answer, as_called, differ, hold_still, is_noisy, reseed

X, Y = torch.randn(6, 11, 5), torch.randint(3, (6,))


class Net(nn.Module):
    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 8, 2, batch_first=True, dropout=0.5)
        self.norm, self.drop, self.noise = nn.BatchNorm1d(8), nn.Dropout(0.5), noise

    def forward(self, x: Tensor) -> Any:
        out = self.drop(self.norm(self.rnn(x)[0][:, -1]))
        return out + self.noise * (torch.rand(()) + random.random() + numpy.random.rand())


def test_noise_is_held_still_and_given_back() -> None:
    model = Net()
    before = fingerprint(model)
    with untouched(model):
        hold_still(model)
        assert torch.equal(model(X), model(X))
    assert fingerprint(model) == before


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_an_answer_depends_on_the_seed_where_noise_is_left(noise: float) -> None:
    model = Net(noise)
    asked, before = subject(model, [(X, Y)]), fingerprint(model)
    batch = as_called(asked, 0)
    assert batch is not None
    assert torch.equal(answer(asked, batch), answer(asked, batch))
    assert is_noisy(asked, batch, answer(asked, batch)) is (noise > 0)
    assert fingerprint(model) == before


def test_the_call_inside_a_step() -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        return model(batch[0].flip(1)).sum()

    model = Net()
    asked, before = subject(model, [(X, Y)], step=step), fingerprint(model)
    batch = as_called(asked, 0)
    assert batch is not None and torch.equal(batch.args[0], X.flip(1))
    assert batch.target is not None and torch.equal(batch.target, Y)
    assert fingerprint(model) == before and "forward" not in vars(model)


def test_a_step_that_calls_more_than_once() -> None:
    asked = subject(Net(), [(X, Y)], step=lambda model, b: (model(b[0]) + model(b[0])).sum())
    assert as_called(asked, 0) is None


def test_reseeding_covers_all_three() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(numpy.random.rand())

    reseed(3)
    first = draw()
    reseed(3)
    assert draw() == first


def test_what_counts_as_different() -> None:
    a = torch.tensor([1.0, 1000.0])
    assert not differ(a, a + torch.tensor([1e-3, 0.0])) and differ(a, a + torch.tensor([0.1, 0.0]))
    assert differ(a, a[:1]) and differ(a, torch.tensor([1.0, torch.nan]))
    assert not differ(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not differ(torch.zeros(0), torch.zeros(0))
