"""The user's data in every usual form, and the guesses when there are none."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rnnguard.errors import RefusedError
from rnnguard.inspection.batches import (
    SAMPLE,
    Batches,
    cloned,
    given_batches,
    inferred_batches,
    random_projection,
)
from rnnguard.inspection.recording import tensors_in

X = torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8)
LENGTHS = torch.full((8,), 6)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum((1, 2))


class WithLengths(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x.sum((1, 2)) / lengths


class OfDict(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"].sum((1, 2))


def given(model: nn.Module, data: Any = None, count: int = 8, **options: Any) -> Batches:
    known: dict[str, Any] = {"inputs": None, "loss": None, "step": None}
    found = given_batches(model, data, **known | options, count=count)
    assert found is not None
    return found


def same(a: object, b: Tensor) -> bool:
    return isinstance(a, Tensor) and torch.equal(a, b)


def test_a_loader() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    found = given(Plain(), loader, count=3)
    assert (len(found.batches), found.per_epoch, found.basis) == (3, 4, "real data")
    assert same(found.batches[1].args[0], X[2:4]) and same(found.batches[1].target, Y[2:4])
    assert found.batches[0].kwargs == {}


@pytest.mark.parametrize(("batches", "per_epoch"), [(SAMPLE - 1, None), (SAMPLE, SAMPLE)])
def test_a_list_of_batches(batches: int, per_epoch: int | None) -> None:
    """A short list is a sample of the data and says nothing of an epoch."""
    data = [(X + index, Y) for index in range(batches)]
    found = given(Plain(), data, count=3)
    assert (len(found.batches), found.per_epoch) == (3, per_epoch)
    assert same(found.batches[2].args[0], X + 2)


def test_a_list_of_one_batch() -> None:
    assert len(given(Plain(), [(X, Y)]).batches) == 1


def test_more_batches_than_needed_are_not_drawn() -> None:
    drawn: list[int] = []

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            drawn.append(1)
            yield X, Y

    found = given(Plain(), endless(), count=3)
    assert (len(found.batches), found.per_epoch, len(drawn)) == (3, None, 3)


@pytest.mark.parametrize("pair", [(X, Y), [X, Y]])
def test_one_pair(pair: Any) -> None:
    found = given(Plain(), pair)
    assert (len(found.batches), found.per_epoch) == (1, None)
    assert same(found.batches[0].args[0], X) and same(found.batches[0].target, Y)


@pytest.mark.parametrize("pair", [((X, LENGTHS), Y), [[X, LENGTHS], Y], ([X, LENGTHS], Y)])
def test_one_pair_with_nested_inputs(pair: Any) -> None:
    (batch,) = given(WithLengths(), pair).batches
    assert same(batch.args[0], X) and same(batch.args[1], LENGTHS) and same(batch.target, Y)


def test_nested_inputs_in_a_list() -> None:
    batches = given(WithLengths(), [((X, LENGTHS), Y)] * 3).batches
    assert len(batches) == 3
    assert same(batches[2].args[1], LENGTHS)


def test_a_dict_becomes_keywords_when_forward_has_its_names() -> None:
    (batch,) = given(WithLengths(), [({"x": X, "lengths": LENGTHS}, Y)]).batches
    assert (batch.args, set(batch.kwargs)) == ((), {"x", "lengths"})


def test_a_dict_is_one_argument_when_it_has_not() -> None:
    inputs = OrderedDict(x=X)
    (batch,) = given(OfDict(), [(inputs, Y)]).batches
    assert (batch.args, batch.kwargs) == ((inputs,), {})
    assert same(given(OfDict(), [(inputs, Y)]).forward(OfDict(), batch), X.sum((1, 2)))


def test_bare_tensors_have_no_target() -> None:
    batches = given(Plain(), [X, X, X]).batches
    assert len(batches) == 3
    assert same(batches[0].args[0], X) and batches[0].target is None


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Plain(), X),
        (WithLengths(), (X, LENGTHS)),
        (WithLengths(), {"x": X, "lengths": LENGTHS}),
        (OfDict(), {"x": X}),
    ],
)
def test_inputs(model: nn.Module, inputs: Any) -> None:
    found = given(model, inputs=inputs)
    assert (found.basis, found.per_epoch, found.has_loss) == ("given inputs", None, False)
    (batch,) = found.batches
    assert found.forward(model, batch).shape == (8,)


def test_data_come_before_inputs() -> None:
    assert given(Plain(), [(X, Y)], inputs=X[:2]).basis == "real data"


def test_neither() -> None:
    assert given_batches(Plain(), None, None, None, None, 8) is None


def test_a_step_of_the_users_gets_its_own_batch() -> None:
    seen: list[Any] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return model(batch["x"]).square().mean()

    data = [{"x": X, "more": "words"}]
    found = given(Plain(), data, step=step)
    (batch,) = found.batches
    loss = found.forward(Plain(), batch)
    assert seen == data and found.has_loss
    assert found.scalar(loss, batch, 0) is loss
    assert found.scalar("no tensor", batch, 0) is None


def test_a_loss_gets_output_and_target() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum()

    found = given(Plain(), [(X, Y)], loss=loss)
    (batch,) = found.batches
    output = found.forward(Plain(), batch)
    assert found.has_loss
    assert same(found.scalar(output, batch, 0), (output - Y).abs().sum())


def test_torchs_losses_get_the_first_of_several_outputs() -> None:
    found = given(Plain(), [(X, Y)], loss=nn.CrossEntropyLoss())
    logits = torch.randn(8, 8)
    expected = nn.CrossEntropyLoss()(logits, Y)
    assert same(found.scalar((logits, X), found.batches[0], 0), expected)
    assert same(found.scalar({"logits": logits, "h": X}, found.batches[0], 0), expected)


def test_the_users_own_loss_gets_the_whole_output() -> None:
    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return output[1].sum()

    found = given(Plain(), [(X, Y)], loss=loss)
    assert same(found.scalar((Y, X), found.batches[0], 0), X.sum())


@pytest.mark.parametrize("data", [[], iter(()), DataLoader(TensorDataset(X[:0], Y[:0]))])
def test_no_batch(data: Any) -> None:
    with pytest.raises(RefusedError) as caught:
        given(Plain(), data)
    assert str(caught.value) == (
        "`data`: it holds no batch. Give an iterable of (inputs, target) pairs. (RG912)"
    )


@pytest.mark.parametrize(
    ("item", "kind"),
    [("text", "str"), ({"x": X}, "dict"), ((X, Y, LENGTHS), "tuple"), (3, "int")],
)
def test_what_is_no_pair(item: Any, kind: str) -> None:
    with pytest.raises(RefusedError) as caught:
        given(Plain(), [item])
    assert str(caught.value) == (
        f"`data`: a batch is a {kind}, not a pair (inputs, target). "
        "Give pairs, or `step=` a function step(model, batch) that gives the loss. (RG912)"
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (3, "int is no iterable. Give an iterable of (inputs, target) pairs."),
        (
            X,
            "it is a single tensor. "
            "Give it as `inputs=`, or together with its target as a pair (inputs, target).",
        ),
    ],
)
def test_what_holds_no_batches(data: Any, said: str) -> None:
    with pytest.raises(RefusedError) as caught:
        given(Plain(), data)
    assert str(caught.value) == f"`data`: {said} (RG912)"


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(x, y) for x, y in zip(X, Y, strict=True)])


def test_a_loader_over_a_stream_has_no_length() -> None:
    loader = DataLoader(Stream(), batch_size=4)
    with pytest.raises(TypeError):
        len(loader)
    found = given(Plain(), loader)
    assert (len(found.batches), found.per_epoch) == (2, None)


def inferred(model: nn.Module) -> list[Batches]:
    return list(inferred_batches(model, 64, 0))


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(found.batches[0].args[0].shape) for found in inferred(model)]


class Chain(nn.Sequential):
    """Stands for any model whose first layer is the first module."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Embedding(7, 3), nn.LSTM(3, 4)], [(8, 64), (64, 8)]),
        ([nn.LSTM(3, 4)], [(64, 8, 3), (8, 64, 3)]),
        ([nn.LSTM(3, 4, batch_first=True)], [(8, 64, 3), (64, 8, 3)]),
        ([nn.Linear(5, 3), nn.GRU(3, 4)], [(8, 64, 5), (64, 8, 5)]),
        ([nn.Conv1d(2, 3, 3), nn.GRU(3, 4)], [(8, 2, 64)]),
        ([nn.GRUCell(3, 4)], [(64, 8, 3), (8, 64, 3)]),
        ([nn.Dropout(), nn.LSTM(3, 4)], [(64, 8, 3), (8, 64, 3)]),
        ([nn.Conv2d(1, 1, 1)], []),
    ],
)
def test_guesses(layers: list[nn.Module], expected: list[tuple[int, ...]]) -> None:
    assert shapes(Chain(*layers)) == expected


