"""That torch's uniform draws are told from moved values to the last bit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from rnnguard.inspection.grain import (
    grain_bits,
    has_grain,
    scaled_grain_bits,
    working_dtype,
)

every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@every_precision
@pytest.mark.parametrize("hidden", [3, 8, 16, 32, 100, 1000])
def test_every_fresh_draw_fits(dtype: torch.dtype, hidden: int) -> None:
    bound = 1 / math.sqrt(hidden)
    for seed in range(20):
        torch.manual_seed(seed)
        values = torch.empty(300, dtype=dtype).uniform_(-bound, bound)
        bits = grain_bits(values, bound)
        assert bits is not None and bits > 200


@every_precision
@pytest.mark.parametrize("hidden", [3, 16, 100])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_moved_values_do_not(dtype: torch.dtype, hidden: int, size: float) -> None:
    bound = 1 / math.sqrt(hidden)
    for seed in range(20):
        torch.manual_seed(seed)
        values = torch.empty(100, dtype=dtype).uniform_(-bound, bound)
        assert grain_bits(values + size * torch.randn(100, dtype=dtype), bound) is None
        assert grain_bits(values * (1 - size), bound) is None


@pytest.mark.parametrize("fused", [True, False])
def test_one_rounding_and_two_are_both_known(fused: bool) -> None:
    """Worked out exactly, since a machine shows only one of them."""
    bound = float(torch.tensor(0.3))
    u = torch.rand(200, generator=torch.Generator().manual_seed(0))
    if fused:
        exact = [Fraction(float(v)) * Fraction(2 * bound) - Fraction(bound) for v in u]
        values = torch.tensor([float(v) for v in exact], dtype=torch.float64).float()
    else:
        values = u * torch.tensor(2 * bound) - torch.tensor(bound)
    assert grain_bits(values, bound) is not None


def test_the_bits_are_the_odds_of_moved_values_passing() -> None:
    """3 values that were moved pass about as often as 2^-bits says."""
    passed, expected, rounds = 0, 0.0, 400
    for seed in range(rounds):
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(3, generator=generator, dtype=torch.float64).sub(0.5).float()
        bits = grain_bits(values, 0.5)
        passed += bits is not None
        fresh = grain_bits(torch.rand(3, generator=generator).sub(0.5), 0.5)
        assert fresh is not None
        expected += 2**-fresh
    assert 0.5 < passed / expected < 2


@pytest.mark.parametrize(
    ("count", "twice_rounded"), [(256, False), (20_000, False), (1024, True), (20_000, True)]
)
def test_a_draw_times_a_factor_is_known(count: int, twice_rounded: bool) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        drawn = torch.empty(count).uniform_(-0.3, 0.3)
        if twice_rounded:
            drawn = torch.rand(count) * 0.6 - torch.tensor(0.3)
        scaled = drawn * 1.2345
        bits = scaled_grain_bits(scaled, float(scaled.abs().max()), count)
        assert bits is not None and bits > 16
        for moved in (scaled + 0.05, scaled + 1e-4 * torch.randn(count)):
            assert scaled_grain_bits(moved, float(moved.abs().max()), count) is None


def test_half_precision_is_seen_through_and_has_no_grain() -> None:
    values = torch.rand(50)
    assert working_dtype(values.double()) is torch.float32
    assert working_dtype(values.bfloat16().double()) is torch.bfloat16
    assert working_dtype(values.half().float()) is torch.float16
    assert working_dtype(torch.rand(50, dtype=torch.float64)) is torch.float64
    assert has_grain(torch.float32) and not has_grain(torch.bfloat16)
