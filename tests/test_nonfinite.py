"""The first value that is not finite is found where it is made."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnguard.probe.nonfinite import FirstNonfinite, Search, named_inputs, named_parameters


def found(
    model: nn.Module, *args: Any, loss: Callable[[Any], Tensor] | None = None
) -> FirstNonfinite | None:
    """The place in one run of the model on the arguments."""
    inputs, parameters = named_inputs(args, {}, ()), named_parameters(model, ())
    measure = loss or (lambda output: output.float().mean())
    return Search(model, inputs, parameters, 0, 0).run(lambda: measure(model(*args)))


def line_of(place: FirstNonfinite | None) -> str:
    """The source line that the place names."""
    assert place is not None and place.location is not None
    file, _, number = place.location.rpartition(":")
    with open(file, encoding="utf-8") as source:
        return source.read().splitlines()[int(number) - 1].strip()


class Reader(nn.Module):
    """A fused recurrence and a head on its outputs."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.rnn: nn.Module = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(4 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def test_all_finite_is_no_place() -> None:
    assert found(Reader(), torch.randn(2, 6, 3)) is None


def doubling(steps: int = 200) -> tuple[Reader, Tensor]:
    """A ReLU recurrence that doubles at every step, from 1: 2^t overflows float32 at t = 128."""
    model = Reader(nn.RNN, nonlinearity="relu", bias=False)
    with torch.no_grad():
        model.rnn.weight_ih_l0.fill_(1.0)
        model.rnn.weight_hh_l0.copy_(2 * torch.eye(4))
    x = torch.zeros(1, steps, 3)
    x[:, 0, 0] = 1.0
    return model, x


def test_a_fused_recurrence_that_overflows_forward() -> None:
    model, x = doubling()
    place = found(model, x)
    assert place is not None
    assert (place.phase, place.path, place.operation, place.time) == (
        "forward",
        "rnn",
        "rnn_relu",
        128,
    )
    assert line_of(place) == "return self.head(self.rnn(x)[0])"
    assert str(place).startswith("step 0, batch 0: forward `rnn` at rnn_relu, time step 128 (")


def test_time_first_packed_and_reverse() -> None:
    model, x = doubling()
    model.rnn.batch_first = False
    assert found(model, x.transpose(0, 1)).time == 128  # type: ignore[union-attr]
    packed, x = doubling()
    both = pack_padded_sequence(torch.cat((x, x)), torch.tensor([200, 60]), batch_first=True)
    place = found(packed.rnn, both, loss=lambda out: out[0].data.sum())
    assert place is not None and (place.path, place.time) == ("", 128)
    reverse = Reader(nn.RNN, nonlinearity="relu", bias=False, bidirectional=True)
    with torch.no_grad():
        for name, parameter in reverse.rnn.named_parameters():
            parameter.copy_(dict(model.rnn.named_parameters())[name.removesuffix("_reverse")])
        reverse.rnn.weight_hh_l0.zero_()
    late = torch.zeros(1, 200, 3)
    late[:, -1, 0] = 1.0
    assert found(reverse, late).time == 199 - 128  # type: ignore[union-attr]


class Stepped(nn.Module):
    """A cell in a loop, with a scale that makes the state overflow at a chosen step."""

    def __init__(self, bad: int | None = None) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)
        self.bad = bad

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for t, step in enumerate(x.unbind(1)):
            h = self.cell(step, h)
            h = h * (1e39 if t == self.bad else 1.0)
        return h


class HandWritten(nn.Module):
    """A recurrence of plain operations: h squared grows beyond float32."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.full((len(x), 4), 2.0)
        for step in x.unbind(1):
            h = h * h + 0 * self.mix(step)
        return h


def test_a_loop_tells_the_call() -> None:
    place = found(HandWritten(), torch.randn(2, 12, 3))
    assert place is not None
    # 2^(2^k) after k calls overflows float32 at 2^128, in the call counted 6 from 0.
    assert (place.path, place.operation, place.time) == ("", "mul", 6)
    assert line_of(place) == "h = h * h + 0 * self.mix(step)"
    cell = found(Stepped(bad=3), torch.randn(2, 6, 3))
    assert cell is not None and (cell.path, cell.time) == ("", 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_input_is_named(value: float) -> None:
    x = torch.randn(2, 6, 3)
    x[1, 4, 0] = value
    place = found(Reader(), x)
    assert place == FirstNonfinite(step=0, batch=0, phase="input", path="input 0")
    assert str(place) == "step 0, batch 0: the input `input 0`"


def test_a_bad_input_that_is_cleaned_is_not() -> None:
    class Cleaning(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nan_to_num(x))

    x = torch.full((2, 6, 3), math.nan)
    assert found(Cleaning(), x) is None


def test_a_bad_parameter_is_named() -> None:
    model = Reader()
    with torch.no_grad():
        model.head.bias[1] = math.nan
    place = found(model, torch.randn(2, 6, 3))
    assert place is not None and (place.phase, place.path) == ("parameter", "head.bias")


def test_an_infinite_weight_behind_finite_outputs_is_named() -> None:
    model = Reader()
    with torch.no_grad():
        model.rnn.weight_ih_l0[0, 0] = math.inf
    place = found(model, torch.rand(2, 6, 3))
    assert place is not None and (place.phase, place.path) == ("parameter", "rnn.weight_ih_l0")


class Attending(Reader):
    """Pools over time by attention behind a mask of -inf."""

    def __init__(self, square: bool = False) -> None:
        super().__init__()
        self.square = square

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)[0]
        scores = out.sum(-1).masked_fill(x[..., 0] < 0, -math.inf)
        weights = torch.softmax(scores, 1)
        pooled = (weights[..., None] * out).sum(1)
        return self.head(torch.log(pooled - 5) if self.square else pooled)


def test_a_mask_of_minus_infinity_is_no_fault() -> None:
    x = torch.randn(3, 6, 3)
    x[:, 0, 0] = 1.0
    assert found(Attending(), x) is None
    assert line_of(found(Attending(square=True), x)).startswith("return self.head(torch.log(")
    masked = x.clone()
    masked[..., 0] = -1.0
    assert line_of(found(Attending(), masked)) == "weights = torch.softmax(scores, 1)"


def test_a_fault_beside_a_mask_is_named() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(3).masked_fill(torch.tensor([True, False, False]), -math.inf)
            scores = x.sqrt()
            return scores + mask

    place = found(Both(), -torch.ones(3), loss=lambda out: out[1:].sum())
    assert line_of(place) == "scores = x.sqrt()"


class Written(nn.Module):
    """Collects its states by writing into a buffer; one of them is 0 / 0."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[1], len(x), 4)
        h = torch.zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            out[t] = h / (0.0 if t == 2 else 1.0) if t == 2 else h
        return out


