"""The learning-rate factor by step, against torch's own schedulers, and how requests merge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from rnnguard.errors import RefusedError
from rnnguard.rewrite.schedule import GuardSettings, beside_a_schedule, learning_rate_factor
from rnnguard.rewrite.stepguard import StepGuard


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (GuardSettings(), [1, 1, 1, 1, 1, 1]),
        (GuardSettings(warmup=1), [1, 1, 1, 1, 1, 1]),
        (GuardSettings(warmup=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (GuardSettings(total_steps=5, final_factor=0.0), [1, 0.853553, 0.5, 0.146447, 0, 0]),
        (GuardSettings(warmup=2, total_steps=4, final_factor=0.2), [0.5, 1, 0.6, 0.2, 0.2, 0.2]),
        (GuardSettings(warmup=4, total_steps=2), [0.25, 0.5, 0.75, 1, 0.1, 0.1]),
        (GuardSettings(total_steps=1), [1, 0.1, 0.1, 0.1, 0.1, 0.1]),
        (GuardSettings(peak=3.0), [3, 3, 3, 3, 3, 3]),
        (GuardSettings(warmup=3, peak=6.0), [2, 4, 6, 6, 6, 6]),
        (GuardSettings(warmup=2, total_steps=4, peak=8.0, final_factor=2.0), [4, 8, 5, 2, 2, 2]),
        (GuardSettings(total_steps=3, peak=0.05), [0.05, 0.05, 0.05, 0.05, 0.05, 0.05]),
    ],
)
def test_factor_by_step(settings: GuardSettings, expected: list[float]) -> None:
    factors = [learning_rate_factor(settings, n) for n in range(6)]
    assert factors == pytest.approx(expected, abs=1e-6)


@given(
    warmup=st.integers(0, 50),
    total=st.none() | st.integers(1, 200),
    final=st.floats(1e-3, 1.0),
    peak=st.floats(0.01, 100.0),
)
def test_factor_rises_to_the_peak_then_falls_to_the_end(
    warmup: int, total: int | None, final: float, peak: float
) -> None:
    settings = GuardSettings(warmup=warmup, total_steps=total, final_factor=final, peak=peak)
    factors = [learning_rate_factor(settings, n) for n in range(260)]
    top = max(warmup, 1) - 1
    assert factors[top] == peak
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[-1] == (peak if total is None else min(final, peak))


def test_merged_keeps_what_the_other_does_not_ask_for() -> None:
    clip = GuardSettings(max_norm=1.0, on_nonfinite="skip")
    assert clip.merged(GuardSettings(warmup=10)) == GuardSettings(1.0, 10, on_nonfinite="skip")
    assert clip.merged(GuardSettings(max_norm=0.5)).max_norm == 0.5
    higher = clip.merged(GuardSettings(peak=3.0))
    assert (higher.peak, higher.max_norm) == (3.0, 1.0)
    assert higher.merged(GuardSettings(warmup=10)).peak == 3.0


@pytest.mark.parametrize("peak", [0.0, -1.0, math.nan, math.inf])
def test_a_peak_that_cannot_be_meant_is_named(peak: float) -> None:
    with pytest.raises(RefusedError, match=r"`peak`: .* cannot be meant\. Give a finite number"):
        GuardSettings(peak=peak)


def test_a_schedule_of_the_users_own_leaves_the_warm_up_alone() -> None:
    asked = GuardSettings(max_norm=1.0, warmup=4, total_steps=9, peak=3.0)
    assert beside_a_schedule(asked) == GuardSettings(max_norm=1.0, warmup=4)


def test_the_rate_at_rest_never_changes() -> None:
    parts = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    rates_given: tuple[Any, ...] = (0.5, torch.tensor(0.25), 1)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parts, rates_given, strict=True)]
    optimizer = SGD(groups)
    StepGuard(GuardSettings(warmup=2, total_steps=4, peak=8.0)).install(optimizer)
    for factor in (4, 8, 4.05, 0.1):
        for part in parts:
            part.data.zero_()
            part.grad = torch.ones(1)
        optimizer.step()
        moved = [-float(part.detach()) for part in parts]
        assert moved == pytest.approx([lr * factor for lr in (0.5, 0.25, 1)])
        assert [group["lr"] for group in optimizer.param_groups] == list(rates_given)
        assert float(rates_given[1]) == 0.25


def rates(make: object, steps: int, peak: float = 1.0) -> list[float]:
    """The learning rates of torch's scheduler from that rate; from 1 they are the factor."""
    optimizer = SGD([torch.zeros(1)], lr=peak)
    scheduler: LRScheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("peak", [1.0, 12.5, 0.4])
@pytest.mark.parametrize(("warmup", "total", "final"), [(7, 40, 0.1), (2, 9, 0.0), (40, 300, 0.3)])
def test_the_factor_is_that_of_torchs_own_schedulers(
    warmup: int, total: int, final: float, peak: float
) -> None:
    def linear(optimizer: SGD, until: int = warmup - 1) -> LRScheduler:
        return LinearLR(optimizer, 1 / warmup, 1.0, total_iters=until)

    def cosine(optimizer: SGD, start: int = warmup) -> LRScheduler:
        return CosineAnnealingLR(optimizer, total - start, eta_min=final)

    def both(optimizer: SGD) -> LRScheduler:
        parts = [linear(optimizer), cosine(optimizer)]
        return SequentialLR(optimizer, parts, milestones=[warmup - 1])

    def factors(**fields: object) -> list[float]:
        settings = GuardSettings(final_factor=final, peak=peak, **fields)  # type: ignore[arg-type]
        return [learning_rate_factor(settings, n) for n in range(total)]

    exactly: dict[str, Any] = {"rel": 0, "abs": 1e-12}
    whole, rise = rates(both, total, peak), rates(linear, total, peak)
    assert factors(warmup=warmup, total_steps=total) == pytest.approx(whole, **exactly)
    assert factors(warmup=warmup) == pytest.approx(rise, **exactly)
    alone = rates(lambda optimizer: cosine(optimizer, 1), total, peak)
    assert factors(total_steps=total) == pytest.approx(alone, **exactly)
