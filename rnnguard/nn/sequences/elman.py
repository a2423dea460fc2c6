"""The plain recurrence over one layer in one direction, with LayerNorm and residual on request.

    a_t = norm_x(W_ih x_t + b_ih) + norm_h(W_hh h_{t-1} + b_hh)
    h_t = carry h_{t-1} + scale phi(a_t)

Back in time da = dh scale phi'(a), read off phi(a), and dh_{t-1} = dh carry + norm_h'(da) W_hh.
Residual form: Kusupati et al. 2018, FastRNN (arXiv 1901.02358), equation 1, without its bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnnguard.nn.sequences.activation import ACTIVATIONS
from rnnguard.nn.sequences.normed import Normed, norm, through_input_norm
from rnnguard.nn.sequences.parts import GateNorms, GRUWeights
from rnnguard.nn.sequences.products import (
    Totals,
    add_product,
    both,
    if_wanted,
    input_gradient,
    linear,
    plus_product,
    project,
    set_product,
    summed,
    weight_gradient,
)
from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, chunks, climb, earlier


class _Call(NamedTuple):
    x: Tensor
    h0: Tensor
    weights: GRUWeights
    activation: str
    norms: GateNorms | None
    carry: Tensor | None
    scale: Tensor | None
    kept: Tensor | None


def elman_sequence(
    x: Tensor,
    h0: Tensor,
    weights: GRUWeights,
    activation: str = "tanh",
    norms: GateNorms | None = None,
    carry: Tensor | None = None,
    scale: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (T, B, H) and the last state (B, H) for x (T, B, F) and torch's weights of n = H.

    `activation` is one of ACTIVATIONS; `carry` and `scale`, () or (H,), stand for 0 and 1 where
    they are None; `kept` (T, B, 1 or H) gives the shares of h that stay.
    """
    call = _Call(x, h0, weights, activation, norms, carry, scale, kept)
    y, h = climb(_RUNGS, call, weights.ih, (kept,))
    return y, h


def reference(call: _Call) -> Tensors:
    """Rung 0."""
    weights, norms, h = call.weights, call.norms, call.h0
    phi, outputs = ACTIVATIONS[call.activation].plain, []
    fed = linear(call.x, weights.ih, weights.bias_ih, h.dtype)
    if norms is not None:
        fed = norm(fed, norms.gain_ih, norms.shift, norms.eps)
    for t, now in enumerate(fed):
        back = linear(h, weights.hh, weights.bias_hh, h.dtype)
        if norms is not None:
            back = norm(back, norms.gain_hh, None, norms.eps)
        new = phi(now + back)
        new = new if call.scale is None else call.scale * new
        new = new if call.carry is None else new + call.carry * h
        h = new if call.kept is None else torch.lerp(new, h, call.kept[t].expand_as(new))
        outputs.append(h)
    return torch.stack(outputs), h


def _forward(call: _Call) -> tuple[Tensors, Left]:
    """The states, phi(a) where that is another tensor, and the arguments of the two norms."""
    weights, norms, h0 = call.weights, call.norms, call.h0
    hs = h0.new_empty(len(call.x) + 1, *h0.shape)
    hs[0] = h0
    # Where nothing comes after phi, one plane holds both.
    apart = any(part is not None for part in (call.carry, call.scale, call.kept))
    acts = torch.empty_like(hs[1:]) if apart else hs[1:]
    fed = back = None
    if norms is None:
        project(call.x, weights.ih, both(weights.bias_ih, weights.bias_hh), acts)
    else:
        fed = linear(call.x, weights.ih, weights.bias_ih, h0.dtype)
        back = torch.empty_like(fed)
        acts[...] = norm(fed, norms.gain_ih, norms.shift, norms.eps)
    _step_through(call, acts, back, hs)
    return (hs[1:].clone(), hs[-1].clone()), (acts if apart else None, hs, fed, back)


def _step_through(call: _Call, acts: Tensor, back: Tensor | None, hs: Tensor) -> None:
    """Fills phi(a), the recurrent norm's argument and the states in place, step by step."""
    phi_, norms = ACTIVATIONS[call.activation].in_place, call.norms
    turned, h = call.weights.hh.t(), hs[0]
    for t, (a, new) in enumerate(zip(acts.unbind(0), hs.unbind(0)[1:], strict=True)):
        if norms is None or back is None:
            add_product(a, h, turned)
        else:
            set_product(back[t], h, turned, call.weights.bias_hh)
            a.add_(norm(back[t], norms.gain_hh, None, norms.eps))
        value = phi_(a)
        if call.scale is not None:
            value = torch.mul(value, call.scale, out=new)
        if call.carry is not None:
            value = torch.addcmul(value, h, call.carry, out=new)
        if call.kept is not None:
            torch.lerp(value, h, call.kept[t].expand_as(new), out=new)
        h = new