def test_values_written_in_place_are_followed() -> None:
    place = found(Written(), torch.randn(2, 5, 3))
    assert place is not None and place.operation in ("div", "__truediv__")
    assert line_of(place).startswith("out[t] = h / ")


class Rooted(nn.Module):
    """The square root of the state's square: its slope at 0 is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = self.rnn(x)[1][0] * 0
        length = state.pow(2).sum(-1).sqrt()
        return self.head(state) + length[:, None]


def test_a_gradient_that_is_not_finite_where_the_forward_is() -> None:
    place = found(Rooted(), torch.randn(6, 2, 3))
    assert place is not None
    assert (place.phase, place.path, place.operation) == ("backward", "", "sqrt")
    assert line_of(place) == "length = state.pow(2).sum(-1).sqrt()"
    assert place.parameter is not None and place.parameter.startswith("rnn.")
    assert place.time is None


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_gradient_that_explodes_through_a_fused_recurrence(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = Reader(kind)
    steps = 600
    with torch.no_grad():
        for parameter in model.rnn.parameters():
            parameter.zero_()
        # At the zero state nothing saturates, and the gradient grows by a fixed factor.
        rows = {nn.RNN: slice(0, 4), nn.GRU: slice(8, 12), nn.LSTM: slice(8, 12)}[kind]
        model.rnn.weight_hh_l0[rows] = 20 * torch.eye(4)
    x = torch.zeros(2, steps, 3)
    place = found(model, x, loss=lambda out: out[:, -1].sum())
    assert place is not None
    assert (place.phase, place.path) == ("backward", "rnn")
    assert place.parameter is not None
    growth = {nn.RNN: 20.0, nn.GRU: 0.5 + 0.25 * 20, nn.LSTM: 0.5 + 0.25 * 20}[kind]
    lags = math.log(3.4e38) / math.log(growth)
    # With no weights from the input, its gradient is 0 until 0 x inf.
    assert place.time is not None and abs((steps - 1 - place.time) - lags) < 8


def test_a_gradient_that_explodes_through_a_loop() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            h = 0 * self.w
            for step in x.unbind(0):
                h = torch.sin(1e3 * h) + 0 * step
            return h

    place = found(Growing(), torch.zeros(40), loss=lambda h: h)
    assert place is not None
    # 1e3^k is beyond float32 in the 13th call from the end.
    assert (place.phase, place.operation, place.time) == ("backward", "mul", 27)
    assert place.parameter == "w"


def test_a_gradient_that_fails_before_the_recurrence() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.rnn = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(torch.sqrt(self.lin(x) * 0))[0]

    place = found(Early(), torch.randn(6, 2, 3))
    assert place is not None
    assert (place.phase, place.operation) == ("backward", "sqrt")
    assert place.parameter in ("lin.weight", "lin.bias")


def test_no_hook_stays() -> None:
    model, x = Rooted(), torch.randn(6, 2, 3)
    held = model(x)  # keeps the nodes alive in which gradients gather
    found(model, x)
    gc.collect()
    kinds = [type(known).__name__ for known in gc.get_objects()]
    assert held.requires_grad and "_Backward" not in kinds


def test_names_of_inputs() -> None:
    a, b, c, d = (torch.zeros(1) for _ in range(4))
    named = named_inputs((a, [b]), {"mask": c}, {"y": d})
    assert {name: id(tensor) for name, tensor in named.items()} == {
        "input 0": id(a),
        "input 1": id(b),
        "mask": id(c),
        "target": id(d),
    }


def test_names_of_parameters_that_only_the_optimizer_holds() -> None:
    model, other = nn.Linear(1, 1), nn.Parameter(torch.zeros(1))
    named = named_parameters(model, [*model.parameters(), other])
    assert list(named) == ["weight", "bias", "parameter 0 outside the model"]
