"""Gradient norms and losses over real backward passes, against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rnnguard.inspection.batches import Batches, given_batches
from rnnguard.probe.gradients import Gradients, gradient_norms
from rnnguard.probe.snapshot import fingerprint, untouched

STEPS, BATCH, IN, HIDDEN = 7, 6, 3, 8


class Net(nn.Module):
    def __init__(self, rnn: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = rnn(IN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0][-1])
        return output


def pairs(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [
        ((k + 1) * torch.randn(STEPS, BATCH, IN), torch.randint(4, (BATCH,))) for k in range(count)
    ]


def batches_of(model: nn.Module, data: Any = None, **options: Any) -> Batches:
    known: dict[str, Any] = {"inputs": None, "loss": None, "step": None}
    found = given_batches(model, data, **known | options, count=8)
    assert found is not None
    return found


def norms(model: nn.Module, data: Any = None, seed: int = 0, **options: Any) -> Gradients:
    with untouched(model):
        return gradient_norms(model, batches_of(model, data, **options), seed)


def torchs_norm(model: nn.Module, loss: Tensor) -> float:
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    dense = [g.to_dense() if g.is_sparse else g for g in found]
    norm = float(torch.nn.utils.get_total_norm(dense))
    for parameter in model.parameters():
        parameter.grad = None
    return norm


@pytest.mark.parametrize("rnn", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_norm_and_the_mean_loss_of_all_batches(
    rnn: type[nn.RNNBase], dtype: torch.dtype
) -> None:
    model = Net(rnn).to(dtype)
    data = [(x.to(dtype), y) for x, y in pairs()]
    found = norms(model, data, loss=nn.CrossEntropyLoss())
    losses = [cross_entropy(model(x), y) for x, y in data]
    assert found.loss == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-6)
    assert found.norms == pytest.approx([torchs_norm(model, loss) for loss in losses], rel=1e-5)
    assert len(set(found.norms)) == 3
    assert not found.nonfinite


def test_the_users_own_step_gives_loss_and_gradient() -> None:
    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return 3 * cross_entropy(model(batch["x"]), batch["y"])

    model = Net()
    data = [{"x": x, "y": y} for x, y in pairs()]
    found = norms(model, data, step=step)
    wanted = [torchs_norm(model, step(model, batch)) for batch in data]
    assert found.norms == pytest.approx(wanted, rel=1e-5)
    assert found.loss == pytest.approx(
        float(sum(step(model, b).detach() for b in data)) / 3, rel=1e-6
    )


def test_without_a_loss_a_projection_of_the_output_is_differentiated() -> None:
    model, x = Net(), torch.randn(STEPS, BATCH, IN)
    found = norms(model, inputs=x)
    assert found.loss is None
    assert found.norms[0] > 0
    assert norms(model, inputs=x).norms == found.norms
    assert norms(model, inputs=x, seed=1).norms != found.norms


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_told(bad: float) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean() + (bad if int(target[0]) == 1 else 0.0)

    model, x = Net(), torch.randn(STEPS, BATCH, IN)
    good = torch.zeros(BATCH, dtype=torch.long)
    assert not norms(model, [(x, good), (x, good), (x, good)], loss=loss).nonfinite
    found = norms(model, [(x, good), (x, good + 1), (x, good)], loss=loss)
    assert found.nonfinite
    assert found.loss is not None and not math.isfinite(found.loss)
    assert all(map(math.isfinite, found.norms))


def test_a_gradient_that_is_not_finite_is_told_though_its_loss_is() -> None:
    """The root of zero: 0 with an infinite slope."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.detach()).abs().sum().sqrt()

    model = Net()
    found = norms(model, pairs(), loss=loss)
    assert found.loss == 0.0
    assert not any(map(math.isfinite, found.norms))
    assert found.nonfinite
    assert (found.median, found.spread) == (0.0, 1.0)


