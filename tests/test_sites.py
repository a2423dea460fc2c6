"""Every form that a recurrence takes in a model, and what is found of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import only_site, recorded, sites_in
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from rnnguard.inspection.recording import record
from rnnguard.inspection.sites import (
    left_alone,
    paths_of,
    recurrent_modules,
    unregistered_calls,
)

F, H, T, B = 3, 4, 6, 2
FUSED: dict[str, tuple[type[nn.RNNBase], dict[str, Any], str]] = {
    "tanh": (nn.RNN, {}, "rnn_tanh"),
    "relu": (nn.RNN, {"nonlinearity": "relu"}, "rnn_relu"),
    "lstm": (nn.LSTM, {}, "lstm"),
    "gru": (nn.GRU, {}, "gru"),
}
every_fused = pytest.mark.parametrize("name", FUSED)


class Net(nn.Module):
    """A recurrence with a linear head on its last step."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.rnn(x, *rest)[0]


@every_fused
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fused(name: str, layers: int, bidirectional: bool, batch_first: bool, bias: bool) -> None:
    kind, options, cell = FUSED[name]
    rnn = kind(
        F, H, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias, **options
    )
    x = torch.randn((B, T, F) if batch_first else (T, B, F))
    found = only_site(Net(rnn), x)
    site = found.record
    assert (site.path, site.module, site.cell, site.form) == ("rnn", kind.__name__, cell, "fused")
    assert (site.layers, site.bidirectional, site.batch_first) == (
        layers,
        bidirectional,
        batch_first,
    )
    assert (site.input_size, site.hidden_size, site.proj_size, site.bias) == (F, H, 0, bias)
    assert (site.steps, site.batch, site.window, site.calls, site.packed) == (T, B, T, 1, False)
    assert torch.equal(found.input.x, x.transpose(0, 1) if batch_first else x)
    assert found.input.lengths.tolist() == [T] * B
    depth = layers * (2 if bidirectional else 1)
    assert found.input.hidden.shape == (depth, B, H)
    assert (found.input.cell_state is not None) == (cell == "lstm")


def test_projected() -> None:
    module = nn.LSTM(F, H, proj_size=2, dtype=torch.float64)
    found = only_site(module, torch.randn(T, B, F, dtype=torch.float64))
    assert (found.record.hidden_size, found.record.proj_size) == (H, 2)
    assert found.input.hidden.shape == (1, B, 2)
    assert found.input.cell_state is not None
    assert found.input.cell_state.shape == (1, B, H)


def test_the_root_itself() -> None:
    site = only_site(nn.GRU(F, H), torch.randn(T, B, F)).record
    assert (site.path, site.label) == ("", "(model)")


def test_dropout_is_told() -> None:
    site = only_site(Net(nn.GRU(F, H, 2, dropout=0.25)), torch.randn(T, B, F)).record
    assert site.dropout == 0.25


def test_the_initial_state_is_the_calls() -> None:
    h, c = torch.randn(1, B, H), torch.randn(1, B, H)
    found = only_site(Net(nn.LSTM(F, H)), torch.randn(T, B, F), (h, c))
    assert torch.equal(found.input.hidden, h)
    assert found.input.cell_state is not None
    assert torch.equal(found.input.cell_state, c)
    given = torch.randn(1, B, H)
    assert torch.equal(
        only_site(Net(nn.GRU(F, H)), torch.randn(T, B, F), given).input.hidden, given
    )


def test_one_module_under_several_names_is_one_site() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.GRU(F, F)
            self.inner = nn.ModuleDict({"again": self.encoder})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["again"](self.encoder(x)[0])[0]

    model = Tied()
    site = only_site(model, torch.randn(T, B, F)).record
    assert (site.path, site.aliases, site.calls) == ("encoder", ("inner.again",), 2)
    assert paths_of(model, model.encoder) == ["encoder", "inner.again"]


