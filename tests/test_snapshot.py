"""A probe leaves no trace, and the fingerprint that says so sees every trace."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy
import pytest
import torch
from factories import subject
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from rnnguard.probe.measurement import Look, measure
from rnnguard.probe.snapshot import Snapshot, fingerprint, moved, same_bits, untouched


class Restless(nn.Module):
    """Changes about everything of its own while it runs."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 1)
        self.register_buffer("average", torch.zeros(4))
        self.hidden: Any = torch.zeros(4)
        self.seen: list[float] = [1.0]
        self.recent: deque[int] = deque([1, 2], maxlen=2)
        self.counts: dict[str, int] = {"calls": 0}
        self.kinds = {"a"}
        self.calls = 0
        self.fail = fail
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        out, (self.hidden, _) = self.lstm(x)
        self.calls += 1
        self.counts["calls"] += 1
        self.seen.append(random.random())
        self.recent.append(int(numpy.random.randint(9)))
        self.kinds.add("b")
        self.fresh = out
        self.average += out.detach().mean((0, 1))
        self.frozen.weight.mul_(1.5)
        self.head.requires_grad_(True)
        self.train(not self.training)
        if self.fail:
            raise ValueError("half-way")
        return self.head(self.frozen(self.norm(out[:, -1]))).mean()


INPUTS = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))


