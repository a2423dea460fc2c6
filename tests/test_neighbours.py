"""Which layers and which parts of a cell's parameters speak for a recurrence."""

from __future__ import annotations

import torch
from torch import nn

from rnnguard.inspection.neighbours import layers_behind, parts_of


def test_only_layers_behind_and_as_wide_as_the_output_count() -> None:
    model = nn.Module()
    model.front = nn.LayerNorm(16)
    model.rnn = nn.LSTM(16, 8, bidirectional=True)
    model.dropout = nn.Dropout()
    model.norm = nn.LayerNorm(16)
    model.other = nn.Linear(5, 5)
    model.head = nn.Linear(16, 3)
    assert layers_behind(model, "rnn") == [model.norm, model.head]
    assert layers_behind(nn.LSTM(3, 4), "") == []


def test_parts_of_a_wide_matrix_and_of_a_gated_bias() -> None:
    cell = nn.ModuleDict(
        {"gates": nn.Linear(7, 8), "other": nn.Linear(4, 8), "far": nn.Linear(2, 2)}
    )
    named = dict(cell.named_parameters())
    spans = [("gates.weight", 1, 3, 7), ("other.bias", 0, 4, 8)]
    parts = parts_of(["gates.weight"], spans, named)
    assert [(n, tuple(t.shape)) for n, t in parts.weights] == [
        ("gates.weight", (8, 3)),
        ("gates.weight", (8, 4)),
    ]
    assert torch.equal(parts.weights[1][1], named["gates.weight"][:, 3:7])
    assert [n for n, _ in parts.biases] == ["gates.bias", "other.bias"]
    assert [(n, t.tolist()) for n, t in parts.gates] == [
        ("other.bias", named["other.bias"][4:].tolist())
    ]
    assert set(parts.shapes) == {(8, 7), (8, 4)}
