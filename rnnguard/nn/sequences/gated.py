"""A gate for the plain recurrence: the minimal gated unit over one layer in one direction.

    a_t = W x_t + U h_{t-1} + b        g_t = W_z x_t + U_z h_{t-1} + b_z
    h_t = h_{t-1} + z (phi(a_t) - h_{t-1})        z = sigma(g_t)

The GRU without its reset gate: the light GRU of Ravanelli et al. 2018 (arXiv 1803.10225), with
tanh as a rule, after the minimal gated unit of Zhou et al. 2016 (arXiv 1603.09420). h stays
within the bounds of phi, and z near 0 carries it on unchanged. Back in time, with n = phi(a),

    da = dh z phi'(a)        dg = dh (n - h_{t-1}) z(1-z)
    dh_{t-1} = dy_{t-1} + dh (1-z) + da U + dg U_z

Every factor of dh is known beforehand, so it is computed for a chunk of steps at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnnguard.nn.sequences.activation import ACTIVATIONS, times_complement
from rnnguard.nn.sequences.parts import GRUWeights
from rnnguard.nn.sequences.products import (
    add_product,
    if_wanted,
    in_blocks,
    input_gradient,
    linear,
    plus_product,
    summed,
    weight_gradient,
)
from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, chunks, climb, earlier


class _Call(NamedTuple):
    """What the sequence is called with; 2H rows, the candidate's and then the gate's."""

    x: Tensor
    h0: Tensor
    ih: Tensor
    hh: Tensor
    bias: Tensor | None
    activation: str
    kept: Tensor | None


def gated_sequence(
    x: Tensor,
    h0: Tensor,
    weights: GRUWeights,
    gate: GRUWeights,
    activation: str = "tanh",
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (T, B, H) and the last state (B, H) for x (T, B, F), weights and gate of n = H.

    Each of `weights` and `gate` may go without either bias. `activation` is one of ACTIVATIONS;
    `kept` (T, B, 1 or H) gives the shares of h that stay.
    """
    ih, hh = torch.cat((weights.ih, gate.ih)), torch.cat((weights.hh, gate.hh))
    biases = _bias(weights), _bias(gate)
    bias = None
    if biases != (None, None):
        none = hh.new_zeros(len(weights.hh))
        bias = torch.cat([none if found is None else found for found in biases])
    y, h = climb(_RUNGS, _Call(x, h0, ih, hh, bias, activation, kept), ih, (kept,))
    return y, h


def _bias(weights: GRUWeights) -> Tensor | None:
    found = [bias for bias in (weights.bias_ih, weights.bias_hh) if bias is not None]
    return None if not found else found[0] if len(found) == 1 else found[0] + found[1]


def reference(call: _Call) -> Tensors:
    """Rung 0."""
    phi, h, outputs = ACTIVATIONS[call.activation].plain, call.h0, []
    for t, now in enumerate(linear(call.x, call.ih, call.bias, h.dtype)):
        a, gate = (now + linear(h, call.hh, None, h.dtype)).chunk(2, -1)
        new = torch.lerp(h, phi(a), gate.sigmoid())
        h = new if call.kept is None else torch.lerp(new, h, call.kept[t].expand_as(new))
        outputs.append(h)
    return torch.stack(outputs), h


def _forward(call: _Call) -> tuple[Tensors, Left]:
    """The states, and candidates and gates (T, B, 2H)."""
    h0, phi_ = call.h0, ACTIVATIONS[call.activation].in_place
    hs = h0.new_empty(len(call.x) + 1, *h0.shape)
    hs[0] = h0
    gates = linear(call.x, call.ih, call.bias, h0.dtype)
    turned, h = call.hh.t(), hs[0]
    n, z = (half.unbind(0) for half in gates.chunk(2, -1))
    for t, (now, new) in enumerate(zip(gates.unbind(0), hs.unbind(0)[1:], strict=True)):
        add_product(now, h, turned)
        torch.lerp(h, phi_(n[t]), z[t].sigmoid_(), out=new)
        if call.kept is not None:
            new.lerp_(h, call.kept[t].expand_as(new))
        h = new
    return (hs[1:].clone(), hs[-1].clone()), (gates, hs)


def _backward(call: _Call, left: Left, cotangents: Tensors, wanted: _Call) -> _Call:
    gates, hs = left
    assert gates is not None and hs is not None
    dy, dh = cotangents
    dh, da = dh + dy[-1], torch.empty_like(gates)
    for piece in chunks(len(dy)):
        _into_gates(call, gates[piece], hs[:-1][piece], out=da[piece])
        dh = _back_through(call, piece, gates[piece], da[piece], earlier(dy, piece), dh)
    return _Call(
        x=if_wanted(wanted.x, lambda: input_gradient(da, call.ih)),
        h0=dh,
        ih=if_wanted(wanted.ih, lambda: weight_gradient(da, call.x, call.ih)),
        hh=if_wanted(wanted.hh, lambda: weight_gradient(da, hs[:-1], call.hh)),
        bias=if_wanted(wanted.bias, lambda: summed(da)),
        activation="",
        kept=None,
    )


def _into_gates(call: _Call, gates: Tensor, old: Tensor, *, out: Tensor) -> None:
    """The factors of dh in the gradients of candidate and gate."""
    (n, z), (into_n, into_z) = gates.chunk(2, -1), out.chunk(2, -1)
    torch.mul(ACTIVATIONS[call.activation].slope(n), z, out=into_n)
    torch.mul(times_complement(z), n - old, out=into_z)


def _back_through(
    call: _Call, piece: slice, gates: Tensor, da: Tensor, before: Tensors, dh: Tensor
) -> Tensor:
    """Completes the gradients of some steps in place; gives that of the state before them."""
    kept = None if call.kept is None else call.kept[piece]
    stay = (1 - gates.chunk(2, -1)[1]).unbind(0)
    blocks, whole = in_blocks(da, 2).unbind(0), da.unbind(0)
    for t in range(len(whole) - 1, -1, -1):
        onward = before[t]
        if kept is not None:
            stays = dh * kept[t]
            dh = dh - stays
            onward = onward + stays
        blocks[t].mul_(dh.unsqueeze(1))
        dh = plus_product(torch.addcmul(onward, dh, stay[t]), whole[t], call.hh)
    return dh


_RUNGS = Rungs(reference, _forward, _backward)