def test_guessed_ids_are_ids() -> None:
    ids = inferred(Chain(nn.Embedding(7, 3)))[0].batches[0].args[0]
    assert ids.dtype == torch.long
    assert (int(ids.min()), int(ids.max())) == (0, 6)


def test_guesses_have_the_models_dtype() -> None:
    found = inferred(Chain(nn.LSTM(3, 4, dtype=torch.float64)))[0]
    assert found.batches[0].args[0].dtype == torch.float64
    assert (found.basis, found.has_loss) == ("inferred inputs", False)


def test_guesses_are_the_same_each_time() -> None:
    first, second = (inferred(Chain(nn.LSTM(3, 4)))[0].batches[0].args[0] for _ in range(2))
    assert torch.equal(first, second)
    other = next(inferred_batches(Chain(nn.LSTM(3, 4)), 64, 1)).batches[0].args[0]
    assert not torch.equal(first, other)


class NeedsLengths(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=batch_first)

    def forward(self, x: Tensor, lengths: Tensor, scale: float = 1.0) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, self.rnn.batch_first)
        return self.rnn(packed)[1] * scale


@pytest.mark.parametrize("batch_first", [True, False])
def test_required_lengths_are_full(batch_first: bool) -> None:
    model = NeedsLengths(batch_first)
    found = inferred(model)[0]
    (batch,) = found.batches
    assert batch.kwargs["lengths"].tolist() == [64] * 8
    assert found.forward(model, batch).shape == (1, 8, 4)