def test_two_calls_from_zero_are_not_one_sequence() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(F, H)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.gru(a)[1] - self.gru(b)[1]

    site = only_site(Twice(), torch.randn(3, B, F), torch.randn(T, B, F)).record
    assert (site.calls, site.steps, site.window) == (2, T, T)


@every_fused
def test_unbatched_input_is_a_batch_of_one(name: str) -> None:
    kind, options, _ = FUSED[name]
    x = torch.randn(T, F)
    found = only_site(Net(kind(F, H, batch_first=True, **options)), x)
    assert (found.record.steps, found.record.batch) == (T, 1)
    assert torch.equal(found.input.x, x[:, None])


class Packing(nn.Module):
    def __init__(self, rnn: nn.RNNBase, enforce_sorted: bool) -> None:
        super().__init__()
        self.rnn, self.enforce_sorted = rnn, enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=self.enforce_sorted)
        return pad_packed_sequence(self.rnn(packed)[0])[0]


@every_fused
@pytest.mark.parametrize("lengths", [[6, 4, 1], [1, 6, 4]])
def test_packed(name: str, lengths: list[int]) -> None:
    kind, options, _ = FUSED[name]
    x = torch.randn(T, 3, F)
    ordered = lengths == sorted(lengths, reverse=True)
    model = Packing(kind(F, H, bidirectional=True, **options), enforce_sorted=ordered)
    found = only_site(model, x, torch.tensor(lengths))
    assert (found.record.packed, found.record.steps, found.record.batch) == (True, T, 3)
    assert found.input.lengths.tolist() == [6, 4, 1]
    order = torch.tensor(lengths).argsort(descending=True)
    for row, source in enumerate(order.tolist()):
        end = lengths[source]
        assert torch.equal(found.input.x[:end, row], x[:end, source])
        assert float(found.input.x[end:, row].abs().sum()) == 0.0


def test_packed_from_outside() -> None:
    packed = pack_sequence([torch.randn(5, F), torch.randn(2, F)])
    found = only_site(Net(nn.LSTM(F, H)), packed)
    assert found.input.lengths.tolist() == [5, 2]


def test_packed_with_a_state_of_its_own() -> None:
    """torch sorts the state together with the sequences."""
    packed = pack_sequence([torch.randn(2, F), torch.randn(5, F)], enforce_sorted=False)
    state = torch.randn(1, 2, H)
    found = only_site(Net(nn.GRU(F, H)), packed, state)
    assert torch.equal(found.input.hidden, state[:, [1, 0]])


def test_forward_called_directly() -> None:
    class Direct(Net):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return self.rnn.forward(x)[0]

    assert only_site(Direct(nn.LSTM(F, H)), torch.randn(T, B, F)).record.path == "rnn"


class OwnKernel(nn.LSTM):
    """A subclass whose own forward calls the kernel with the module's weights."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        zeros = x.new_zeros(1, x.shape[1], self.hidden_size)
        state = (zeros, zeros)
        return torch.lstm(x, state, self._flat_weights, True, 1, 0.0, False, False, False)


class Outside(nn.Module):
    """A module beside the recurrence calls the kernel with the recurrence's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.GRU(F, H)

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, x.shape[1], H)
        weights = list(self.held.parameters())
        return torch.gru(x, zeros, weights, True, 1, 0.0, False, False, False)[0]


@pytest.mark.parametrize(
    ("model", "path", "module"),
    [(Net(OwnKernel(F, H)), "rnn", "OwnKernel"), (Outside(), "held", "GRU")],
)
def test_the_kernel_called_by_hand(model: nn.Module, path: str, module: str) -> None:
    site = only_site(model, torch.randn(T, B, F)).record
    assert (site.path, site.module, site.steps) == (path, module, T)


CELLS: dict[str, Callable[[int, int], nn.RNNCellBase]] = {
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda i, h: nn.RNNCell(i, h, nonlinearity="relu"),
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
}


