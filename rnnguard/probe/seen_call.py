"""One torch call of a watched run, and the time axis of a fused recurrent one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FUSED = {"lstm", "gru", "rnn_tanh", "rnn_relu"}

Place = tuple[str | None, str | None, int]
Key = tuple[str, Place]


class Layout(NamedTuple):
    """How the sequence of a fused call lies; `sizes` are a packed one's sequences by step."""

    batch_first: bool
    sizes: Tensor | None
    bidirectional: bool

    def length(self, x: Tensor) -> int:
        """Steps of the sequence."""
        return len(self.sizes) if self.sizes is not None else x.shape[int(self.batch_first)]


def layout_of(operation: str, args: tuple[Any, ...]) -> Layout | None:
    """The layout of a fused call by the order of torch's arguments; None for other calls."""
    if operation not in _FUSED:
        return None
    if isinstance(args[3], tuple | list):
        return Layout(False, args[1], bool(args[8]))
    return Layout(bool(args[8]), None, bool(args[7]))


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; tensors without floating-point values always are."""
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    if not (values.is_floating_point() or values.is_complex()) or values.is_meta:
        return True
    return bool(torch.isfinite(values.detach()).all())


@dataclass
class SeenCall:
    """One torch call: where it stands, which of its repetitions it is, and what came of it.

    `place` is module path, file:line and a mark of the way there through all callers, which
    tells calls on one line apart. `first` is the step of the sequence at which it begins: how
    often it was made before, or how many steps a fused kernel has already gone.
    """

    order: int
    operation: str
    place: Place
    first: int
    layout: Layout | None = None
    asked: bool = False
    """Whether a number that is not finite was among its arguments, as in a mask of -inf."""
    offset: int = 0
    parents: list[SeenCall | Tensor] = field(default_factory=list)
    """What gave it values that are not finite."""
    input_gradient: Tensor | None = None

    @property
    def key(self) -> Key:
        return self.operation, self.place

    @property
    def time(self) -> int:
        return self.first + self.offset

    def steps(self, sequence: Tensor) -> Tensor:
        """Whether each step of a fused call's sequence is finite, (T,)."""
        assert self.layout is not None
        finite, sizes = torch.isfinite(sequence.detach()), self.layout.sizes
        if sizes is not None:
            return torch.stack([part.all() for part in torch.split(finite, sizes.tolist())])
        return finite.transpose(0, int(self.layout.batch_first)).flatten(1).all(1)

    def first_bad_step(self, output: Tensor) -> int:
        """The first step that a fused call got wrong, in the direction in which it went."""
        assert self.layout is not None
        if not self.layout.bidirectional:
            return _index(self.steps(output), last=False)
        there, back = output.chunk(2, -1)
        forward = self.steps(there)
        if not forward.all():
            return _index(forward, last=False)
        return _index(self.steps(back), last=True)

    def last_bad_step(self, gradient: Tensor) -> int | None:
        """The last step whose gradient is not finite; None when all are finite."""
        finite = self.steps(gradient)
        return None if finite.all() else self.first + _index(finite, last=True)


def _index(finite: Tensor, *, last: bool) -> int:
    bad = (~finite).nonzero().flatten()
    return int(bad[-1 if last else 0])


def watched(x: Tensor, call: SeenCall) -> Tensor:
    """The same values under a name of their own, whose gradient is kept for the call."""
    if not torch.is_grad_enabled() or not x.is_floating_point():
        return x
    view = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

    def keep(gradient: Tensor) -> None:
        call.input_gradient = gradient

    view.register_hook(keep)  # type: ignore[no-untyped-call]
    return view
