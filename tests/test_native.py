"""What the arguments of torch's recurrent kernels mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import recorded
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from rnnguard.inspection.native import NATIVE, NativeCall

F, H, T, B = 3, 4, 5, 2
FUSED = [
    (lambda **o: nn.RNN(F, H, **o), "rnn_tanh", 1),
    (lambda **o: nn.RNN(F, H, nonlinearity="relu", **o), "rnn_relu", 1),
    (lambda **o: nn.GRU(F, H, **o), "gru", 1),
    (lambda **o: nn.LSTM(F, H, **o), "lstm", 2),
]
CELLS = [
    (nn.RNNCell(F, H), "rnn_tanh_cell", 1),
    (nn.RNNCell(F, H, nonlinearity="relu"), "rnn_relu_cell", 1),
    (nn.GRUCell(F, H), "gru_cell", 1),
    (nn.LSTMCell(F, H), "lstm_cell", 2),
]


def only_call(module: nn.Module, *inputs: Any) -> NativeCall:
    (call,) = recorded(module, *inputs).calls
    assert call.kind in NATIVE
    return call


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("make", "kind", "states"), FUSED)
def test_a_fused_call(make: Any, kind: str, states: int, batch_first: bool) -> None:
    module, x = make(batch_first=batch_first, num_layers=2), torch.randn(T, B, F)
    call = only_call(module, x)
    assert (call.kind, call.batch_first, call.module) == (kind, batch_first, module)
    assert torch.equal(call.input, x)
    assert call.batch_sizes is None
    assert [tuple(s.shape) for s in call.state] == [(2, T if batch_first else B, H)] * states
    assert [id(w) for w in call.weights] == [id(p) for p in module.parameters()]


@pytest.mark.parametrize(("make", "kind", "states"), FUSED)
def test_a_packed_call(make: Any, kind: str, states: int) -> None:
    module = make(batch_first=True)
    call = only_call(module, pack_sequence([torch.randn(4, F), torch.randn(2, F)]))
    assert (call.kind, call.batch_first, len(call.state)) == (kind, False, states)
    assert call.batch_sizes is not None
    assert call.batch_sizes.tolist() == [2, 2, 1, 1]
    assert [id(w) for w in call.weights] == [id(p) for p in module.parameters()]


@pytest.mark.parametrize(("module", "kind", "states"), CELLS)
def test_a_cells_call(module: nn.Module, kind: str, states: int) -> None:
    x = torch.randn(B, F)
    call = only_call(module, x)
    assert (call.kind, call.batch_sizes, call.batch_first) == (kind, None, False)
    assert torch.equal(call.input, x)
    assert [tuple(s.shape) for s in call.state] == [(B, H)] * states
    assert [id(w) for w in call.weights] == [id(p) for p in module.parameters()]


def test_without_biases_there_are_two_weights() -> None:
    call = only_call(nn.LSTMCell(F, H, bias=False), torch.randn(B, F))
    assert [tuple(w.shape) for w in call.weights] == [(4 * H, F), (4 * H, H)]