def prepared(model: nn.Module) -> torch.optim.Optimizer:
    """Something of everything: gradients, a frozen weight, an optimizer with moments."""
    optimizer = Adam([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


TARGET = torch.zeros(())


def probed(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Look:
    data = [(INPUTS, TARGET), (INPUTS, TARGET)]
    return measure(subject(model, data, optimizer, loss=nn.MSELoss()))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_probe_leaves_no_trace(mode: str) -> None:
    model = Restless()
    getattr(model.lstm, mode)()
    optimizer = prepared(model)
    before = fingerprint(model, optimizer)
    held = model.seen, model.recent, model.counts, model.kinds, model.hidden
    grads = [parameter.grad for parameter in model.parameters()]
    probed(model, optimizer)
    assert fingerprint(model, optimizer) == before
    after = model.seen, model.recent, model.counts, model.kinds, model.hidden
    assert all(a is b for a, b in zip(held, after, strict=True))
    assert (model.seen, list(model.recent)) == ([1.0], [1, 2])
    assert (model.counts, model.kinds, model.calls) == ({"calls": 0}, {"a"}, 0)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert not hasattr(model, "fresh")


def test_a_probe_that_fails_leaves_no_trace() -> None:
    model = Restless(fail=True)
    optimizer = prepared(model)
    before = fingerprint(model, optimizer)
    with pytest.raises(ValueError, match="half-way"):
        probed(model, optimizer)
    assert fingerprint(model, optimizer) == before


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, nullcontext])
def test_inside_every_grad_mode(around: Callable[[], AbstractContextManager[Any]]) -> None:
    model = Restless()
    before = fingerprint(model)
    with around():
        assert probed(model).measurement.run.grad_norm > 0
        assert torch.is_grad_enabled() == (around is nullcontext)
    assert fingerprint(model) == before


class Stateful(nn.Module):
    """Keeps its hidden state, with the graph, from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)
        self.hidden: Tensor | None = None
        self.states: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        for step in x.unbind(1):
            self.hidden = self.cell(step, self.hidden)
            self.states.append(self.hidden)
        assert self.hidden is not None
        return self.hidden.mean()


def test_a_state_that_keeps_its_graph() -> None:
    model = Stateful()
    model(torch.randn(4, 2, 3))
    first = model.hidden
    assert first is not None
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    before, values = fingerprint(model), first.detach().clone()
    probed(model)
    assert fingerprint(model) == before
    assert model.hidden is first and len(model.states) == 2
    assert torch.equal(first, values)
    first.sum().backward()
    assert model.cell.weight_hh.grad is not None


def test_a_state_changed_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = torch.ones(3)
            self.pair = (torch.ones(2), torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.state.add_(x)
            self.pair[1].mul_(-3)
            return x

    model = InPlace()
    before = fingerprint(model)
    with untouched(model):
        model(torch.ones(3))
        assert fingerprint(model) != before
    assert fingerprint(model) == before
    assert model.state.tolist() == [1, 1, 1] and model.pair[1].tolist() == [1, 1]


def test_gradients_are_hidden_inside_and_the_same_objects_after() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = grad = torch.ones(2, 2)
    with untouched(model):
        assert model.weight.grad is None
        model(torch.ones(1, 2)).sum().backward()
        grad.add_(1)
    assert model.weight.grad is grad
    assert grad.tolist() == [[1, 1], [1, 1]]
    assert model.bias.grad is None


def test_requires_grad_is_given_back() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with untouched(model):
        model.requires_grad_(True)
        model.weight.requires_grad_(False)
    assert model.weight.requires_grad and not model.bias.requires_grad


def test_random_states_are_given_back() -> None:
    model = nn.Linear(2, 2)

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(numpy.random.rand()), random.random()

    with untouched(model):
        first = draw()
    assert draw() == first
    assert draw() != first


def shuffled(generator: torch.Generator) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(16.0).reshape(16, 1))
    return DataLoader(data, batch_size=4, shuffle=True, generator=generator)


def test_a_loaders_own_generator_is_given_back() -> None:
    loader = shuffled(torch.Generator().manual_seed(5))
    with untouched(nn.Linear(1, 1), loader):
        seen = [batch[0].tolist() for batch in loader]
    assert [batch[0].tolist() for batch in loader] == seen
    assert [batch[0].tolist() for batch in loader] != seen


def test_what_was_added_and_taken_away() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mark = 1

    model = Fickle()
    with untouched(model):
        model.mark = 2
        model.new = 3
        model.late = nn.Linear(1, 1)
    assert model.mark == 1
    assert not hasattr(model, "new") and not hasattr(model, "late")
    with untouched(model):
        del model.mark
    assert model.mark == 1


def test_a_minus_zero_is_not_a_zero() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_()
    before = fingerprint(model)
    with untouched(model), torch.no_grad():
        model.weight.neg_()
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([1.0]), torch.tensor(1.0), False),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), True),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.ones(2, 3).T, torch.ones(3, 2), True),
        (torch.ones(0), torch.ones(0), True),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.half), False),
    ],
)
def test_same_bits(a: Tensor, b: Tensor, same: bool) -> None:
    assert same_bits(a, b) is same


def changes() -> Iterator[tuple[str, Callable[[Restless, Adam], object]]]:
    def flip_one_bit(model: Restless, _: Adam) -> None:
        with torch.no_grad():
            model.head.weight.view(torch.int32)[0, 0] ^= 1

    def switch(model: Restless, _: Adam) -> None:
        model.lstm.training = not model.lstm.training

    def new_object(model: Restless, _: Adam) -> None:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())

    def new_class(model: Restless, _: Adam) -> None:
        model.lstm.__class__ = type("Other", (nn.LSTM,), {})

    def moment(model: Restless, optimizer: Adam) -> None:
        optimizer.state[model.head.weight]["exp_avg"][0, 0] += 1

    yield "one bit of a weight", flip_one_bit
    yield "one flag", switch
    yield "another parameter object", new_object
    yield "another class", new_class
    yield "a moment", moment
    yield "a buffer", lambda model, _: model.average.add_(1)
    yield "a state on an attribute", lambda model, _: model.hidden.add_(1)
    yield "a number on an attribute", lambda model, _: setattr(model, "calls", 7)
    yield "a new attribute", lambda model, _: setattr(model, "extra", object())
    yield "requires_grad", lambda model, _: model.frozen.requires_grad_(True)
    yield "a gradient", lambda model, _: [p.grad.add_(1) for p in model.head.parameters()]
    yield "no gradient", lambda model, _: model.zero_grad()
    yield "a hook", lambda model, _: model.head.register_forward_hook(lambda *_: None)
    yield "a rate", lambda _, optimizer: optimizer.param_groups[0].update(lr=0.5)
    yield "torch's random state", lambda *_: torch.rand(1)
    yield "numpy's random state", lambda *_: numpy.random.rand()
    yield "Python's random state", lambda *_: random.random()


CHANGES = dict(changes())


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_sees(change: str) -> None:
    model = Restless()
    optimizer = prepared(model)
    assert isinstance(optimizer, Adam)
    before = fingerprint(model, optimizer)
    assert fingerprint(model, optimizer) == before
    CHANGES[change](model, optimizer)
    assert fingerprint(model, optimizer) != before


def test_the_fingerprint_sees_another_optimizer() -> None:
    model = nn.Linear(2, 2)
    first, second = (SGD(model.parameters(), lr=0.1) for _ in range(2))
    assert fingerprint(model, first) != fingerprint(model, second)


def test_what_else_takes_part_is_given_back() -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu")
    before = fingerprint(model, optimizer, scheduler, scaler)
    snapshot = Snapshot(model, optimizer=optimizer, others=(scheduler, scaler))
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update(3.0)
    scheduler.step()
    for parameter in model.parameters():
        parameter.grad = None
    assert fingerprint(model, optimizer, scheduler, scaler) != before
    snapshot.restore()
    assert fingerprint(model, optimizer, scheduler, scaler) == before
    assert optimizer.param_groups[0]["lr"] == 0.1 and scaler._scale is None


def test_what_is_to_be_left_is_left() -> None:
    model = nn.BatchNorm1d(2)
    snapshot = Snapshot(model, leaving=model.parameters())
    with torch.no_grad():
        model.weight.fill_(3.0)
        assert model.running_mean is not None
        model.running_mean.fill_(3.0)
    snapshot.restore()
    assert model.weight.tolist() == [3.0, 3.0]
    assert model.running_mean.tolist() == [0.0, 0.0]


def test_an_interrupt_waits_until_all_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    before = fingerprint(model)
    snapshot = Snapshot(model)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.bias.fill_(3.0)
    copy, calls = Tensor.copy_, []

    def interrupted(self: Tensor, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return copy(self, *args)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        snapshot.restore()
    assert len(calls) == 3 and fingerprint(model) == before


def test_lent_values_leave_no_trace_and_no_graph_notices() -> None:
    model = nn.Linear(3, 2)
    kept, before = model(torch.randn(4, 3)).pow(2).sum(), fingerprint(model)
    version = model.weight._version
    with pytest.raises(ZeroDivisionError), untouched(model), moved(model.parameters(), 0.3):
        assert fingerprint(model) != before
        raise ZeroDivisionError
    assert fingerprint(model) == before and model.weight._version == version
    kept.backward()
