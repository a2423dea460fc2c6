"""What hangs on a model is found and given back, however deep it is held."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.probe.holdings import keeper
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


@pytest.mark.parametrize("held", [[1, 2], {1, 2}, {"a": 1}, deque([1])])
def test_containers_are_given_back_in_place(held: Any) -> None:
    copy = type(held)(held)
    give_back = keeper(held)
    held.clear()
    give_back()
    assert held == copy


def counting() -> tuple[Callable[[], None], Callable[[], Any]]:
    """A function that changes all that its closure holds, and one that tells what it holds."""
    calls, seen = 0, [0.0]
    last: Tensor
    noted: dict[str, int] = {}

    def count(known: Any = noted) -> None:
        nonlocal calls, last
        calls += 1
        last = torch.ones(1)
        seen.append(1.0)
        known["calls"] = calls
        count.times = calls  # type: ignore[attr-defined]

    def told() -> Any:
        try:
            return calls, list(seen), dict(noted), vars(count), last
        except NameError:
            return calls, list(seen), dict(noted), vars(count)

    return count, told


class Tally:
    """A plain object whose bound method is a hook."""

    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> None:
        self.calls += 1


def test_what_a_closure_holds_is_given_back() -> None:
    model, (count, told) = nn.Linear(1, 1), counting()
    model.hook = count
    at_rest, before = told(), fingerprint(model)
    with untouched(model):
        model.hook()
        assert fingerprint(model) != before and told() != at_rest
    assert fingerprint(model) == before
    assert told() == at_rest == (0, [0.0], {}, {})


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_object_of_a_bound_method_is_given_back(wrapped: bool) -> None:
    model, tally, seen = nn.Linear(1, 1), Tally(), list[int]()
    model.hook = partial(tally.count) if wrapped else tally.count
    model.note = seen.append
    before = fingerprint(model)
    with untouched(model):
        model.hook()
        model.note(1)
        assert (tally.calls, seen) == (1, [1]) and fingerprint(model) != before
    assert (tally.calls, seen) == (0, []) and fingerprint(model) == before


@pytest.mark.parametrize(
    "generator",
    [
        np.random.default_rng(0),
        np.random.RandomState(0),
        random.Random(0),
        torch.Generator().manual_seed(0),
    ],
)
def test_every_generator_is_given_back(generator: Any) -> None:
    def draw() -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand(1, generator=generator))
        return float(generator.random())

    model = nn.Linear(1, 1)
    model.draws = generator
    before = fingerprint(model)
    with untouched(model):
        first = draw()
        assert fingerprint(model) != before
    assert fingerprint(model) == before
    assert draw() == first


def test_a_loader_that_is_held_gives_its_order_back() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.arange(9.0))
    model = nn.Linear(1, 1)
    model.loader = torch.utils.data.DataLoader(data, shuffle=True, generator=generator)
    before = fingerprint(model)
    with untouched(model):
        first = [float(x) for (x,) in model.loader]
        assert fingerprint(model) != before
    assert [float(x) for (x,) in model.loader] == first


def test_keys_without_plain_equality() -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    held = {a: 1}
    give_back = keeper(held)
    del held[a]
    held[b] = 1
    give_back()
    assert len(held) == 1 and next(iter(held)) is a
