"""What an initialisation leaves in a tensor: exact marks that any step wipes out, or a likeness.

Exact are constants, draws of torch's uniform generator (`grain`), and matrices that are
orthogonal to rounding. A likeness (the right bound, a bell shape) outlasts many steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rnnguard.inspection.grain import (
    TRIES,
    grain_bits,
    has_grain,
    scaled_grain_bits,
    working_dtype,
)

SAMPLE = 20_000
COLUMNS = 32
_GAINS = (1.0, 5 / 3, math.sqrt(2))
# Known bounds bracket the largest of n uniform values this closely, but for exp(-12) or exp(-30).
_CLOSE, _LOOSE = 12, 30
_P_LOOSE = 1e-4
_P_NORMAL = 5e-3
_ROUNDING = 64


@dataclass(frozen=True)
class Trace:
    """What one tensor shows: `bits` tell how unlikely a moved tensor is to show it.

    Of a likeness, `known` says that the very bound or orthogonality is one of the usual ones,
    and `scaled` holds values over that bound; `coarse` that the precision leaves no exact mark;
    `loose` that only the spread is even, up to whatever bound.
    """

    kind: Literal["exact", "alike", "unlike"]
    bits: float = 0.0
    known: bool = False
    coarse: bool = False
    loose: bool = False
    scaled: Tensor | None = None


UNLIKE = Trace("unlike")


def known_bounds(fans: Iterable[tuple[int, int]], widths: Iterable[int]) -> tuple[float, ...]:
    """The bounds of uniform draws: torch's 1/sqrt(width), Xavier and Kaiming for (in, out)."""
    bounds = {1 / math.sqrt(width) for width in widths}
    for fan_in, fan_out in fans:
        bounds.add(1 / math.sqrt(fan_in))
        for gain in _GAINS:
            bounds |= {gain * math.sqrt(6 / (fan_in + fan_out))}
            bounds |= {gain * math.sqrt(3 / fan) for fan in (fan_in, fan_out)}
    return tuple(sorted(bounds))


def trace_of(tensor: Tensor, bounds: Sequence[float], blocks: Iterable[int] = (1,)) -> Trace:
    """The trace of the whole tensor, or of each of its blocks where gates were set one by one."""
    tensor = tensor.detach().reshape(tensor.shape or (1,))
    dtype = working_dtype(_sample(tensor))
    cuts = [count for count in blocks if len(tensor) % count == 0]
    for count in cuts:
        marks = [_exact(part, bounds, dtype) for part in tensor.chunk(count)]
        found = [bits for bits in marks if bits is not None]
        if len(found) == len(marks):
            return Trace("exact", sum(found))
    return _likeness(tensor, bounds, dtype, max(cuts, default=1))


def _exact(part: Tensor, bounds: Sequence[float], dtype: torch.dtype) -> float | None:
    """Bits of evidence that the part is just as it was initialised; None without such a mark."""
    low, high = (float(edge) for edge in part.aminmax())
    if low == high:
        return 24.0 * (part.numel() - 1)
    if _is_orthogonal(part, torch.finfo(dtype if has_grain(dtype) else torch.float32).eps):
        return 24.0 * min(part.shape)
    if not has_grain(dtype):
        return None
    largest, values = max(-low, high), _sample(part).to(dtype)
    fitting = [
        bound
        for bound in (*bounds, *_decimals(largest))
        if _fits(largest, bound, part.numel(), _LOOSE, dtype)
    ]
    found = [bits for bound in fitting if (bits := grain_bits(values, bound)) is not None]
    if not found and part.dim() > 1 and _is_evenly_spread(part):
        return scaled_grain_bits(values, largest, part.numel())
    # With every bound that is tried, moved values have one more chance to pass.
    return max(found) - math.log2(TRIES * len(fitting)) if found else None


