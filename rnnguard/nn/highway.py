"""A gated shortcut round a layer, cheap enough to stand between fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnnguard.nn.sequences.precision import half_precision
from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, climb

_PIECE = 65536  # elements


class HighwayGate(nn.Module):
    """x + g (y - x) with g = sigmoid(w x + b): one weight and one bias for each unit.

    Srivastava et al. 2015 with a diagonal transform gate, as between the cells of Zhang et al.
    2016: a full matrix would cost an eighth of an LSTM layer. w starts at 0 and b at a negative
    value, so that x passes at first.
    """

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.first_bias = float(bias)
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.first_bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (..., width); gives their shape and x's dtype."""
        call = _Call(x, y.to(x.dtype), self.weight, self.bias)
        if half_precision(x, self.weight) is None:
            return climb(_RUNGS, call, self.weight, ())[0]
        return blended(call)[0]


class _Call(NamedTuple):
    x: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor


def blended(call: _Call) -> Tensors:
    """Rung 0."""
    gate = torch.sigmoid(torch.addcmul(call.bias, call.x, call.weight))
    return (torch.lerp(call.x, call.y, gate.to(call.x.dtype)),)


def _forward(call: _Call) -> tuple[Tensors, Left]:
    output = torch.empty_like(call.x)
    for part in _pieces(call.x):
        gate = torch.addcmul(call.bias, call.x[part], call.weight).sigmoid_()
        torch.lerp(call.x[part], call.y[part], gate, out=output[part])
    return (output,), ()


def _backward(call: _Call, left: Left, cotangents: Tensors, wanted: _Call) -> _Call:
    """The gate is computed anew: in the cache that costs less than to keep it in memory."""
    into_x, into_y = torch.empty_like(call.x), torch.empty_like(call.y)
    into_weight, into_bias = torch.zeros_like(call.weight), torch.zeros_like(call.bias)
    for part in _pieces(call.x):
        x, y, cotangent = call.x[part], call.y[part], cotangents[0][part]
        gate = torch.addcmul(call.bias, x, call.weight).sigmoid_()
        torch.mul(cotangent, gate, out=into_y[part])
        before = torch.sub(y, x).mul_(cotangent)
        torch.ops.aten.sigmoid_backward.grad_input(before, gate, grad_input=before)
        torch.addcmul(cotangent, before, call.weight, out=into_x[part])
        into_x[part].sub_(into_y[part])
        ones = before.new_ones(before.numel() // before.shape[-1])
        into_bias.addmv_(before.flatten(0, -2).T, ones)
        into_weight.addmv_(before.mul_(x).flatten(0, -2).T, ones)
    return _Call(into_x, into_y, into_weight, into_bias)


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Pieces of the first dimension that fit in a core's cache, temporaries included."""
    step = max(1, _PIECE * len(rows) // max(1, rows.numel()))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


_RUNGS = Rungs(blended, _forward, _backward)