class Loop(nn.Module):
    """A cell in a loop; `start` is None, or makes the first state."""

    def __init__(self, cell: nn.RNNCellBase, cut: int = 0, given: bool = False) -> None:
        super().__init__()
        self.cell, self.cut, self.given = cell, cut, given

    def forward(self, x: Tensor) -> Tensor:
        pair = isinstance(self.cell, nn.LSTMCell)
        state: Any = None
        if self.given:
            ones = x.new_ones(x.shape[1], self.cell.hidden_size)
            state = (ones, ones) if pair else ones
        for position, step in enumerate(x):
            if self.cut and position and position % self.cut == 0:
                state = tuple(s.detach() for s in state) if pair else state.detach()
            state = self.cell(step, state)
        return state[0] if pair else state


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("given", [True, False])
def test_cell_loop(name: str, given: bool) -> None:
    x = torch.randn(T, B, F)
    found = only_site(Loop(CELLS[name](F, H), given=given), x)
    site = found.record
    assert (site.path, site.cell, site.form) == ("cell", name, "cell")
    assert (site.steps, site.batch, site.window, site.calls) == (T, B, T, T)
    assert (site.layers, site.bidirectional, site.readout) == (1, False, "final_state")
    assert torch.equal(found.input.x, x)
    assert torch.equal(found.input.hidden, torch.full((1, B, H), float(given)))


@pytest.mark.parametrize("name", CELLS)
def test_a_detach_inside_the_loop_is_the_window(name: str) -> None:
    found = only_site(Loop(CELLS[name](F, H), cut=4), torch.randn(7, B, F))
    assert (found.record.steps, found.record.window) == (7, 3)


class BurnIn(nn.Module):
    """The first steps only warm the state up, without a gradient."""

    def __init__(self, rnn: nn.Module, steps: int) -> None:
        super().__init__()
        self.rnn, self.steps = rnn, steps

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            _, state = self.rnn(x[: self.steps])
        return self.rnn(x[self.steps :], state)[1]


def test_steps_under_no_grad_are_cut_off() -> None:
    site = only_site(BurnIn(nn.GRU(F, H), 2), torch.randn(T, B, F)).record
    assert (site.steps, site.window) == (T, T - 2)


def test_a_cell_under_no_grad_is_cut_off() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(F, H)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                state = self.cell(x[0])
            for step in x[1:]:
                state = self.cell(step, state)
            return state

    site = only_site(Cell(), torch.randn(T, B, F)).record
    assert (site.steps, site.window) == (T, T - 1)


def test_stacked_cells() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList([nn.LSTMCell(F, H), nn.LSTMCell(H, H)])

        def forward(self, x: Tensor) -> Tensor:
            states: list[Any] = [None, None]
            for step in x:
                for layer, cell in enumerate(self.cells):
                    states[layer] = cell(step, states[layer])
                    step = states[layer][0]
            return step

    found = sites_in(Stack(), torch.randn(T, B, F))
    assert [f.record.path for f in found] == ["cells.0", "cells.1"]
    assert [f.record.steps for f in found] == [T, T]
    assert [f.record.input_size for f in found] == [F, H]


def test_a_decoder_steps_a_fused_module() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.GRU(F, H)
            self.decoder = nn.GRU(F, H)
            self.head = nn.Linear(H, F)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.encoder(x)
            token, tokens = x[-1:], []
            for _ in range(4):
                out, state = self.decoder(token, state)
                token = self.head(out)
                tokens.append(token)
            return torch.cat(tokens)

    encoder, decoder = sites_in(Decoder(), torch.randn(T, B, F))
    assert (encoder.record.path, encoder.record.steps) == ("encoder", T)
    assert (decoder.record.path, decoder.record.steps) == ("decoder", 4)
    assert (decoder.record.calls, decoder.record.window) == (4, 4)
    assert decoder.input.x.shape == (4, B, F)


