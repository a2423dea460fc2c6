"""The gate table against what torch's own kernels do with each block."""

from __future__ import annotations

import math

import pytest
import torch
from factories import zeroed
from torch import Tensor, nn

from rnnguard.inspection.gates import (
    GATES,
    cell_of,
    gate_bias,
    is_plain,
    is_recurrent,
    is_single_step,
    parameter_name,
    plain_class,
    recurrences,
    recurrent_block,
    weights_of,
)
from rnnguard.records import Cell

H, B = 3, 2
OPEN = 60.0


class Own(nn.LSTM):
    """A user's subclass."""


def with_biases(module: nn.RNNBase, cell: Cell, **biases: float) -> nn.RNNBase:
    """All weights 0 and these gate biases, in bias_ih."""
    zeroed(module)
    with torch.no_grad():
        for name, value in biases.items():
            module.get_parameter("bias_ih_l0")[GATES[cell].block(name, H)] = value
    return module


def lstm_step(h: float, c: float, **biases: float) -> tuple[Tensor, Tensor]:
    module = with_biases(nn.LSTM(1, H), "lstm", **biases)
    state = torch.full((1, B, H), h), torch.full((1, B, H), c)
    _, (new_h, new_c) = module(torch.zeros(1, B, 1), state)
    return new_h, new_c


def gru_step(h: float, **biases: float) -> Tensor:
    module = with_biases(nn.GRU(1, H), "gru", **biases)
    return module(torch.zeros(1, B, 1), torch.full((1, B, H), h))[1]


def same(tensor: Tensor, value: float) -> bool:
    return bool((tensor - value).abs().max() < 1e-6)


def test_the_lstms_keep_bias_keeps_the_state() -> None:
    assert GATES["lstm"].keep == "f"
    assert same(lstm_step(0.0, 0.7, f=OPEN, i=-OPEN)[1], 0.7)
    assert same(lstm_step(0.0, 0.7, f=-OPEN, i=-OPEN)[1], 0.0)


def test_the_lstms_write_gate_lets_the_candidate_in() -> None:
    assert (GATES["lstm"].write, GATES["lstm"].candidate) == ("i", "g")
    assert same(lstm_step(0.0, 0.7, f=-OPEN, i=OPEN, g=0.5)[1], math.tanh(0.5))
    assert same(lstm_step(0.0, 0.7, f=-OPEN, i=-OPEN, g=0.5)[1], 0.0)


def test_the_lstms_output_gate() -> None:
    assert same(lstm_step(0.0, 0.7, f=OPEN, i=-OPEN, o=OPEN)[0], math.tanh(0.7))
    assert same(lstm_step(0.0, 0.7, f=OPEN, i=-OPEN, o=-OPEN)[0], 0.0)


def test_the_grus_keep_bias_keeps_the_state() -> None:
    assert (GATES["gru"].keep, GATES["gru"].write) == ("z", None)
    assert same(gru_step(0.7, z=OPEN), 0.7)
    assert same(gru_step(0.7, z=-OPEN), 0.0)


def test_the_grus_candidate() -> None:
    assert GATES["gru"].candidate == "n"
    assert same(gru_step(0.7, z=-OPEN, n=0.5), math.tanh(0.5))


@pytest.mark.parametrize(("reset", "expected"), [(OPEN, math.tanh(0.5)), (-OPEN, 0.0)])
def test_the_grus_reset_gate_stands_behind_the_recurrent_product(
    reset: float, expected: float
) -> None:
    module = with_biases(nn.GRU(1, H), "gru", z=-OPEN, r=reset)
    with torch.no_grad():
        module.get_parameter("bias_hh_l0")[GATES["gru"].block("n", H)] = 0.5
    assert same(module(torch.zeros(1, B, 1))[1], expected)


def test_a_plain_rnn_has_one_block() -> None:
    module = with_biases(nn.RNN(1, H), "rnn_tanh", h=0.5)
    assert same(module(torch.zeros(1, B, 1))[1], math.tanh(0.5))
    assert not GATES["rnn_tanh"].gated and not GATES["rnn_relu"].gated


@pytest.mark.parametrize("cell", GATES)
def test_blocks_tile_the_stack(cell: Cell) -> None:
    gates = GATES[cell]
    rows = [row for name in gates.blocks for row in range(100)[gates.block(name, H)]]
    assert rows == list(range(len(gates.blocks) * H))
    assert gates.candidate in gates.blocks
    assert gates.gated == (cell in ("lstm", "gru"))
    assert gates.carries_cell_state == (cell == "lstm")


