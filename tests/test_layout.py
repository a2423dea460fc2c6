"""Any input of torch's recurrences as (T, B, F), and back."""

from __future__ import annotations

import pytest
import torch
from cell_cases import BATCH, F64, HIDDEN, IN, LENGTHS, STEPS, ragged
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnguard.nn.layout import laid_out


def module(batch_first: bool = False, bidirectional: bool = False) -> nn.RNNBase:
    return nn.GRU(IN, HIDDEN, 2, True, batch_first, 0.0, bidirectional, dtype=F64)


@pytest.mark.parametrize("batch_first", [False, True])
def test_steps_come_first(batch_first: bool) -> None:
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    given = x.transpose(0, 1) if batch_first else x
    laid = laid_out(module(batch_first), given, None, False)
    assert torch.equal(laid.x, x) and laid.over() is None
    assert torch.equal(laid.output(laid.x), given)
    assert torch.equal(laid.turned(laid.x), x.flip(0))
    alone = laid_out(module(batch_first), x[:, 0], None, False)
    assert alone.x.shape == (STEPS, 1, IN)
    assert torch.equal(alone.output(alone.x), x[:, 0])
    assert alone.final([torch.ones(1, HIDDEN)] * 2).shape == (2, HIDDEN)


def test_packed_sequences_end_where_they_end() -> None:
    sequences, packed = ragged()
    laid = laid_out(module(), packed, None, False)
    order = sorted(range(BATCH), key=lambda index: -LENGTHS[index])
    over = laid.over()
    assert over is not None and over.dtype == F64
    turned = laid.turned(laid.x)
    for place, index in enumerate(order):
        length = LENGTHS[index]
        assert over[:, place, 0].tolist() == [0.0] * length + [1.0] * (STEPS - length)
        assert torch.equal(laid.x[:length, place], sequences[index])
        assert torch.equal(turned[:length, place], sequences[index].flip(0))
    assert torch.equal(laid.turned(turned), laid.x)
    output = laid.output(laid.x)
    assert torch.equal(output.data, packed.data)
    assert torch.equal(output.unsorted_indices, packed.unsorted_indices)


def test_states_of_packed_sequences_are_in_the_users_order() -> None:
    _, packed = ragged()
    hx = torch.randn(2, BATCH, HIDDEN, dtype=F64)
    laid = laid_out(module(), packed, hx, False)
    assert torch.equal(laid.states[0], hx[:, packed.sorted_indices])
    assert torch.equal(laid.final(list(laid.states[0])), hx)


def test_sorted_packed_sequences_have_no_order_to_give_back() -> None:
    x = torch.randn(STEPS, 2, IN, dtype=F64)
    laid = laid_out(module(), pack_padded_sequence(x, [STEPS, 2]), None, False)
    states = [torch.randn(2, HIDDEN) for _ in range(2)]
    assert torch.equal(laid.final(states), torch.stack(states))


def test_a_pair_has_two_sizes() -> None:
    lstm = nn.LSTM(IN, HIDDEN, bidirectional=True)
    lstm.proj_size = 2  # as one with a projection; building it would warn
    laid = laid_out(lstm, torch.randn(STEPS, BATCH, IN), None, True)
    assert [state.shape for state in laid.states] == [(2, BATCH, 2), (2, BATCH, HIDDEN)]
    assert not any(state.any() for state in laid.states)
