"""The GRU over one layer in one direction, with LayerNorm and zoneout on request.

u_t = norm_x(W_ih x_t + b_ih)        q_t = norm_h(W_hh h_{t-1} + b_hh)        gates r, z, n
r = sigma(u_r + q_r)    z = sigma(u_z + q_z)    n = tanh(u_n + r q_n)    h_t = n + z (h_{t-1} - n)

Torch's form, in which the reset gate acts on q_n; the biases stand inside the normalised sums.
Norms: Ba et al. 2016 (arXiv 1607.06450). Shares of h that stay: zoneout, Krueger et al. 2017
(arXiv 1606.01305), and the steps after the end of a shorter sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnguard.nn.sequences.gru_backward import GRUCall, backward
from rnnguard.nn.sequences.normed import norm
from rnnguard.nn.sequences.parts import GateNorms, GRUWeights
from rnnguard.nn.sequences.products import linear, set_product
from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, climb


def gru_sequence(
    x: Tensor,
    h0: Tensor,
    weights: GRUWeights,
    norms: GateNorms | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (T, B, H) and the last state (B, H) for x (T, B, F) and torch's weights of n = 3H.

    `kept` (T, B, 1 or H) gives the shares of h that stay.
    """
    y, h = climb(_RUNGS, GRUCall(x, h0, weights, norms, kept), weights.ih, (kept,))
    return y, h


def gru_gates(
    x: Tensor, h: Tensor, weights: GRUWeights, norms: GateNorms | None = None
) -> dict[str, Tensor]:
    """The gates r, z, n (B, H) of a step from x (B, F) and h (B, H)."""
    driven, back = fed(x, weights, norms, h.dtype), _back(h, weights, norms, h.dtype)
    (ur, uz, un), (qr, qz, qn) = driven.chunk(3, -1), back.chunk(3, -1)
    r = (ur + qr).sigmoid()
    return {"r": r, "z": (uz + qz).sigmoid(), "n": torch.tanh(un + r * qn)}


def fed(x: Tensor, weights: GRUWeights, norms: GateNorms | None, dtype: torch.dtype) -> Tensor:
    """What the input adds to the gates' sums, (..., 3H)."""
    driven = linear(x, weights.ih, weights.bias_ih, dtype)
    return driven if norms is None else norm(driven, norms.gain_ih, norms.shift, norms.eps)


def _back(h: Tensor, weights: GRUWeights, norms: GateNorms | None, dtype: torch.dtype) -> Tensor:
    back = linear(h, weights.hh, weights.bias_hh, dtype)
    return back if norms is None else norm(back, norms.gain_hh, None, norms.eps)


def reference(call: GRUCall) -> Tensors:
    """Rung 0."""
    weights, norms, h, outputs = call.weights, call.norms, call.h0, []
    for t, now in enumerate(fed(call.x, weights, norms, h.dtype)):
        back = _back(h, weights, norms, h.dtype)
        (ur, uz, un), (qr, qz, qn) = now.chunk(3, -1), back.chunk(3, -1)
        n = torch.tanh(un + (ur + qr).sigmoid() * qn)
        new = n + (uz + qz).sigmoid() * (h - n)
        h = new if call.kept is None else torch.lerp(new, h, call.kept[t].expand_as(new))
        outputs.append(h)
    return torch.stack(outputs), h


def _forward(call: GRUCall) -> tuple[Tensors, Left]:
    """The states, the gates (T, B, 3H), q_n (T, B, H), and the arguments of the two norms."""
    weights, norms, h0 = call.weights, call.norms, call.h0
    hs = h0.new_empty(len(call.x) + 1, *h0.shape)
    hs[0] = h0
    read = torch.empty_like(hs[1:])
    gates, driven, back = linear(call.x, weights.ih, weights.bias_ih, h0.dtype), None, None
    if norms is not None:
        driven, back = gates, torch.empty_like(gates)
        gates = norm(driven, norms.gain_ih, norms.shift, norms.eps)
    _step_through(call, gates, read, back, hs)
    return (hs[1:].clone(), hs[-1].clone()), (gates, read, hs, driven, back)


def _step_through(
    call: GRUCall, gates: Tensor, read: Tensor, back: Tensor | None, hs: Tensor
) -> None:
    """Fills gates, q_n, the recurrent norm's argument and the states in place, step by step."""
    norms, kept, turned = call.norms, call.kept, call.weights.hh.t()
    bias, hidden = call.weights.bias_hh, hs.shape[-1]
    rz = gates[..., : 2 * hidden].unbind(0)
    r, z, n = (gate.unbind(0) for gate in gates.chunk(3, -1))
    q = torch.empty_like(gates[0])
    backs = None if back is None else back.unbind(0)
    h = hs[0]
    for t, (new, q_n) in enumerate(zip(hs.unbind(0)[1:], read.unbind(0), strict=True)):
        if norms is None or backs is None:
            set_product(q, h, turned, bias)
        else:
            set_product(backs[t], h, turned, bias)
            q = norm(backs[t], norms.gain_hh, None, norms.eps)
        rz[t].add_(q[:, : 2 * hidden]).sigmoid_()
        q_n[...] = q[:, 2 * hidden :]
        n[t].addcmul_(r[t], q_n).tanh_()
        torch.lerp(n[t], h, z[t], out=new)
        if kept is not None:
            new.lerp_(h, kept[t].expand_as(new))
        h = new


_RUNGS = Rungs(reference, _forward, backward)