def _backward(call: _Call, left: Left, cotangents: Tensors, wanted: _Call) -> _Call:
    acts, hs, fed, back = left
    assert hs is not None
    acts = hs[1:] if acts is None else acts
    weights, norms, of, totals = call.weights, call.norms, wanted.weights, Totals()
    dy, dh = cotangents
    dh, da = dh + dy[-1], torch.empty_like(acts)
    for piece in chunks(len(dy)):
        normed = None
        if norms is not None and back is not None:
            normed = Normed(back[piece], norms.gain_hh, None, norms.eps)
        steps = _Chunk(call, piece, acts[piece], hs[:-1][piece], da[piece], normed)
        dh = steps.back_through(earlier(dy, piece), dh)
        steps.add_to(totals, wanted)
    into_fed, found = through_input_norm(fed, norms, da, totals["gain_hh"])
    return _Call(
        x=if_wanted(wanted.x, lambda: input_gradient(into_fed, weights.ih)),
        h0=dh,
        weights=GRUWeights(
            if_wanted(of.ih, lambda: weight_gradient(into_fed, call.x, weights.ih)),
            totals["hh"],
            if_wanted(of.bias_ih, lambda: summed(into_fed)),
            totals["bias_hh"],
        ),
        activation="",
        norms=found,
        carry=totals["carry"],
        scale=totals["scale"],
        kept=None,
    )


class _Chunk:
    """Some steps: phi', which `back_through` makes the gradient of a."""

    def __init__(
        self,
        call: _Call,
        piece: slice,
        acts: Tensor,
        old: Tensor,
        da: Tensor,
        normed: Normed | None,
    ) -> None:
        self.call, self.acts, self.old, self.da, self.normed = call, acts, old, da, normed
        self.kept = None if call.kept is None else call.kept[piece]
        self.slope = ACTIVATIONS[call.activation].slope(acts)
        if call.scale is not None:
            self.slope.mul_(call.scale)
        self.into_sum = da
        self.into_new: list[Tensor] = []

    def back_through(self, before: Tensors, dh: Tensor) -> Tensor:
        """From the last step to the first; gives the gradient of the state before them."""
        carry, hh, kept, sums = self.call.carry, self.call.weights.hh, self.kept, []
        slopes, das = self.slope.unbind(0), self.da.unbind(0)
        for t in range(len(das) - 1, -1, -1):
            onward = before[t]
            if kept is not None:
                stays = dh * kept[t]
                dh = dh - stays
                onward = onward + stays
            if carry is not None:
                onward = torch.addcmul(onward, dh, carry)
            self.into_new.append(dh)
            into = torch.mul(slopes[t], dh, out=das[t])
            if self.normed is not None:
                into = self.normed.into_input(t, into)
                sums.append(into)
            dh = plus_product(onward, into, hh)
        if sums:
            self.into_sum = torch.stack(sums[::-1])
        return dh

    def add_to(self, totals: Totals, wanted: _Call) -> None:
        """Adds the gradients of what stands on the recurrent side and after the activation."""
        call, of, hh = self.call, wanted.weights, self.call.weights.hh
        totals.add("hh", of.hh, lambda: weight_gradient(self.into_sum, self.old, hh))
        totals.add("bias_hh", of.bias_hh, lambda: summed(self.into_sum))
        if wanted.norms is not None and self.normed is not None:
            normed = self.normed
            totals.add("gain_hh", wanted.norms.gain_hh, lambda: normed.into_gain(self.da))
        totals.add("carry", wanted.carry, lambda: self._times(self.old, call.carry))
        totals.add("scale", wanted.scale, lambda: self._times(self.acts, call.scale))

    def _times(self, factor: Tensor, like: Tensor | None) -> Tensor:
        assert like is not None
        return (torch.stack(self.into_new[::-1]) * factor).sum_to_size(like.shape)


_RUNGS = Rungs(reference, _forward, _backward)
