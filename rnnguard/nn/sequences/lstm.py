"""The LSTM over one layer in one direction, with LayerNorm, zoneout and projection on request.

    a_t = norm_x(W_ih x_t + b_ih) + norm_h(W_hh h_{t-1} + b_hh)        gates i, f, g, o
    c_t = f c_{t-1} + i g        h_t = W_hr (o tanh(norm_c(c_t)))

Ba et al. 2016 (arXiv 1607.06450), equations 20 to 22, with raw c carried and the biases
inside the normalised sums. Where a share `keep` of the old state stays (zoneout, Krueger et
al. 2017, arXiv 1606.01305, or the end of a shorter sequence), s_t = s_new + keep (s_{t-1} - s_new).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnguard.nn.sequences.lstm_backward import LSTMCall, backward
from rnnguard.nn.sequences.normed import norm
from rnnguard.nn.sequences.parts import Kept, LSTMNorms, LSTMWeights
from rnnguard.nn.sequences.products import add_product, both, linear, set_product
from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, climb

_NOTHING = Kept()


def lstm_sequence(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: LSTMWeights,
    norms: LSTMNorms | None = None,
    kept: Kept = _NOTHING,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (T, B, P) and the last states (B, P) and (B, H) for x (T, B, F); P = H as a rule."""
    call = LSTMCall(x, h0, c0, weights, norms, kept)
    y, h, c = climb(_RUNGS, call, weights.ih, kept)
    return y, h, c


def lstm_gates(
    x: Tensor, h: Tensor, weights: LSTMWeights, norms: LSTMNorms | None = None
) -> dict[str, Tensor]:
    """The gates i, f, g, o (B, H) of a step from x (B, F) and h (B, P)."""
    sums = fed(x, weights, norms, h.dtype) + _back(h, weights, norms, h.dtype)
    i, f, g, o = sums.chunk(4, -1)
    return {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}


def fed(x: Tensor, weights: LSTMWeights, norms: LSTMNorms | None, dtype: torch.dtype) -> Tensor:
    """What the input adds to the gates' sums, (..., 4H)."""
    driven = linear(x, weights.ih, weights.bias_ih, dtype)
    return driven if norms is None else norm(driven, norms.gain_ih, norms.shift, norms.eps)


def _back(h: Tensor, weights: LSTMWeights, norms: LSTMNorms | None, dtype: torch.dtype) -> Tensor:
    back = linear(h, weights.hh, weights.bias_hh, dtype)
    return back if norms is None else norm(back, norms.gain_hh, None, norms.eps)


def reference(call: LSTMCall) -> Tensors:
    """Rung 0."""
    weights, norms, kept = call.weights, call.norms, call.kept
    h, c, outputs = call.h0, call.c0, []
    for t, now in enumerate(fed(call.x, weights, norms, c.dtype)):
        i, f, g, o = (now + _back(h, weights, norms, c.dtype)).chunk(4, -1)
        new = read = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if norms is not None:
            read = norm(new, norms.gain_cell, norms.shift_cell, norms.eps)
        out = o.sigmoid() * read.tanh()
        out = out if weights.hr is None else linear(out, weights.hr, None, c.dtype)
        h = out if kept.hidden is None else torch.lerp(out, h, kept.hidden[t].expand_as(out))
        c = new if kept.cell is None else torch.lerp(new, c, kept.cell[t].expand_as(new))
        outputs.append(h)
    return torch.stack(outputs), h, c


def _forward(call: LSTMCall) -> tuple[Tensors, Left]:
    """The states, the gates (T, B, 4H), and the arguments of the input's and recurrent norm."""
    weights, norms, h0, c0 = call.weights, call.norms, call.h0, call.c0
    steps = len(call.x)
    hs, cs = h0.new_empty(steps + 1, *h0.shape), c0.new_empty(steps + 1, *c0.shape)
    hs[0], cs[0] = h0, c0
    driven = back = None
    if norms is None:
        gates = linear(call.x, weights.ih, both(weights.bias_ih, weights.bias_hh), c0.dtype)
    else:
        driven = linear(call.x, weights.ih, weights.bias_ih, c0.dtype)
        back = torch.empty_like(driven)
        gates = norm(driven, norms.gain_ih, norms.shift, norms.eps)
    _step_through(call, gates, back, hs, cs)
    return (hs[1:].clone(), hs[-1].clone(), cs[-1].clone()), (gates, hs, cs, driven, back)


def _step_through(
    call: LSTMCall, gates: Tensor, back: Tensor | None, hs: Tensor, cs: Tensor
) -> None:
    """Fills gates, the recurrent norm's argument and the states in place, step by step."""
    weights, norms, kept = call.weights, call.norms, call.kept
    turned, hidden = weights.hh.t(), cs.shape[-1]
    i_f = gates[..., : 2 * hidden].unbind(0)
    blocks = [block.unbind(0) for block in gates.chunk(4, -1)]
    states = hs.unbind(0)[1:], cs.unbind(0)[1:]
    h, c, read = hs[0], cs[0], torch.empty_like(cs[0])
    for t, (now, i, f, g, o, out, new) in enumerate(
        zip(gates.unbind(0), *blocks, *states, strict=True)
    ):
        if norms is None or back is None:
            add_product(now, h, turned)
        else:
            set_product(back[t], h, turned, weights.bias_hh)
            now.add_(norm(back[t], norms.gain_hh, None, norms.eps))
        i_f[t].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c, out=new)
        new.addcmul_(i, g)
        if norms is None:
            torch.tanh(new, out=read)
        else:
            read = norm(new, norms.gain_cell, norms.shift_cell, norms.eps).tanh_()
        if weights.hr is None:
            torch.mul(o, read, out=out)
        else:
            set_product(out, o * read, weights.hr.t(), None)
        if kept.hidden is not None:
            out.lerp_(h, kept.hidden[t].expand_as(out))
        if kept.cell is not None:
            new.lerp_(c, kept.cell[t].expand_as(new))
        h, c = out, new


_RUNGS = Rungs(reference, _forward, backward)
