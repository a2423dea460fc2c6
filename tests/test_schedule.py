"""The learning-rate factor by step, against torch's own schedulers, and how requests merge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from rnnguard.rewrite.schedule import GuardSettings, learning_rate_factor


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
    ],
)
def test_factor_by_step(settings: GuardSettings, expected: list[float]) -> None:
    factors = [learning_rate_factor(settings, n) for n in range(6)]
    assert factors == pytest.approx(expected, abs=1e-6)


@given(warmup=st.integers(0, 50), total=st.none() | st.integers(1, 200), final=st.floats(1e-3, 1.0))
def test_factor_rises_to_one_then_falls_to_the_end(
    warmup: int, total: int | None, final: float
) -> None:
    settings = GuardSettings(warmup=warmup, total_steps=total, final_factor=final)
    factors = [learning_rate_factor(settings, n) for n in range(260)]
    top = max(warmup, 1) - 1
    assert factors[top] == 1.0
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[-1] == (1.0 if total is None else final)


def test_merged_keeps_what_the_other_does_not_ask_for() -> None:
    clip = GuardSettings(max_norm=1.0, on_nonfinite="skip")
    assert clip.merged(GuardSettings(warmup=10)) == GuardSettings(1.0, 10, on_nonfinite="skip")
    assert clip.merged(GuardSettings(max_norm=0.5)).max_norm == 0.5


def rates(make: object, steps: int) -> list[float]:
    """The learning rates of torch's scheduler from a rate of 1, which is then the factor."""
    optimizer = SGD([torch.zeros(1)], lr=1.0)
    scheduler: LRScheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("warmup", "total", "final"), [(7, 40, 0.1), (2, 9, 0.0), (40, 300, 0.3)])
def test_the_factor_is_that_of_torchs_own_schedulers(warmup: int, total: int, final: float) -> None:
    def linear(optimizer: SGD, until: int = warmup - 1) -> LRScheduler:
        return LinearLR(optimizer, 1 / warmup, 1.0, total_iters=until)

    def cosine(optimizer: SGD, start: int = warmup) -> LRScheduler:
        return CosineAnnealingLR(optimizer, total - start, eta_min=final)

    def both(optimizer: SGD) -> LRScheduler:
        parts = [linear(optimizer), cosine(optimizer)]
        return SequentialLR(optimizer, parts, milestones=[warmup - 1])

    def factors(**fields: object) -> list[float]:
        settings = GuardSettings(final_factor=final, **fields)  # type: ignore[arg-type]
        return [learning_rate_factor(settings, n) for n in range(total)]

    exactly = {"rel": 0, "abs": 1e-12}
    assert factors(warmup=warmup, total_steps=total) == pytest.approx(rates(both, total), **exactly)
    assert factors(warmup=warmup) == pytest.approx(rates(linear, total), **exactly)
    alone = rates(lambda optimizer: cosine(optimizer, 1), total)
    assert factors(total_steps=total) == pytest.approx(alone, **exactly)
