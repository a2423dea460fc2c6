"""The hand-derived backward of the LSTM sequence.

With th = tanh(norm_c(c)), a step back in time is

    dc += norm_c'(dh o (1 - th^2))        dh_{t-1} = dy_{t-1} + norm_h'(da) W_hh
    da = (dc g i(1-i), dc c_{t-1} f(1-f), dc i (1-g^2), dh th o(1-o))        dc_{t-1} = dc f

Every factor but dh and dc is known beforehand, so it is computed for a chunk of steps at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnnguard.nn.sequences.activation import complement_of_square, times_complement
from rnnguard.nn.sequences.normed import Normed, through_input_norm
from rnnguard.nn.sequences.parts import GateNorms, Kept, LSTMNorms, LSTMWeights
from rnnguard.nn.sequences.products import (
    Totals,
    if_wanted,
    in_blocks,
    input_gradient,
    plus_product,
    summed,
    weight_gradient,
)
from rnnguard.nn.sequences.rungs import Left, Tensors, chunks, earlier


class LSTMCall(NamedTuple):
    """What an LSTM sequence is called with."""

    x: Tensor
    h0: Tensor
    c0: Tensor
    weights: LSTMWeights
    norms: LSTMNorms | None
    kept: Kept


def backward(call: LSTMCall, left: Left, cotangents: Tensors, wanted: LSTMCall) -> LSTMCall:
    """The gradients of a call, from what its forward left."""
    gates, hs, cs, fed, _ = left
    assert gates is not None and hs is not None and cs is not None
    weights, norms, of, totals = call.weights, call.norms, wanted.weights, Totals()
    dy, dh, dc = cotangents
    dh = dh + dy[-1]
    da = torch.empty_like(gates)
    for piece in chunks(len(dy)):
        steps = _Chunk(call, piece, left, da[piece])
        dh, dc = steps.back_through(earlier(dy, piece), dh, dc)
        steps.add_to(totals, wanted)
    into_fed, found = da, None
    if norms is not None:
        gate_norms = GateNorms(norms.gain_ih, norms.gain_hh, norms.shift, norms.eps)
        into_fed, gates_found = through_input_norm(fed, gate_norms, da, totals["gain_hh"])
        assert gates_found is not None
        gain_cell, shift_cell = totals["gain_cell"], totals["shift_cell"]
        found = LSTMNorms(*gates_found[:3], gain_cell, shift_cell, norms.eps)
    return LSTMCall(
        x=if_wanted(wanted.x, lambda: input_gradient(into_fed, weights.ih)),
        h0=dh,
        c0=dc,
        weights=LSTMWeights(
            if_wanted(of.ih, lambda: weight_gradient(into_fed, call.x, weights.ih)),
            totals["hh"],
            if_wanted(of.bias_ih, lambda: summed(into_fed)),
            totals["bias_hh"],
            totals["hr"],
        ),
        norms=found,
        kept=Kept(),
    )


class _Chunk:
    """Some steps: the factors of dh and dc in the gates' gradients, then these themselves."""

    def __init__(self, call: LSTMCall, piece: slice, left: Left, da: Tensor) -> None:
        gates, hs, cs, _, back = left
        assert gates is not None and hs is not None and cs is not None
        self.weights, norms, kept = call.weights, call.norms, call.kept
        self.kept = Kept(*(None if share is None else share[piece] for share in kept))
        self.hs, before, self.da = hs[:-1][piece], cs[:-1][piece], da
        i, self.forget, g, o = gates[piece].chunk(4, -1)
        new = cs[1:][piece]
        if kept.cell is not None:
            new = torch.addcmul(self.forget * before, i, g)
        self.cell = self.back = None
        if norms is not None and back is not None:
            self.cell = Normed(new, norms.gain_cell, norms.shift_cell, norms.eps, keeps_out=True)
            self.back = Normed(back[piece], norms.gain_hh, None, norms.eps)
        normed = None if self.cell is None else self.cell.out
        th = new.tanh() if normed is None else normed.tanh_()
        self.read = None if self.weights.hr is None else o * th
        self.into_read = complement_of_square(th).mul_(o)
        self.into_sum = da
        self.into_out: list[Tensor] = []
        _into_gates((i, self.forget, g, o), before, th, out=da)

    def back_through(self, before: Tensors, dh: Tensor, dc: Tensor) -> tuple[Tensor, Tensor]:
        """From the last step to the first; gives the gradients of the states before them."""
        weights, kept, cell, back = self.weights, self.kept, self.cell, self.back
        ends = self.da.chunk(4, -1)[3].unbind(0)
        writes = in_blocks(self.da, 4)[:, :, :3].unbind(0)
        forgets, slopes, whole = self.forget.unbind(0), self.into_read.unbind(0), self.da.unbind(0)
        sums = []
        for t in range(len(whole) - 1, -1, -1):
            stays_h = stays_c = None
            if kept.hidden is not None:
                stays_h = dh * kept.hidden[t]
                dh = dh - stays_h
            if kept.cell is not None:
                stays_c = dc * kept.cell[t]
                dc = dc - stays_c
            if weights.hr is not None:
                self.into_out.append(dh)
                dh = input_gradient(dh, weights.hr)
            if cell is None:
                dc = torch.addcmul(dc, dh, slopes[t])
            else:
                dc = dc + cell.into_input(t, slopes[t].mul_(dh))
            writes[t].mul_(dc.unsqueeze(1))
            ends[t].mul_(dh)
            dc = dc * forgets[t] if stays_c is None else torch.addcmul(stays_c, dc, forgets[t])
            into = whole[t]
            if back is not None:
                into = back.into_input(t, into)
                sums.append(into)
            onward = before[t] if stays_h is None else before[t] + stays_h
            dh = plus_product(onward, into, weights.hh)
        if sums:
            self.into_sum = torch.stack(sums[::-1])
        return dh, dc

    def add_to(self, totals: Totals, wanted: LSTMCall) -> None:
        """Adds the gradients of what stands on the recurrent side."""
        of, norms, weights, read = wanted.weights, wanted.norms, self.weights, self.read
        totals.add("hh", of.hh, lambda: weight_gradient(self.into_sum, self.hs, weights.hh))
        totals.add("bias_hh", of.bias_hh, lambda: summed(self.into_sum))
        if weights.hr is not None and read is not None:
            hr, into_out = weights.hr, torch.stack(self.into_out[::-1])
            totals.add("hr", of.hr, lambda: weight_gradient(into_out, read, hr))
        if norms is not None and self.back is not None and self.cell is not None:
            back, cell = self.back, self.cell
            totals.add("gain_hh", norms.gain_hh, lambda: back.into_gain(self.da))
            totals.add("gain_cell", norms.gain_cell, lambda: cell.into_gain(self.into_read))
            totals.add("shift_cell", norms.shift_cell, lambda: summed(self.into_read))


def _into_gates(gates: Tensors, before: Tensor, th: Tensor, *, out: Tensor) -> None:
    """The factors of dc and dh in the gradients of the gates' sums."""
    i, f, g, o = gates
    di, df, dg, do = out.chunk(4, -1)
    torch.mul(times_complement(i), g, out=di)
    torch.mul(times_complement(f), before, out=df)
    torch.mul(complement_of_square(g), i, out=dg)
    torch.mul(times_complement(o), th, out=do)
