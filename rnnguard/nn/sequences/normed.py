"""A LayerNorm over the steps of a sequence, differentiated by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnguard.nn.sequences.parts import GateNorms
from rnnguard.nn.sequences.rungs import chunks

_backward = torch.ops.aten.native_layer_norm_backward.default


def norm(given: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return torch.layer_norm(given, (given.shape[-1],), gain, shift, eps)


class Normed:
    """The derivatives of norm(given) over steps (T, B, n), for one step or for all.

    `out`: norm(given), which takes a plane of memory, where it is kept.
    """

    def __init__(
        self,
        given: Tensor,
        gain: Tensor,
        shift: Tensor | None,
        eps: float,
        *,
        keeps_out: bool = False,
    ) -> None:
        self.shape, self.gain = (given.shape[-1],), gain
        out, mean, rstd = torch.native_layer_norm(given, self.shape, gain, shift, eps)
        self.out = out if keeps_out else None
        self.whole = (given, self.shape, mean, rstd, gain, torch.zeros_like(gain))
        self.steps = list(zip(given.unbind(0), mean.unbind(0), rstd.unbind(0), strict=True))

    def into_input(self, t: int, into: Tensor) -> Tensor:
        """The gradient of step t's argument (B, n)."""
        given, mean, rstd = self.steps[t]
        only = [True, False, False]
        found = _backward(into, given, self.shape, mean, rstd, self.gain, None, only)
        return found[0]  # type: ignore[no-any-return]

    def into_gain(self, into: Tensor) -> Tensor:
        """The gradient of the gain, over all steps."""
        return _backward(into, *self.whole, [False, True, False])[1]  # type: ignore[no-any-return]

    def into_all(self, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the argument, gain and shift, over all steps."""
        found: tuple[Tensor, Tensor, Tensor] = _backward(into, *self.whole, [True, True, True])
        return found


def through_input_norm(
    fed: Tensor | None, norms: GateNorms | None, into: Tensor, gain_hh: Any
) -> tuple[Tensor, GateNorms | None]:
    """Back through the input's norm, where there is one: its argument's gradient, and the norms'.

    `into` is overwritten, a chunk at a time, since a second plane of its size would cost as much
    memory as all that torch's module keeps. The recurrent norm's gain has its gradient already.
    """
    if norms is None or fed is None:
        return into, None
    gain_ih, shift = torch.zeros_like(norms.gain_ih), torch.zeros_like(norms.shift)
    for piece in chunks(len(fed)):
        normed = Normed(fed[piece], norms.gain_ih, norms.shift, norms.eps)
        into[piece], *parts = normed.into_all(into[piece])
        for total, part in zip((gain_ih, shift), parts, strict=True):
            total.add_(part)
    return into, GateNorms(gain_ih, gain_hh, shift, norms.eps)
