"""A GRU whose reset gate acts on the output, over one layer in one direction.

    r, z = sigma(W x_t + U h_{t-1} + b)        n = tanh(W_n x_t + U_n h_{t-1} + b_n)
    c_t = (1 - z) c_{t-1} + z n        h_t = r c_t

c runs from step to step past no matrix and no reset gate, which the GRU's state cannot. Back
in time, a step is

    dc += dh r        da = (dh c_t r(1-r), dc (n - c_{t-1}) z(1-z), dc z (1-n^2))
    dc_{t-1} = dc (1-z)        dh_{t-1} = dy_{t-1} + da U

Every factor of dh and dc is known beforehand, so it is computed for a chunk of steps at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnnguard.nn.sequences.activation import complement_of_square, times_complement
from rnnguard.nn.sequences.parts import GRUWeights, Kept
from rnnguard.nn.sequences.products import (
    add_product,
    both,
    if_wanted,
    in_blocks,
    input_gradient,
    linear,
    plus_product,
    summed,
    weight_gradient,
)
from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, chunks, climb, earlier

_NOTHING = Kept()


class _Call(NamedTuple):
    x: Tensor
    h0: Tensor
    c0: Tensor
    weights: GRUWeights
    kept: Kept


def gate_last_sequence(
    x: Tensor, h0: Tensor, c0: Tensor, weights: GRUWeights, kept: Kept = _NOTHING
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (T, B, H), the last h and the last c (B, H) for x (T, B, F) and weights of n = 3H.

    The weights are those of torch's GRU, rows r, z, n. Where shares of the old states stay, h_t
    is still read off the whole new c_t.
    """
    y, h, c = climb(_RUNGS, _Call(x, h0, c0, weights, kept), weights.ih, kept)
    return y, h, c


def reference(call: _Call) -> Tensors:
    """Rung 0."""
    weights, kept, h, c, outputs = call.weights, call.kept, call.h0, call.c0, []
    bias = both(weights.bias_ih, weights.bias_hh)
    for t, now in enumerate(linear(call.x, weights.ih, bias, c.dtype)):
        r, z, n = (now + linear(h, weights.hh, None, c.dtype)).chunk(3, -1)
        new = torch.lerp(c, n.tanh(), z.sigmoid())
        out = r.sigmoid() * new
        h = out if kept.hidden is None else torch.lerp(out, h, kept.hidden[t].expand_as(out))
        c = new if kept.cell is None else torch.lerp(new, c, kept.cell[t].expand_as(new))
        outputs.append(h)
    return torch.stack(outputs), h, c


def _forward(call: _Call) -> tuple[Tensors, Left]:
    """The states, and the gates (T, B, 3H)."""
    weights, kept, h0, c0 = call.weights, call.kept, call.h0, call.c0
    steps = len(call.x)
    hs, cs = h0.new_empty(steps + 1, *h0.shape), c0.new_empty(steps + 1, *c0.shape)
    hs[0], cs[0] = h0, c0
    gates = linear(call.x, weights.ih, both(weights.bias_ih, weights.bias_hh), c0.dtype)
    turned, h, c = weights.hh.t(), hs[0], cs[0]
    rz = gates[..., : 2 * c0.shape[-1]].unbind(0)
    blocks = [block.unbind(0) for block in gates.chunk(3, -1)]
    states = hs.unbind(0)[1:], cs.unbind(0)[1:]
    for t, (now, r, z, n, out, new) in enumerate(
        zip(gates.unbind(0), *blocks, *states, strict=True)
    ):
        add_product(now, h, turned)
        rz[t].sigmoid_()
        torch.lerp(c, n.tanh_(), z, out=new)
        torch.mul(r, new, out=out)
        if kept.hidden is not None:
            out.lerp_(h, kept.hidden[t].expand_as(out))
        if kept.cell is not None:
            new.lerp_(c, kept.cell[t].expand_as(new))
        h, c = out, new
    return (hs[1:].clone(), hs[-1].clone(), cs[-1].clone()), (gates, hs, cs)


def _backward(call: _Call, left: Left, cotangents: Tensors, wanted: _Call) -> _Call:
    gates, hs, cs = left
    assert gates is not None and hs is not None and cs is not None
    weights, of = call.weights, wanted.weights
    dy, dh, dc = cotangents
    dh, da = dh + dy[-1], torch.empty_like(gates)
    for piece in chunks(len(dy)):
        new = None if call.kept.cell is not None else cs[1:][piece]
        _into_gates(gates[piece], cs[:-1][piece], new, out=da[piece])
        before = earlier(dy, piece)
        dh, dc = _back_through(call, piece, gates[piece], da[piece], before, dh, dc)
    return _Call(
        x=if_wanted(wanted.x, lambda: input_gradient(da, weights.ih)),
        h0=dh,
        c0=dc,
        weights=GRUWeights(
            if_wanted(of.ih, lambda: weight_gradient(da, call.x, weights.ih)),
            if_wanted(of.hh, lambda: weight_gradient(da, hs[:-1], weights.hh)),
            if_wanted(of.bias_ih, lambda: summed(da)),
            if_wanted(of.bias_hh, lambda: summed(da)),
        ),
        kept=Kept(),
    )


def _into_gates(gates: Tensor, old: Tensor, new: Tensor | None, *, out: Tensor) -> None:
    """The factors of dh and dc in the gates' gradients; `new` is known where nothing stays."""
    (r, z, n), (into_r, into_z, into_n) = gates.chunk(3, -1), out.chunk(3, -1)
    torch.mul(times_complement(r), torch.lerp(old, n, z) if new is None else new, out=into_r)
    torch.mul(times_complement(z), n - old, out=into_z)
    torch.mul(complement_of_square(n), z, out=into_n)


def _back_through(
    call: _Call,
    piece: slice,
    gates: Tensor,
    da: Tensor,
    before: Tensors,
    dh: Tensor,
    dc: Tensor,
) -> tuple[Tensor, Tensor]:
    """Completes the gradients of some steps in place; gives those of the states before them."""
    kept = Kept(*(None if share is None else share[piece] for share in call.kept))
    r, z, _ = gates.chunk(3, -1)
    reads, stay = r.unbind(0), (1 - z).unbind(0)
    into_r = da.chunk(3, -1)[0].unbind(0)
    into_c = in_blocks(da, 3)[:, :, 1:].unbind(0)
    for t, whole in reversed(list(enumerate(da.unbind(0)))):
        onward, stays_c = before[t], None
        if kept.hidden is not None:
            stays_h = dh * kept.hidden[t]
            dh = dh - stays_h
            onward = onward + stays_h
        if kept.cell is not None:
            stays_c = dc * kept.cell[t]
            dc = dc - stays_c
        into_r[t].mul_(dh)
        dc = torch.addcmul(dc, dh, reads[t])
        into_c[t].mul_(dc.unsqueeze(1))
        dc = dc * stay[t] if stays_c is None else torch.addcmul(stays_c, dc, stay[t])
        dh = plus_product(onward, whole, call.weights.hh)
    return dh, dc


_RUNGS = Rungs(reference, _forward, _backward)
