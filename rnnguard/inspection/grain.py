"""Whether values are, to the last bit, ones that torch's uniform generator makes.

`uniform_(-b, b)` draws u from a grid of about 2^24 numbers and gives u * 2b - b, rounded once
(fused multiply-add) or twice. Small results are therefore far coarser than a float could be,
and any later arithmetic loses that: half of the values of a moved tensor are no longer ones that
could have been drawn. So a single step of training shows at every size, while a fresh draw fits
always. Learned from torch's own draws on a CPU; on CUDA the form is the same by its source.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ULPS = (0, 1, -1, 2, -2)
# How many forms of a draw are tried for one bound: each neighbour, rounded once or twice.
TRIES = 2 * len(_ULPS)
_FIRST = 16
_FEWEST = 16
_MOST_TRIED = 200_000


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The smallest float dtype that holds every value: what the tensor was computed in."""
    smaller = {
        torch.float64: (torch.bfloat16, torch.float16, torch.float32),
        torch.float32: (torch.bfloat16, torch.float16),
    }
    for dtype in smaller.get(tensor.dtype, ()):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return dtype
    return tensor.dtype


def has_grain(dtype: torch.dtype) -> bool:
    """Whether draws in this precision leave a trace; rounding to half precision wipes it out."""
    return dtype in (torch.float32, torch.float64)


def grain_bits(values: Tensor, bound: float) -> float | None:
    """How surely the values (n,) were drawn from uniform(-bound, bound) and never moved.

    Bits of evidence: values that were moved would pass each of `TRIES` forms of a draw with
    probability 2^-bits. None when one of them cannot have been drawn.
    """
    # Beyond half of the bound, draws lie as close as floats do and tell nothing.
    values = values[values.abs() <= bound / 2]
    for shifted in _near(bound, values.dtype):
        for fused in (True, False):
            if _all_drawn(values[:_FIRST], shifted, fused) and _all_drawn(values, shifted, fused):
                return _evidence(values, shifted)
    return None


def _near(bound: float, dtype: torch.dtype) -> list[float]:
    """The bound in the tensor's own precision, and its neighbours: formulas round differently."""
    own = torch.tensor(bound, dtype=dtype)
    step = math.ldexp(torch.finfo(dtype).eps, math.frexp(bound)[1] - 1)
    return [float(own) + ulps * step for ulps in _ULPS]


def _all_drawn(values: Tensor, bound: float, fused: bool) -> bool:
    """Whether each value comes out of a u of the generator, in one rounding or in two."""
    guess = ((values.double() + bound) / (2 * bound)).to(values.dtype)
    found = torch.zeros_like(values, dtype=torch.bool)
    for end in (None, math.inf, -math.inf):
        u = guess if end is None else torch.nextafter(guess, torch.full_like(guess, end))
        found |= (_once(u, bound) if fused else u * (2 * bound) - bound) == values
    return bool(found.all())


def _once(u: Tensor, bound: float) -> Tensor:
    """u * 2b - b with a single rounding, as a fused multiply-add gives it."""
    if u.dtype is torch.float32:
        return (u.double() * (2 * bound) - bound).to(u.dtype)
    high, low = _exact_product(u, 2 * bound)
    return (high - bound) + low


def _exact_product(u: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The float64 product and its rounding error (Dekker 1971)."""
    split = 2.0**27 + 1
    scaled, part = split * u, split * factor
    u_high, factor_high = scaled - (scaled - u), part - (part - factor)
    u_low, factor_low = u - u_high, factor - factor_high
    product = u * factor
    error = u_high * factor_high - product + u_high * factor_low + u_low * factor_high
    return product, error + u_low * factor_low


def _evidence(values: Tensor, bound: float) -> float:
    """Over all values, the log2 of how much coarser the draws lie than floats of that size."""
    values = values[values != 0].double()
    u = (values + bound) / (2 * bound)
    exponents = torch.frexp(u).exponent - torch.frexp(values).exponent
    return float((exponents + math.log2(2 * bound)).clamp(0).sum())


def scaled_grain_bits(values: Tensor, largest: float, count: int) -> float | None:
    """How surely the values (n,) are such draws times one factor; None when they are not.

    Up to rounding, draws are whole multiples of bound * 2^-23, and so are scaled ones, of another
    step. That lies between limits that the `largest` of all `count` values gives, and the
    smallest value must be a whole multiple of it: few steps are left to try.
    """
    sizes = values[values != 0].double().abs().sort().values
    sizes = sizes[sizes < largest / 8]
    if values.dtype is not torch.float32 or len(sizes) < _FEWEST:
        return None
    highest = float(sizes[0]) * 2.0**23 / largest
    # Rounded twice, draws lie on a grid that is up to four times as fine.
    for low, high in ((highest * math.exp(-30 / count), highest), (highest, 4 * highest)):
        multiples = torch.arange(math.floor(low), math.ceil(high) + 1, dtype=torch.float64)
        multiples = multiples[multiples > 0]
        if len(multiples) > _MOST_TRIED:
            return None
        for step in _steps_that_fit(sizes, float(sizes[0]) / multiples):
            odds = float((2 * _slack(sizes / step)).clamp(max=1).log2().sum())
            if -odds - math.log2(len(multiples)) >= _FEWEST:
                return -odds - math.log2(len(multiples))
    return None


def _steps_that_fit(sizes: Tensor, steps: Tensor) -> list[float]:
    """The steps of which all sizes are whole multiples; the first sizes thin them out."""
    for few in (sizes[1:4], sizes[1:_FEWEST], sizes):
        if len(steps) * len(few) > 2 * _MOST_TRIED * _FEWEST:
            return []
        ratios = few / steps[:, None]
        steps = steps[((ratios - ratios.round()).abs() <= _slack(ratios)).all(1)]
    return [float(step) for step in steps]


def _slack(ratios: Tensor) -> Tensor:
    """How far rounding may move a size, in steps: its own, the factor's, and the first size's."""
    return ratios * 2.0**-22 + 1e-9
