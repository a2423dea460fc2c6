"""What a step guard is asked to do, and the learning-rate factor that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from rnnguard.errors import Refusal, refuse
from rnnguard.records import near_miss

Clip = Literal["norm", "value", "group", "percentile", "z_score"]
CLIPS: tuple[Clip, ...] = get_args(Clip)
POLICIES = ("propagate", "skip")


@dataclass(frozen=True)
class GuardSettings:
    """What one guard does at each step; a field at its default asks for nothing.

    Raises RefusedError (RG914) that names every field which cannot be meant. A clip

    * by "norm" (also where only `max_norm` is given) bounds the norm of all gradients;
    * by "group" bounds the norm of each parameter group by itself;
    * by "value" bounds every entry (the size that is counted is then the largest entry);
    * by "percentile" bounds the norm by a percentile of the norms in the window (AutoClip,
      Seetharaman et al. 2020);
    * by "z_score" brings a norm that lies z > `z_score` deviations above the mean of the window
      down to mean + z_score^2 / z deviations, and only that enters the window (ZClip, Kumar et
      al. 2025).

    The window holds the norms of the last `window` steps; those that are not finite count for
    nothing. It takes up new norms every 16 steps. The last two forms act once it knows 25 norms
    or is full; until then `max_norm` bounds the norm where it is given.
    """

    max_norm: float | None = None
    """Largest gradient norm."""
    warmup: int = 0
    """Steps of linear warm-up."""
    total_steps: int | None = None
    """Planned optimizer steps; the cosine after the warm-up needs them."""
    final_factor: float = 0.1
    """Where the cosine ends, as a part of the user's learning rate; never above `peak`."""
    peak: float = 1.0
    """Factor on the user's learning rate at the top of warm-up and cosine, or held after it."""
    on_nonfinite: Literal["propagate", "skip"] | None = None
    budget: int = 10
    """Non-finite steps in a row after which a policy for them warns (RG413)."""
    clip: Clip | None = None
    max_value: float | None = None
    """Largest entry of a gradient, for the clip by value."""
    percentile: float = 10.0
    z_score: float = 2.5
    window: int = 100
    """Norms that are remembered, for the adaptive clips and for the statistics."""

    def __post_init__(self) -> None:
        if self.clip is None and self.max_norm is not None:
            object.__setattr__(self, "clip", "norm")
        refuse(self._senseless())

    def _senseless(self) -> Iterator[Refusal]:
        if self.clip is not None and self.clip not in CLIPS:
            fact = f"{self.clip!r} is not a form of clipping;"
            yield Refusal("RG914", "clip", fact, near_miss(str(self.clip), list(CLIPS)))
        if self.on_nonfinite not in (None, *POLICIES):
            fact = f"{self.on_nonfinite!r} is not a policy;"
            cure = near_miss(str(self.on_nonfinite), list(POLICIES))
            yield Refusal("RG914", "on_nonfinite", fact, cure)
        for clips, needed in ((("norm", "group"), "max_norm"), (("value",), "max_value")):
            if self.clip in clips and getattr(self, needed) is None:
                fact, cure = f"a clip by {self.clip} needs it.", f"Give {needed}."
                yield Refusal("RG914", needed, fact, cure)
        for name, sound, cure in (
            ("max_norm", self.max_norm is None or self.max_norm > 0, "Give a number above 0."),
            ("max_value", self.max_value is None or self.max_value > 0, "Give a number above 0."),
            ("peak", 0 < self.peak < math.inf, "Give a finite number above 0."),
            ("percentile", 0 <= self.percentile <= 100, "Give a number from 0 to 100."),
            ("z_score", self.z_score > 0, "Give a number above 0."),
            ("window", self.window >= 2, "Give 2 or more."),
            ("budget", self.budget >= 1, "Give 1 or more."),
        ):
            if not sound:
                yield Refusal("RG914", name, f"{getattr(self, name)!r} cannot be meant.", cure)

    def merged(self, other: Self) -> Self:
        """These settings with everything that `other` asks for."""
        asked: dict[str, Any] = {
            field.name: getattr(other, field.name)
            for field in fields(other)
            if getattr(other, field.name) != field.default
        }
        return replace(self, **asked)


def learning_rate_factor(settings: GuardSettings, n: int) -> float:
    """Factor on the learning rate at step n = 0, 1, ...: linear to `peak`, then cosine or `peak`.

    The last warm-up step and the first cosine step both have factor `peak`; step
    `total_steps - 1` and all later ones have `final_factor`, or `peak` where that is less. With
    p = peak, w = warmup, T = total_steps and a learning rate of p these are the values of torch's
    SequentialLR([LinearLR(1 / w, 1, total_iters=w - 1),
    CosineAnnealingLR(T - w, eta_min=final_factor)], milestones=[w - 1]) up to step T - 1.
    """
    peak = settings.peak
    if n + 1 < settings.warmup:
        return peak * (n + 1) / settings.warmup
    if settings.total_steps is None:
        return peak
    start = max(settings.warmup, 1)
    past = n + 1 - start
    planned = settings.total_steps - start
    if past <= 0:
        return peak
    end = min(settings.final_factor, peak)
    if past >= planned:
        return end
    wave = (1 + math.cos(math.pi * past / planned)) / 2
    return end + (peak - end) * wave


def beside_a_schedule(settings: GuardSettings) -> GuardSettings:
    """What is left of these settings where the user's own schedule sets the rate: the warm-up.

    Two decays would multiply, and so would two peaks.
    """
    return replace(settings, total_steps=None, peak=1.0)
