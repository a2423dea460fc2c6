"""The hand-derived backward of the GRU sequence.

    da = dh (n_r, (h_{t-1} - n) z(1-z), (1-z)(1-n^2) r)        n_r = (1-z)(1-n^2) q_n r(1-r)
    dh_{t-1} = dy_{t-1} + dh z + norm_h'(da) W_hh

Every factor of dh is known beforehand, so it is computed for a chunk of steps at once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rnnguard.nn.sequences.activation import complement_of_square
from rnnguard.nn.sequences.normed import Normed
from rnnguard.nn.sequences.parts import GateNorms, GRUWeights
from rnnguard.nn.sequences.products import (
    Totals,
    in_blocks,
    input_gradient,
    plus_product,
    summed,
    weight_gradient,
)
from rnnguard.nn.sequences.rungs import Left, Tensors, chunks, earlier


class GRUCall(NamedTuple):
    """What a GRU sequence is called with."""

    x: Tensor
    h0: Tensor
    weights: GRUWeights
    norms: GateNorms | None
    kept: Tensor | None


def backward(call: GRUCall, left: Left, cotangents: Tensors, wanted: GRUCall) -> GRUCall:
    """The gradients of a call, from what its forward left."""
    gates, read, hs, fed, back = left
    assert gates is not None and read is not None and hs is not None
    weights, norms, of, totals = call.weights, call.norms, wanted.weights, Totals()
    dy, dh = cotangents
    dh = dh + dy[-1]
    dx = gates.new_empty(call.x.shape) if wanted.x else None
    for piece in chunks(len(dy)):
        normed = None
        if norms is not None and back is not None:
            normed = Normed(back[piece], norms.gain_hh, None, norms.eps)
        steps = _Chunk(gates[piece], read[piece], hs[:-1][piece], normed)
        kept = None if call.kept is None else call.kept[piece]
        dh = steps.back_through(weights.hh, kept, earlier(dy, piece), dh)
        steps.add_to(totals, call, wanted)
        # Chunk by chunk here too: a plane of all gates would be a sixth of the memory.
        into = steps.into_fed
        del steps, normed  # their planes are not needed beside the next ones
        into = _through_input_norm(call, fed, piece, into, totals)
        totals.add("ih", of.ih, partial(weight_gradient, into, call.x[piece], weights.ih))
        totals.add("bias_ih", of.bias_ih, partial(summed, into))
        if dx is not None:
            dx[piece] = input_gradient(into, weights.ih)
    held = (totals[name] for name in ("ih", "hh", "bias_ih", "bias_hh"))
    gains = None
    if norms is not None:
        gains = GateNorms(totals["gain_ih"], totals["gain_hh"], totals["shift"], norms.eps)
    return GRUCall(x=dx, h0=dh, weights=GRUWeights(*held), norms=gains, kept=None)  # type: ignore[arg-type]


def _through_input_norm(
    call: GRUCall, fed: Tensor | None, piece: slice, into: Tensor, totals: Totals
) -> Tensor:
    """Back through the input's norm over some steps, where there is one."""
    norms = call.norms
    if norms is None or fed is None:
        return into
    normed = Normed(fed[piece], norms.gain_ih, norms.shift, norms.eps)
    into, gain, shift = normed.into_all(into)
    totals.add("gain_ih", True, lambda: gain)
    totals.add("shift", True, lambda: shift)
    return into


class _Chunk:
    """Some steps: the factors of dh in the gates' gradients, which `back_through` completes."""

    def __init__(
        self,
        gates: Tensor,
        read: Tensor,
        before: Tensor,
        normed: Normed | None,
    ) -> None:
        r, self.z, n = gates.chunk(3, -1)
        self.before, self.normed = before, normed
        self.da, self.into_fed = torch.empty_like(gates), torch.empty_like(gates)
        into_r, into_z, into_n = self.da.chunk(3, -1)
        rest = 1 - self.z
        self.slope = complement_of_square(n).mul_(rest)
        torch.mul(self.slope, r, out=into_n)
        torch.mul((1 - r).mul_(into_n), read, out=into_r)
        torch.mul(rest.mul_(self.z), before - n, out=into_z)
        self.into_sum = self.da

    def back_through(self, hh: Tensor, kept: Tensor | None, before: Tensors, dh: Tensor) -> Tensor:
        """From the last step to the first; gives the gradient of the state before them."""
        blocks, whole = in_blocks(self.da, 3).unbind(0), self.da.unbind(0)
        zs = self.z.unbind(0)
        dhs, sums = [], None if self.normed is None else torch.empty_like(self.da)
        for t in range(len(whole) - 1, -1, -1):
            onward = before[t]
            if kept is not None:
                stays = dh * kept[t]
                dh = dh - stays
                onward = onward + stays
            dhs.append(dh)
            blocks[t].mul_(dh.unsqueeze(1))
            into = whole[t]
            if self.normed is not None and sums is not None:
                into = sums[t] = self.normed.into_input(t, into)
            dh = plus_product(torch.addcmul(onward, dh, zs[t]), into, hh)
        if sums is not None:
            self.into_sum = sums
        # The input's part of n does not pass through the reset gate.
        both_gates = 2 * self.slope.shape[-1]
        self.into_fed[..., :both_gates] = self.da[..., :both_gates]
        torch.mul(self.slope, torch.stack(dhs[::-1]), out=self.into_fed[..., both_gates:])
        return dh

    def add_to(self, totals: Totals, call: GRUCall, wanted: GRUCall) -> None:
        """Adds the gradients of what stands on the recurrent side."""
        of, hh = wanted.weights, call.weights.hh
        totals.add("hh", of.hh, lambda: weight_gradient(self.into_sum, self.before, hh))
        totals.add("bias_hh", of.bias_hh, lambda: summed(self.into_sum))
        if wanted.norms is not None and self.normed is not None:
            normed = self.normed
            totals.add("gain_hh", wanted.norms.gain_hh, lambda: normed.into_gain(self.da))
