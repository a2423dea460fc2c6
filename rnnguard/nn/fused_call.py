"""One call of a fused module taken apart, so that its kernel can be run layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnguard.inspection.gates import GATES, cell_of


@dataclass(frozen=True)
class Call:
    """What the kernel takes, and how the user gave it.

    rows: (T, B, F), or (sum of the lengths, F) with `batch_sizes` of packed sequences.
    states: (layers x directions, B, size) each, in the order of the rows.
    """

    rows: Tensor
    batch_sizes: Tensor | None
    states: tuple[Tensor, ...]
    packed: PackedSequence | None
    batch_first: bool
    batched: bool

    def result(self, rows: Tensor, states: Sequence[Tensor]) -> tuple[Any, Any]:
        """Output and last state as nn.RNN, nn.LSTM or nn.GRU would give them for this call."""
        given = self.packed
        if given is not None:
            order = (given.sorted_indices, given.unsorted_indices)
            output: Any = PackedSequence(rows, given.batch_sizes, *order)
            states = _permuted(states, given.unsorted_indices)
        elif not self.batched:
            output, states = rows.squeeze(1), [state.squeeze(1) for state in states]
        else:
            output = rows.transpose(0, 1) if self.batch_first else rows
        return output, tuple(states) if len(states) > 1 else states[0]


def taken_apart(module: nn.RNNBase, given: Any, hx: Any) -> Call:
    """The call as rows and states; raises what torch's own modules raise for wrong sizes."""
    packed = given if isinstance(given, PackedSequence) else None
    rows = given if packed is None else packed.data
    sizes = None if packed is None else packed.batch_sizes
    if packed is None and rows.dim() not in (2, 3):
        name = module.mode.split("_")[0]
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {rows.dim()}D instead")
    batched = packed is not None or rows.dim() == 3
    if not batched:
        rows = rows.unsqueeze(0 if module.batch_first else 1)
    carries_cell = _carries_cell(module)
    if hx is None:
        states = _silent(module, rows, sizes, carries_cell)
    else:
        states = _as_batch(tuple(hx) if carries_cell else (hx,), batched)
    if packed is not None:
        states = tuple(_permuted(states, packed.sorted_indices))
    hidden: Any = states if carries_cell else states[0]
    module.check_forward_args(rows, hidden, sizes)
    if packed is None and module.batch_first:
        rows = rows.transpose(0, 1)
    return Call(rows, sizes, states, packed, module.batch_first, batched)


def run_layers(
    module: nn.RNNBase, call: Call, rows: Tensor, weights: Sequence[Tensor], layers: slice
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """torch's kernel over some of the layers: their last output and last states.

    weights: those of the whole module, in the order of its `_flat_weights`.
    """
    ways = 2 if module.bidirectional else 1
    count = layers.stop - layers.start
    per_layer = len(weights) // module.num_layers
    held = list(weights[layers.start * per_layer : layers.stop * per_layer])
    states = tuple(state[layers.start * ways : layers.stop * ways] for state in call.states)
    dropout = module.dropout if count > 1 else 0.0
    rest = (held, module.bias, count, dropout, module.training, module.bidirectional)
    hidden = states if _carries_cell(module) else states[0]
    cell = cell_of(module)
    assert cell is not None
    kernel = getattr(torch._VF, cell)
    if call.batch_sizes is None:
        output, *last = kernel(rows, hidden, *rest, False)
    else:
        output, *last = kernel(rows, call.batch_sizes, hidden, *rest)
    return output, tuple(last)


def _carries_cell(module: nn.RNNBase) -> bool:
    cell = cell_of(module)
    assert cell is not None
    return GATES[cell].carries_cell_state


def _as_batch(states: tuple[Tensor, ...], batched: bool) -> tuple[Tensor, ...]:
    rank = 3 if batched else 2
    if any(state.dim() != rank for state in states):
        kind = "batched 3-D" if batched else "unbatched 2-D"
        ranks = ", ".join(f"{state.dim()}-D" for state in states)
        raise RuntimeError(
            f"For {kind} input, hx and cx should also be {rank}-D but got ({ranks}) tensors"
        )
    return states if batched else tuple(state.unsqueeze(1) for state in states)


def _silent(
    module: nn.RNNBase, rows: Tensor, sizes: Tensor | None, carries_cell: bool
) -> tuple[Tensor, ...]:
    shape = module.get_expected_hidden_size(rows, sizes)
    states = (rows.new_zeros(shape),)
    if not carries_cell:
        return states
    return (*states, rows.new_zeros(*shape[:2], module.hidden_size))


def _permuted(states: Sequence[Tensor], order: Tensor | None) -> Sequence[Tensor]:
    return states if order is None else [state.index_select(1, order) for state in states]
