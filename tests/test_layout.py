"""Rows of a call as (T, B, F), and back."""

from __future__ import annotations

import torch
from cell_cases import BATCH, F64, HIDDEN, IN, LENGTHS, STEPS, ragged
from torch.nn.utils.rnn import PackedSequence

from rnnguard.nn.layout import laid_out


def test_padded_rows_stay_as_they_are() -> None:
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    laid = laid_out(x, None)
    assert laid.x is x and laid.over() is None
    assert laid.rows(x) is x
    assert torch.equal(laid.turned(x), x.flip(0))


def test_packed_sequences_end_where_they_end() -> None:
    sequences, packed = ragged()
    assert isinstance(packed, PackedSequence)
    laid = laid_out(packed.data, packed.batch_sizes)
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
    assert torch.equal(laid.rows(laid.x), packed.data)
    assert laid.rows(torch.zeros(STEPS, BATCH, HIDDEN)).shape == (sum(LENGTHS), HIDDEN)