def modules() -> list[nn.Module]:
    fused = [
        cls(2, H, layers, bias=bias, bidirectional=both)
        for cls in (nn.RNN, nn.LSTM, nn.GRU, Own)
        for layers in (1, 3)
        for bias in (True, False)
        for both in (True, False)
    ]
    projected = [nn.LSTM(2, H, 2, proj_size=1, bidirectional=both) for both in (True, False)]
    single = [
        cls(2, H, bias=bias)
        for cls in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
        for bias in (True, False)
    ]
    return [*fused, *projected, *single]


@pytest.mark.parametrize("module", modules(), ids=str)
def test_every_weight_is_found_once(module: nn.Module) -> None:
    found = {}
    for layer, direction in recurrences(module):
        weights = weights_of(module, layer, direction)
        assert weights.hidden_size == H
        for kind, tensor in weights.tensors().items():
            found[parameter_name(module, kind, layer, direction)] = tensor
    named = dict(module.named_parameters())
    assert found.keys() == named.keys()
    assert all(found[name] is named[name] for name in named)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("both", [True, False])
def test_recurrences_are_in_the_order_of_torchs_states(layers: int, both: bool) -> None:
    module = nn.RNN(1, H, layers, bidirectional=both)
    zeroed(module)
    order = recurrences(module)
    assert len(order) == layers * (2 if both else 1)
    with torch.no_grad():
        for place, (layer, direction) in enumerate(order):
            bias = weights_of(module, layer, direction).bias_ih
            assert bias is not None
            bias.fill_(0.1 * (place + 1))
    _, states = module(torch.zeros(2, B, 1))
    for place, state in enumerate(states):
        assert same(state, math.tanh(0.1 * (place + 1)))


@pytest.mark.parametrize(
    ("module", "cell", "single", "plain"),
    [
        (nn.RNN(1, 2), "rnn_tanh", False, True),
        (nn.RNN(1, 2, nonlinearity="relu"), "rnn_relu", False, True),
        (nn.LSTM(1, 2), "lstm", False, True),
        (nn.GRU(1, 2), "gru", False, True),
        (nn.RNNCell(1, 2), "rnn_tanh", True, True),
        (nn.RNNCell(1, 2, nonlinearity="relu"), "rnn_relu", True, True),
        (nn.LSTMCell(1, 2), "lstm", True, True),
        (nn.GRUCell(1, 2), "gru", True, True),
        (Own(1, 2), "lstm", False, False),
    ],
    ids=str,
)
def test_kinds(module: nn.Module, cell: str, single: bool, plain: bool) -> None:
    assert (cell_of(module), is_single_step(module), is_plain(module)) == (cell, single, plain)
    assert is_recurrent(module)
    assert plain_class(module) is (nn.LSTM if type(module) is Own else type(module))


def test_what_is_no_recurrence() -> None:
    linear = nn.Linear(1, 1)
    assert (is_recurrent(linear), is_recurrent(None), is_plain(linear)) == (False, False, False)
    assert (cell_of(linear), plain_class(linear)) == (None, None)


def test_a_base_class_of_its_own_kind_is_no_known_cell() -> None:
    odd = nn.RNNBase("LSTM", 1, 2)
    assert is_recurrent(odd) and cell_of(odd) is None


def test_the_two_biases_add() -> None:
    module = nn.LSTM(1, H)
    weights = weights_of(module, 0, "forward")
    assert weights.bias_ih is not None and weights.bias_hh is not None
    total = gate_bias(weights, GATES["lstm"], "f")
    assert total is not None and not total.requires_grad
    assert torch.equal(total, (weights.bias_ih + weights.bias_hh)[H : 2 * H].detach())
    bare = weights_of(nn.LSTM(1, H, bias=False), 0, "forward")
    assert gate_bias(bare, GATES["lstm"], "f") is None


def test_the_recurrent_block_maps_state_to_state() -> None:
    plain = weights_of(nn.GRU(1, H), 0, "forward")
    assert torch.equal(recurrent_block(plain, GATES["gru"], "n"), plain.hh[2 * H :].detach())
    projected = weights_of(nn.LSTM(1, H, proj_size=2), 0, "forward")
    block = recurrent_block(projected, GATES["lstm"], "g")
    assert block.shape == (2, 2)
    assert projected.hr is not None
    assert torch.equal(block, (projected.hr @ projected.hh[2 * H : 3 * H]).detach())