def test_another_batch_is_another_sequence() -> None:
    """A beam search goes on from a state with more rows than the sequence before."""

    class Beam(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(F, H)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.gru(x)
            return self.gru(x[-1:].repeat(1, 3, 1), state.repeat(1, 3, 1))[1]

    site = only_site(Beam(), torch.randn(T, B, F)).record
    assert (site.calls, site.steps, site.batch) == (2, T, B)


def test_cells_in_a_plain_list_are_named_by_their_place() -> None:
    class Forgotten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = [nn.GRUCell(F, H)]
            self.head = nn.Linear(H, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells[0](x))

    model = Forgotten()
    recording = recorded(model, torch.randn(B, F))
    assert sites_in(model, torch.randn(B, F)) == []
    (place,) = unregistered_calls(model, recording)
    file, line = place.rsplit(":", 1)
    assert file == __file__
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert source[int(line) - 1].strip() == "return self.head(self.cells[0](x))"


@pytest.mark.parametrize("how", ["in a step", "frozen", "without gradient"])
def test_a_network_beside_the_model_is_no_mistake(how: str) -> None:
    class WithTeacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.teacher = nn.GRU(F, H), [nn.GRU(F, H).requires_grad_(how != "frozen")]

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(how != "without gradient"):
                told = self.teacher[0](x)[0]
            return self.rnn(x)[0] - told

    x, critic = torch.randn(T, B, F), nn.GRU(H, 1)
    model: nn.Module = Net(nn.LSTM(F, H)) if how == "in a step" else WithTeacher()
    found = record(lambda: critic(model(x)), model, x) if how == "in a step" else recorded(model, x)
    assert len(found.calls) == 2
    assert unregistered_calls(model, found) == []


def test_a_registered_module_is_no_unregistered_call() -> None:
    for model in (Net(nn.LSTM(F, H)), Outside(), Loop(nn.GRUCell(F, H))):
        assert unregistered_calls(model, recorded(model, torch.randn(T, B, F))) == []


def test_a_module_never_called_is_no_site() -> None:
    model = Net(nn.LSTM(F, H))
    model.unused = nn.GRU(F, H)
    assert only_site(model, torch.randn(T, B, F)).record.path == "rnn"
    assert list(recurrent_modules(model)) == ["rnn", "unused"]


def test_no_recurrence_no_site() -> None:
    assert sites_in(nn.Linear(F, H), torch.randn(B, F)) == []


def test_the_location_is_the_callers_line(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.chdir(root)
    site = only_site(Net(nn.LSTM(F, H)), torch.randn(T, B, F)).record
    assert site.location is not None
    file, line = site.location.split(":")
    assert file == "tests/test_sites.py"
    source = (root / file).read_text(encoding="utf-8").splitlines()
    assert source[int(line) - 1].strip() == "return self.rnn(x, *rest)[0]"


def test_a_packed_sequence_built_by_hand() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(F, H)

        def forward(self, data: Tensor, sizes: Tensor) -> Tensor:
            return self.gru(PackedSequence(data, sizes))[1]

    found = only_site(ByHand(), torch.randn(5, F), torch.tensor([2, 2, 1]))
    assert found.input.lengths.tolist() == [3, 2]


def test_shared_weights_name_the_module_that_ran() -> None:
    """Two modules that hold the same parameters are told apart by which one was called."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.GRUCell(F, H), nn.GRUCell(F, H)
            self.second.weight_hh = self.first.weight_hh

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x)

    assert only_site(Shared(), torch.randn(B, F)).record.path == "second"


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        ([], set()),
        (["enc.rnn"], {"enc.rnn", "also.rnn"}),
        ("also.rnn", {"enc.rnn", "also.rnn"}),
        (["also"], {"enc", "also", "enc.rnn", "also.rnn"}),
        (["en"], {"en"}),
        ([""], {""}),
    ],
)
def test_left_alone_is_the_module_under_all_names_and_what_it_holds(
    skip: Any, expected: set[str]
) -> None:
    shared = Net(nn.GRU(F, H))
    model = nn.ModuleDict({"enc": shared, "also": shared, "encoder": nn.LSTM(F, H)})
    assert left_alone(model, skip) == expected
