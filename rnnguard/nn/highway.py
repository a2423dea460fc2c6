"""A gated shortcut round a layer, cheap enough to stand between fused kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnnguard.nn.sequences.precision import half_precision
from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, climb

_PIECE = 524288  # elements


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
    """The gate too where there is one piece; to keep more costs more than to compute it anew."""
    output = torch.empty_like(call.x)
    pieces, gate = _pieces(call.x), None
    for part in pieces:
        x = call.x[part]
        gate = _gate(call, x)
        torch.lerp(x, call.y[part], gate, out=output[part])
    return (output,), (gate if len(pieces) == 1 else None,)


def _backward(call: _Call, left: Left, cotangents: Tensors, wanted: _Call) -> _Call:
    into_x, into_y = torch.empty_like(call.x), torch.empty_like(call.y)
    into_weight, into_bias = torch.zeros_like(call.weight), torch.zeros_like(call.bias)
    whole = (call.x, call.y, cotangents[0], into_x, into_y)
    for part in _pieces(call.x):
        x, y, cotangent, x_into, y_into = (tensor[part] for tensor in whole)
        gate = _gate(call, x) if left[0] is None else left[0]
        torch.mul(cotangent, gate, out=y_into)
        torch.sub(cotangent, y_into, out=x_into)
        before = torch.sub(y, x).mul_(gate).mul_(x_into)
        into_bias.add_(before.flatten(0, -2).sum(0))
        x_into.addcmul_(before, call.weight)
        into_weight.add_(before.mul_(x).flatten(0, -2).sum(0))
    return _Call(into_x, into_y, into_weight, into_bias)


def _gate(call: _Call, x: Tensor) -> Tensor:
    return torch.addcmul(call.bias, x, call.weight).sigmoid_()


def _pieces(rows: Tensor) -> list[slice]:
    """Pieces of the first dimension small enough for a core's caches."""
    step = max(1, _PIECE * len(rows) // max(1, rows.numel()))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


_RUNGS = Rungs(blended, _forward, _backward)