def _likeness(tensor: Tensor, bounds: Sequence[float], dtype: torch.dtype, blocks: int) -> Trace:
    coarse = not has_grain(dtype)
    parts = tensor.chunk(blocks)
    if coarse and _all_orthogonal(parts, dtype):
        return Trace("alike", known=True, coarse=coarse)
    largest, values = _largest(tensor), _sample(tensor).double()
    fitting = [b for b in bounds if _fits(largest, b, tensor.numel(), _CLOSE, dtype)]
    # Of several bounds that fit, the one under which the values lie most evenly.
    evenness = {p_uniform(values / bound): bound for bound in fitting}
    if evenness and max(evenness) > _P_LOOSE:
        scaled = values / evenness[max(evenness)]
        return Trace("alike", known=True, coarse=coarse, scaled=scaled)
    if tensor.dim() > 1 and p_normal(values) > _P_NORMAL:
        return Trace("alike", coarse=coarse)
    if tensor.dim() > 1 and all(map(_is_evenly_spread, parts)):
        return Trace("alike", coarse=coarse, loose=True)
    return UNLIKE


def _sample(tensor: Tensor) -> Tensor:
    """Evenly spaced values: of a huge tensor they tell as much, in a fraction of the time."""
    flat = tensor.flatten()
    return flat[:: 1 + flat.numel() // SAMPLE].cpu()


def _largest(tensor: Tensor) -> float:
    return max(abs(float(edge)) for edge in tensor.aminmax())


def _fits(largest: float, bound: float, count: int, slack: float, dtype: torch.dtype) -> bool:
    eps = torch.finfo(dtype).eps
    return bound * math.exp(-slack / count) * (1 - eps) <= largest <= bound * (1 + eps)


def _decimals(largest: float) -> Iterable[float]:
    """The round bounds, as in uniform_(-0.08, 0.08), that values up to `largest` may come from."""
    if not 0 < largest < math.inf:
        return
    for digits in (0, 1):
        places = digits - math.floor(math.log10(largest))
        yield math.ceil(largest * 10.0**places * (1 - 1e-6)) / 10.0**places


def _is_evenly_spread(part: Tensor) -> bool:
    """Whether the values are uniform about zero up to whatever is the largest of them."""
    largest = _largest(part)
    return largest > 0 and p_uniform(_sample(part).double() / largest) > _P_LOOSE


def _all_orthogonal(parts: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether each part, or all of them stacked, is so up to the rounding of half precision."""
    eps = torch.finfo(dtype).eps / _ROUNDING * 4
    return _is_orthogonal(torch.cat(list(parts)), eps) or all(_is_orthogonal(p, eps) for p in parts)


def _is_orthogonal(matrix: Tensor, eps: float) -> bool:
    """Whether it is a multiple of an orthogonal matrix, up to rounding (measured: 6 to 25 eps)."""
    square = matrix.dim() == 2 and min(matrix.shape) > 1
    return square and orthogonality_error(matrix) < _ROUNDING * eps


def orthogonality_error(matrix: Tensor) -> float:
    """How far the Gram matrix of up to 32 of the columns is from a multiple of the identity."""
    thin = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    thin = thin[:, :: max(1, thin.shape[1] // COLUMNS)].detach().cpu().double()
    gram = thin.T @ thin
    scale = float(gram.diagonal().mean())
    if scale == 0:
        return math.inf
    return float((gram / scale - torch.eye(len(gram), dtype=gram.dtype)).abs().max())


def p_uniform(values: Tensor) -> float:
    """The Kolmogorov-Smirnov p value of the values (n,) against uniform(-1, 1)."""
    return _p_value(((values.double() + 1) / 2).clamp(0, 1))


def p_normal(values: Tensor) -> float:
    """The p value against a normal of mean 0 and the spread of the values (n,)."""
    spread = float(values.std())
    return _p_value(torch.special.ndtr(values.double() / spread)) if spread > 0 else 0.0


def _p_value(levels: Tensor) -> float:
    """How likely the levels (n,), uniform on 0..1 if all is well, lie this unevenly.

    Kolmogorov's limit with the correction of Stephens (1970), good from n = 8 on.
    """
    from scipy.special import kolmogorov

    count = len(levels)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    ordered = levels.sort().values
    gap = float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())
    root = math.sqrt(count)
    return float(kolmogorov((root + 0.12 + 0.11 / root) * gap))
