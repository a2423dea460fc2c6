"""What a step guard is asked to do, and the learning-rate factor that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, Self


@dataclass(frozen=True)
class GuardSettings:
    """What one guard does at each step; a field at its default asks for nothing."""

    max_norm: float | None = None
    """Largest global gradient norm."""
    warmup: int = 0
    """Steps of linear warm-up."""
    total_steps: int | None = None
    """Planned optimizer steps; the cosine after the warm-up needs them."""
    final_factor: float = 0.1
    """Where the cosine ends, as a part of the user's learning rate."""
    on_nonfinite: Literal["propagate", "skip"] | None = None

    def merged(self, other: Self) -> Self:
        """These settings with everything that `other` asks for."""
        asked = {
            field.name: getattr(other, field.name)
            for field in fields(other)
            if getattr(other, field.name) != field.default
        }
        return replace(self, **asked)


def learning_rate_factor(settings: GuardSettings, n: int) -> float:
    """Factor on the learning rate at step n = 0, 1, ...: linear to 1, then cosine or 1.

    The last warm-up step and the first cosine step both have factor 1; step
    `total_steps - 1` and all later ones have `final_factor`.
    """
    if n + 1 < settings.warmup:
        return (n + 1) / settings.warmup
    if settings.total_steps is None:
        return 1.0
    start = max(settings.warmup, 1)
    past = n + 1 - start
    planned = settings.total_steps - start
    if past <= 0:
        return 1.0
    if past >= planned:
        return settings.final_factor
    wave = (1 + math.cos(math.pi * past / planned)) / 2
    return settings.final_factor + (1 - settings.final_factor) * wave
