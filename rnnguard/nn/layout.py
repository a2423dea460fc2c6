"""From what nn.RNN, nn.LSTM and nn.GRU take to (T, B, F) for all, and back to their outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True)
class Laid:
    """One call's input as (T, B, F), its initial states (L D, B, n), and how it came.

    lengths: (B,) of packed sequences in their sorted order, on the CPU; None where all are as
    long as x.
    """

    x: Tensor
    states: tuple[Tensor, ...]
    lengths: Tensor | None
    packed: PackedSequence | None
    batch_first: bool
    batched: bool

    def over(self) -> Tensor | None:
        """(T, B, 1), 1 where a shorter sequence is over and its state stays."""
        if self.lengths is None:
            return None
        return (self._steps() >= self._ends()).unsqueeze(-1).to(self.x.dtype)

    def turned(self, y: Tensor) -> Tensor:
        """y (T, B, n) from each sequence's own end to its start; its own inverse."""
        if self.lengths is None:
            return y.flip(0)
        back = self._ends() - 1 - self._steps()
        index = torch.where(back >= 0, back, self._steps())
        return y.gather(0, index.unsqueeze(-1).expand_as(y))

    def output(self, y: Tensor) -> Tensor | PackedSequence:
        """y (T, B, n) in the form that the input had."""
        if self.packed is not None:
            assert self.lengths is not None
            rows = pack_padded_sequence(y, self.lengths).data
            order = (self.packed.sorted_indices, self.packed.unsorted_indices)
            return PackedSequence(rows, self.packed.batch_sizes, *order)
        if not self.batched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def final(self, states: list[Tensor]) -> Tensor:
        """The last states of every layer and direction as (L D, B, n) in the user's order."""
        last = torch.stack(states)
        if self.packed is not None and self.packed.unsorted_indices is not None:
            return last.index_select(1, self.packed.unsorted_indices)
        return last if self.batched else last.squeeze(1)

    def _steps(self) -> Tensor:
        return torch.arange(len(self.x), device=self.x.device).unsqueeze(1)

    def _ends(self) -> Tensor:
        assert self.lengths is not None
        return self.lengths.to(self.x.device)


def laid_out(module: nn.RNNBase, given: Tensor | PackedSequence, hx: Any, pair: bool) -> Laid:
    """The call's input and initial states, checked as torch's own modules check them.

    pair: whether hx is (h, c). Raises ValueError and RuntimeError in torch's words.
    """
    if isinstance(given, PackedSequence):
        _check_input(module, given.data, 2)
        x, lengths = pad_packed_sequence(PackedSequence(given.data, given.batch_sizes))
        states = _states(module, x, hx, pair, batched=True)
        if hx is not None and given.sorted_indices is not None:
            states = tuple(state.index_select(1, given.sorted_indices) for state in states)
        return Laid(x, states, lengths, given, module.batch_first, True)
    if given.dim() not in (2, 3):
        name = type(module).__name__
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {given.dim()}D instead")
    batched = given.dim() == 3
    x = given if batched else given.unsqueeze(1)
    if batched and module.batch_first:
        x = x.transpose(0, 1)
    _check_input(module, x, 3)
    states = _states(module, x, hx, pair, batched)
    return Laid(x, states, None, None, module.batch_first, batched)


def _check_input(module: nn.RNNBase, x: Tensor, rank: int) -> None:
    """torch's `check_input`, by the weight of this very call: it may be functional_call's."""
    weight = module.weight_ih_l0
    assert isinstance(weight, Tensor)
    if x.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). Convert "
            f"input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {x.dim()}")
    if x.shape[-1] != module.input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {module.input_size}, got {x.shape[-1]}"
        )


def _states(
    module: nn.RNNBase, x: Tensor, hx: Any, pair: bool, batched: bool
) -> tuple[Tensor, ...]:
    """The initial states (L D, B, n), zeros where none are given."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size, *([module.hidden_size] if pair else [])]
    shapes = [(rows, x.shape[1], size) for size in sizes]
    if hx is None:
        return tuple(x.new_zeros(shape) for shape in shapes)
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
