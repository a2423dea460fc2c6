"""What hangs on a model is found and given back, however deep it is held."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.probe.holdings import keeper, mutables
from rnnguard.probe.snapshot import fingerprint, untouched


class Memo:
    """A plain helper object that holds a state."""

    def __init__(self) -> None:
        self.h: Tensor | None = None
        self.counts = {"calls": [0]}


class Stateful(nn.Module):
    """Keeps state in every form that users invent."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 16, batch_first=True)
        self.head = nn.Linear(16, 2)
        self.nested: list[Any] = [[None]]
        self.memo = Memo()
        self.cache = {"h": torch.zeros(1)}
        self.history: deque[float] = deque(maxlen=3)
        self.array = np.zeros(3)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        out, self.nested[0][0] = self.rnn(x, self.nested[0][0])
        self.memo.h = self.nested[0][0]
        self.memo.counts["calls"][0] += 1
        self.cache["h"] += 1
        self.history.append(1.0)
        self.array += 1
        torch.rand(1, generator=self.generator)
        logits: Tensor = self.head(out[:, -1])
        return logits


def test_every_form_of_state_is_given_back() -> None:
    model = Stateful()
    batches = [(torch.randn(6, 15, 5), torch.randint(2, (6,)))] * 3
    before = fingerprint(model)
    rnnguard.audit(model, data=batches, loss=nn.CrossEntropyLoss())
    assert fingerprint(model) == before
    assert model.nested == [[None]] and model.memo.h is None and len(model.history) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.nested[0].append(1),
        lambda m: m.memo.counts["calls"].__setitem__(0, 1),
        lambda m: m.cache["h"].add_(1),
        lambda m: m.array.__setitem__(0, 1),
        lambda m: torch.rand(1, generator=m.generator),
        lambda m: setattr(m.memo, "h", torch.ones(1)),
    ],
)
def test_the_fingerprint_sees_it_and_the_snapshot_gives_it_back(
    change: Callable[[Any], Any],
) -> None:
    model = Stateful()
    before = fingerprint(model)
    with untouched(model):
        change(model)
        assert fingerprint(model) != before
    assert fingerprint(model) == before


def test_the_optimizer_is_given_back() -> None:
    model = Stateful()
    optimizer = torch.optim.Adam(model.parameters())

    def step(model: nn.Module, batch: Any) -> Tensor:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        model.nested[0][0] = None
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    batches = [(torch.randn(6, 15, 5), torch.randint(2, (6,)))] * 2
    before = fingerprint(model, optimizer)
    rnnguard.audit(model, optimizer, batches, step=step)
    assert fingerprint(model, optimizer) == before
    assert not optimizer.state


def test_a_sparse_gradient_stands() -> None:
    model = nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.GRU(5, 4))
    ids = torch.randint(9, (4, 7))
    model(ids)[0].sum().backward()
    gradient = model[0].weight.grad
    before = fingerprint(model)
    rnnguard.audit(model, inputs=ids)
    assert model[0].weight.grad is gradient and fingerprint(model) == before


def test_each_object_is_met_once_and_cycles_end() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert list(mutables(loop, loop)) == [loop]


def test_code_and_data_sets_are_left_out() -> None:
    data = torch.utils.data.TensorDataset(torch.ones(2))
    assert list(mutables([print, int, data, "text", 3])) == [[print, int, data, "text", 3]]


@pytest.mark.parametrize("held", [[1, 2], {1, 2}, {"a": 1}, deque([1])])
def test_containers_are_given_back_in_place(held: Any) -> None:
    copy = type(held)(held)
    give_back = keeper(held)
    held.clear()
    give_back()
    assert held == copy
