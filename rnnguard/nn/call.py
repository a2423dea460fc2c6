"""One call of a recurrent module taken apart: rows and states, and back to what torch gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Call:
    """What a kernel takes, and how the user gave it.

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


def taken_apart(module: nn.RNNBase, given: Any, hx: Any, pair: bool) -> Call:
    """The call as rows and states; raises what torch's own modules raise for wrong sizes.

    pair: whether the state is (h, c).
    """
    packed = given if isinstance(given, PackedSequence) else None
    rows = given if packed is None else packed.data
    sizes = None if packed is None else packed.batch_sizes
    if packed is None and rows.dim() not in (2, 3):
        name = module.mode.split("_")[0]
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {rows.dim()}D instead")
    batched = packed is not None or rows.dim() == 3
    if not batched:
        rows = rows.unsqueeze(1)
    elif packed is None and module.batch_first:
        rows = rows.transpose(0, 1)
    _check_input(module, rows, 3 if packed is None else 2)
    batch = rows.shape[1] if sizes is None else int(sizes[0])
    states = _states(module, rows, batch, hx, pair, batched)
    if packed is not None and hx is not None:
        states = tuple(_permuted(states, packed.sorted_indices))
    return Call(rows, sizes, states, packed, module.batch_first, batched)


def _check_input(module: nn.RNNBase, rows: Tensor, rank: int) -> None:
    """torch's `check_input`, by the weight of this very call: it may be functional_call's."""
    weight = module.weight_ih_l0
    assert isinstance(weight, Tensor)
    if rows.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({rows.dtype}) does not match weight dtype ({weight.dtype}). Convert "
            f"input: input.to({weight.dtype}), or convert model: model.to({rows.dtype})"
        )
    if rows.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {rows.dim()}")
    if rows.shape[-1] != module.input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {module.input_size}, got {rows.shape[-1]}"
        )


def _states(
    module: nn.RNNBase, rows: Tensor, batch: int, hx: Any, pair: bool, batched: bool
) -> tuple[Tensor, ...]:
    """The initial states (L D, B, n), zeros where none are given."""
    depth = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size, *([module.hidden_size] if pair else [])]
    shapes = [(depth, batch, size) for size in sizes]
    if hx is None:
        return tuple(rows.new_zeros(shape) for shape in shapes)
    given = tuple(hx) if pair else (hx,)
    rank = 3 if batched else 2
    if any(state.dim() != rank for state in given):
        kind = "batched 3-D" if batched else "unbatched 2-D"
        ranks = ", ".join(f"{state.dim()}-D" for state in given)
        raise RuntimeError(
            f"For {kind} input, hx and cx should also be {rank}-D but got ({ranks}) tensors"
        )
    states = given if batched else tuple(state.unsqueeze(1) for state in given)
    for place, (state, shape) in enumerate(zip(states, shapes, strict=True)):
        name = f"hidden[{place}]" if pair else "hidden"
        module.check_hidden_size(state, shape, f"Expected {name} size {{}}, got {{}}")
    return states


def _permuted(states: Sequence[Tensor], order: Tensor | None) -> Sequence[Tensor]:
    return states if order is None else [state.index_select(1, order) for state in states]
