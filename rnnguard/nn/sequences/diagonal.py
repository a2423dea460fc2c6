"""IndRNN over one layer in one direction: h_t = phi(W_ih x_t + b + u h_{t-1}).

Li et al. 2018, Independently Recurrent Neural Network (arXiv 1803.04831), equation 2. The
gradient through time is u phi' for each unit alone: a_t's is phi'_t (dy_t + u da_{t+1}).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnnguard.nn.sequences.activation import ACTIVATIONS
from rnnguard.nn.sequences.products import (
    if_wanted,
    input_gradient,
    linear,
    project,
    summed,
    weight_gradient,
)
from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, climb


class _Call(NamedTuple):
    x: Tensor
    h0: Tensor
    ih: Tensor
    u: Tensor
    bias: Tensor | None
    activation: str
    kept: Tensor | None


def diagonal_sequence(
    x: Tensor,
    h0: Tensor,
    ih: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (T, B, H) and the last state (B, H) for x (T, B, F) and recurrent weights u (H,).

    `activation` is one of ACTIVATIONS; `kept` (T, B, 1 or H) the shares of h that stay.
    """
    y, h = climb(_RUNGS, _Call(x, h0, ih, u, bias, activation, kept), ih, (kept,))
    return y, h


def reference(call: _Call) -> Tensors:
    """Rung 0."""
    phi, h, outputs = ACTIVATIONS[call.activation].plain, call.h0, []
    for t, now in enumerate(linear(call.x, call.ih, call.bias, h.dtype)):
        new = phi(torch.addcmul(now, call.u, h))
        h = new if call.kept is None else torch.lerp(new, h, call.kept[t].expand_as(new))
        outputs.append(h)
    return torch.stack(outputs), h


def _forward(call: _Call) -> tuple[Tensors, Left]:
    """The states, and what phi gave where that is another tensor."""
    phi_, h0, kept = ACTIVATIONS[call.activation].in_place, call.h0, call.kept
    hs = h0.new_empty(len(call.x) + 1, *h0.shape)
    hs[0] = h0
    acts = hs[1:] if kept is None else torch.empty_like(hs[1:])
    project(call.x, call.ih, call.bias, acts)
    h = hs[0]
    for t, (a, new) in enumerate(zip(acts.unbind(0), hs.unbind(0)[1:], strict=True)):
        phi_(a.addcmul_(call.u, h))
        if kept is not None:
            torch.lerp(a, h, kept[t].expand_as(a), out=new)
        h = new
    return (hs[1:].clone(), hs[-1].clone()), (hs, None if kept is None else acts)


def _backward(call: _Call, left: Left, cotangents: Tensors, wanted: _Call) -> _Call:
    hs, acts = left
    assert hs is not None
    dy, dh = cotangents
    da = ACTIVATIONS[call.activation].slope(hs[1:] if acts is None else acts)
    dh = _back_through(call, da, dy, dh)
    return _Call(
        x=if_wanted(wanted.x, lambda: input_gradient(da, call.ih)),
        h0=dh,
        ih=if_wanted(wanted.ih, lambda: weight_gradient(da, call.x, call.ih)),
        u=if_wanted(wanted.u, lambda: (da * hs[:-1]).sum((0, 1))),
        bias=if_wanted(wanted.bias, lambda: summed(da)),
        activation="",
        kept=None,
    )


def _back_through(call: _Call, da: Tensor, dy: Tensor, dh: Tensor) -> Tensor:
    """From phi' to the gradient of a in place, step by step; gives that of h0."""
    u, kept, steps, dys = call.u, call.kept, da.unbind(0), dy.unbind(0)
    dh = dh + dys[-1]
    for t in range(len(steps) - 1, -1, -1):
        if kept is None:
            steps[t].mul_(dh)
            dh = torch.addcmul(dys[t - 1], steps[t], u) if t else steps[0] * u
        else:
            stays = dh * kept[t]
            steps[t].mul_(dh - stays)
            onward = torch.addcmul(stays, steps[t], u)
            dh = onward.add_(dys[t - 1]) if t else onward
    return dh


_RUNGS = Rungs(reference, _forward, _backward)