def test_other_required_arguments_cannot_be_guessed() -> None:
    class NeedsMore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x: Tensor, graph: Tensor) -> Tensor:
            return x

    assert inferred(NeedsMore()) == []


def test_the_projection_is_fixed_by_its_seed() -> None:
    output = (torch.randn(4, 3, requires_grad=True), {"h": torch.randn(2, requires_grad=True)})
    first, second, other = (random_projection(output, seed) for seed in (0, 0, 1))
    assert first is not None and second is not None and other is not None
    assert float(first.detach()) == float(second.detach()) != float(other.detach())


def test_the_projection_reaches_every_output_and_no_other() -> None:
    a, b = torch.randn(4, requires_grad=True), torch.randn(3, requires_grad=True)
    plain, ids = torch.randn(2), torch.arange(3)
    scalar = random_projection([a, plain, (ids, b)], 0)
    assert scalar is not None
    scalar.backward()
    assert a.grad is not None and b.grad is not None
    assert float(a.grad.abs().min()) > 0 and float(b.grad.abs().min()) > 0
    assert random_projection((plain, ids), 0) is None


def test_the_projection_does_not_grow_with_the_output() -> None:
    """Its gradient has norm about one, so that norms of different models compare."""
    norms = []
    for size in (10, 10_000):
        output = torch.randn(size, requires_grad=True)
        scalar = random_projection(output, 0)
        assert scalar is not None
        scalar.backward()
        assert output.grad is not None
        norms.append(float(output.grad.norm()))
    assert norms == pytest.approx([1.0, 1.0], rel=0.4)


Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Sized:
    x: Tensor
    size: int = field(init=False, default=3)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "nested": lambda x: ([x, "word"], {"a": (x, None)}),
    "ordered dict": lambda x: OrderedDict(a=x),
    "mapping of the user's own": lambda x: UserDict(a=x),
    "named tuple": lambda x: Pair(x, 1),
    "packed": lambda x: pack_padded_sequence(x, [6, 5, 4, 3, 2, 2, 1, 1], batch_first=True),
    "dataclass": Sized,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_clone_has_the_form_and_values_but_not_the_memory(form: str) -> None:
    given = FORMS[form](X.clone())
    own = cloned(given)
    assert type(own) is type(given)
    pairs = list(zip(tensors_in(given), tensors_in(own), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_batches_go_where_the_model_is_as_a_training_loop_sends_them() -> None:
    model, lengths = nn.LSTM(3, 4, device="meta"), torch.tensor([5, 2])
    pack = pack_padded_sequence(torch.randn(5, 2, 3), lengths)
    found = given(model, [((torch.randn(5, 2, 3), lengths), torch.zeros(2)), (pack, lengths)])
    plain, packed = found.batches
    assert [t.device.type for t in (*plain.args, plain.target)] == ["meta", "cpu", "meta"]
    assert (packed.args[0].data.device.type, packed.args[0].batch_sizes.device.type) == (
        "meta",
        "cpu",
    )
    assert [t.device.type for t in tensors_in(plain.raw)] == ["cpu"] * 3