def test_a_sparse_gradient_counts_with_the_dense_ones() -> None:
    class Embedded(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, IN, sparse=True)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(self.table(ids))

    model = Embedded()
    # The same row more than once: its parts must be added before the norm is taken.
    ids, target = torch.randint(3, (STEPS, BATCH)), torch.randint(4, (BATCH,))
    found = norms(model, [(ids, target)] * 3, loss=nn.CrossEntropyLoss())
    wanted = torchs_norm(model, cross_entropy(model(ids), target))
    assert found.norms == pytest.approx([wanted] * 3, rel=1e-5)


def test_frozen_parameters_have_no_part_in_it() -> None:
    model, data = Net(), pairs()
    whole = norms(model, data, loss=nn.CrossEntropyLoss())
    model.rnn.requires_grad_(False)
    found = norms(model, data, loss=nn.CrossEntropyLoss())
    wanted = [torchs_norm(model, cross_entropy(model(x), y)) for x, y in data]
    assert found.norms == pytest.approx(wanted, rel=1e-5)
    assert all(part < full for part, full in zip(found.norms, whole.norms, strict=True))
    model.requires_grad_(False)
    assert norms(model, data, loss=nn.CrossEntropyLoss()) == Gradients((), None, False)


def test_gradients_do_not_add_up_over_batches() -> None:
    model, (pair, *_) = Net(), pairs()
    found = norms(model, [pair] * 3, loss=nn.CrossEntropyLoss())
    assert found.norms == pytest.approx([found.norms[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(("count", "taken"), [(1, [0]), (2, [0, 1]), (8, [0, 4, 7])])
def test_a_few_batches_far_apart_are_passed(count: int, taken: list[int]) -> None:
    model, ((x, y), *_) = Net(), pairs()
    sizes = [(x, y, 1.0 + index) for index in range(count)]
    data = [(x, (y, size)) for x, y, size in sizes]
    found = norms(model, data, loss=lambda o, t: t[1] * cross_entropy(o, t[0]))
    assert [norm / found.norms[0] for norm in found.norms] == pytest.approx(
        [1.0 + index for index in taken], rel=1e-5
    )


def test_a_state_kept_from_call_to_call_keeps_its_graph() -> None:
    """The second backward pass runs through the first call's graph once more."""

    class Stateful(Net):
        state: Any = None

        def forward(self, x: Tensor) -> Tensor:
            output, self.state = self.rnn(x, self.state)
            result: Tensor = self.head(output[-1])
            return result

    model = Stateful()
    found = norms(model, pairs(), loss=nn.CrossEntropyLoss())
    assert len(found.norms) == 3 and not found.nonfinite
    assert model.state is None


def test_nothing_of_it_stays() -> None:
    model, data = Net(), pairs()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = fingerprint(model)
    assert norms(model, data, loss=nn.CrossEntropyLoss()).norms[0] > 0
    assert fingerprint(model) == before


SUMMARIES: list[tuple[tuple[float, ...], float, float]] = [
    ((), 0.0, 1.0),
    ((3.0,), 3.0, 1.0),
    ((1.0, 2.0, 30.0), 2.0, 15.0),
    ((1.0, 3.0), 2.0, 1.5),
    ((math.nan, 2.0, math.inf, 2.0), 2.0, 1.0),
    ((0.0, 0.0), 0.0, 1.0),
]


@pytest.mark.parametrize(("values", "median", "spread"), SUMMARIES)
def test_median_and_spread_of_what_is_finite(
    values: tuple[float, ...], median: float, spread: float
) -> None:
    found = Gradients(values, None, False)
    assert (found.median, found.spread) == (median, spread)


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a step without a tensor": lambda x: float(x.detach().sum()),
    "a step without a graph": lambda x: x.detach().sum(),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_cannot_be_differentiated_gives_no_norm(name: str) -> None:
    model = Net()
    found = norms(model, pairs(), step=lambda m, batch: OUTPUTS[name](m(batch[0])))
    assert found == Gradients((), None, False)
