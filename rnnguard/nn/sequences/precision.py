"""Half precision: the products run in it, the states, gates and norms in float32.

The dtype of the products is autocast's, or that of x where the weights have it too. Sums over
many steps then lose nothing, and what comes out has the dtype that torch's fused modules give.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rnnguard.nn.sequences.packing import Parts

_HALVES = (torch.float16, torch.bfloat16)
# The fields that enter a matrix product; every other tensor of a call is added or multiplied.
_IN_PRODUCTS = ("x", "ih", "hh", "hr")


def half_precision(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype of the products if it is not that of the states: under autocast, or in halves."""
    if x.dtype != torch.float64 and _autocasts(x) and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.dtype in _HALVES and weight.dtype == x.dtype else None


def in_halves(parts: Parts, half: torch.dtype) -> Parts:
    """The parts with what enters products in `half` and all else in float32."""
    made: Any = parts.__class__
    names: tuple[str, ...] = parts._fields  # type: ignore[attr-defined]
    cast = [_cast(name, part, half) for name, part in zip(names, parts, strict=True)]
    return made(*cast)  # type: ignore[no-any-return]


def _cast(name: str, part: Any, half: torch.dtype) -> Any:
    if isinstance(part, Tensor):
        return part.to(half if name in _IN_PRODUCTS else torch.float32)
    return in_halves(part, half) if isinstance(part, tuple) else part


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The dtypes here are chosen by hand: autocast must not choose again, forward or backward."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def _autocasts(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type)
