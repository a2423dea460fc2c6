"""Weights against the rows of one step or of all, in the weight's own dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows W^T + bias in `dtype`, differentiable; the product itself in the weight's dtype."""
    if weight.dtype == dtype:
        return F.linear(rows, weight, bias)
    found = F.linear(rows.to(weight.dtype), weight).to(dtype)
    return found if bias is None else found + bias


def set_product(out: Tensor, rows: Tensor, turned: Tensor, bias: Tensor | None) -> None:
    """out = rows W^T + bias, given W^T."""
    if turned.dtype != out.dtype:
        out[...] = rows.to(turned.dtype) @ turned
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(rows, turned, out=out)
    else:
        torch.addmm(bias, rows, turned, out=out)


def add_product(out: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """out += rows W, in place."""
    if weight.dtype == out.dtype:
        return out.addmm_(rows, weight)
    return out.add_(rows.to(weight.dtype) @ weight)


def plus_product(base: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """base + rows W as a new tensor.

    Not by addmm, which starts the sum with base and so rounds each small product to its digits.
    """
    if weight.dtype == base.dtype:
        return torch.mm(rows, weight).add_(base)
    return base + rows.to(weight.dtype) @ weight


def input_gradient(rows: Tensor, weight: Tensor) -> Tensor:
    """rows W over all steps, in the rows' dtype."""
    return linear(rows, weight.t(), None, rows.dtype)


def weight_gradient(rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """The sum over steps and batch of rows^T columns, in the rows' dtype.

    In pieces: a product over thousands of rows adds each of them to a sum that has few digits
    left for it. At least 64 rows and 8 steps each, since a product of few rows is a slow one.
    """
    steps = max(8, 64 // max(1, rows.shape[1]))
    found: Tensor | None = None
    for left, right in zip(*(torch.split(whole, steps) for whole in (rows, columns)), strict=True):
        left, right = left.flatten(0, 1).to(weight.dtype), right.flatten(0, 1).to(weight.dtype)
        part = (left.t() @ right).to(rows.dtype)
        found = part if found is None else found.add_(part)
    assert found is not None
    return found


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (T, B, n) = x W^T + bias for all steps at once."""
    set_product(out.flatten(0, 1), x.flatten(0, 1), weight.t(), bias)


def in_blocks(rows: Tensor, blocks: int) -> Tensor:
    """Stacked gates (T, B, blocks n) as (T, B, blocks, n)."""
    return rows.view(*rows.shape[:-1], blocks, rows.shape[-1] // blocks)


def summed(rows: Tensor) -> Tensor:
    """A bias's gradient: the sum over steps and batch."""
    return rows.sum((0, 1))


def both(bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """Two biases of one sum as one."""
    return bias_ih if bias_ih is None or bias_hh is None else bias_ih + bias_hh


def if_wanted(wanted: object, gradient: Callable[[], Tensor]) -> Any:
    """The gradient, computed only where it is wanted; else None in its place."""
    return gradient() if wanted else None


class Totals:
    """Gradients that are added up over chunks of steps."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def add(self, name: str, wanted: object, part: Callable[[], Tensor]) -> None:
        """Adds the part, which is computed only where it is wanted."""
        if wanted:
            now = part()
            self._found[name] = self._found[name].add_(now) if name in self._found else now

    def __getitem__(self, name: str) -> Any:
        """The sum, or None where nothing was wanted."""
        return self._found.get(name)
