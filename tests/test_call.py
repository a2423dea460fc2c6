"""A call taken apart, and put together again as torch gives it."""

from __future__ import annotations

import pytest
import torch
from cell_cases import BATCH, F64, HIDDEN, IN, STEPS, ragged
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rnnguard.nn.call import taken_apart


def module(batch_first: bool = False, bidirectional: bool = False) -> nn.RNNBase:
    return nn.GRU(IN, HIDDEN, 2, True, batch_first, 0.0, bidirectional, dtype=F64)


@pytest.mark.parametrize("batch_first", [False, True])
def test_steps_come_first(batch_first: bool) -> None:
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    given = x.transpose(0, 1) if batch_first else x
    call = taken_apart(module(batch_first), given, None, False)
    assert torch.equal(call.rows, x) and call.batch_sizes is None
    assert torch.equal(call.result(call.rows, call.states)[0], given)
    alone = taken_apart(module(batch_first), x[:, 0], None, False)
    assert alone.rows.shape == (STEPS, 1, IN)
    output, state = alone.result(alone.rows, alone.states)
    assert torch.equal(output, x[:, 0]) and state.shape == (2, HIDDEN)


def test_packed_rows_and_states_are_in_the_users_order_again() -> None:
    _, packed = ragged()
    hx = torch.randn(2, BATCH, HIDDEN, dtype=F64)
    call = taken_apart(module(), packed, hx, False)
    assert call.rows is packed.data and call.batch_sizes is packed.batch_sizes
    assert torch.equal(call.states[0], hx[:, packed.sorted_indices])
    output, state = call.result(call.rows, call.states)
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.unsorted_indices, packed.unsorted_indices)
    assert torch.equal(state, hx)


def test_sorted_packed_sequences_have_no_order_to_give_back() -> None:
    x = torch.randn(STEPS, 2, IN, dtype=F64)
    packed = pack_padded_sequence(x, [STEPS, 2])
    hx = torch.randn(2, 2, HIDDEN, dtype=F64)
    call = taken_apart(module(), packed, hx, False)
    assert torch.equal(call.result(call.rows, call.states)[1], hx)


def test_a_pair_has_two_sizes() -> None:
    lstm = nn.LSTM(IN, HIDDEN, bidirectional=True)
    lstm.proj_size = 2  # as one with a projection; building it would warn
    call = taken_apart(lstm, torch.randn(STEPS, BATCH, IN), None, True)
    assert [state.shape for state in call.states] == [(2, BATCH, 2), (2, BATCH, HIDDEN)]
    assert not any(state.any() for state in call.states)
