"""What a guard has seen and done: counts and recent norms in one tensor, and their reading.

Everything here but `Engagement.read` runs where the gradients lie and never makes the host
wait. A step only leaves five values behind; every `BLOCK` steps they are counted and the norms
enter the window, since many small operations at each step would cost more than they tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rnnguard.rewrite.schedule import GuardSettings

ENOUGH = 25
"""Norms that the adaptive clips and the count of spikes wait for, or a full window."""
SPIKE = 10.0
"""A norm above so many times the median of the window is a spike."""
BLOCK = 16

# Where things stand in a tally: the counts, the rows of a block, the window (oldest first; NaN
# where still empty). A norm that is not finite stays in its place and counts for nothing.
CLIPPED, SPIKES, NONFINITE, SKIPPED, LOST, ALARMS, IN_A_ROW, LAST, BOUND = range(9)
HEAD = 9
COLUMNS = 5
WINDOW = HEAD + BLOCK * COLUMNS


@dataclass(frozen=True)
class Engagement:
    """How a guard has engaged so far; reading it waits for the device, unlike the steps.

    Counts are over all steps, also those before a checkpoint that was loaded. Norms are those
    before the clip, without a scaler's factor; with a clip by value they are largest entries.
    """

    steps: int
    """Steps that moved the weights."""
    clipped: int
    spikes: int
    """Steps whose norm was above 10 x the running median."""
    nonfinite: int
    """Steps whose norm was not finite; those that a GradScaler skips do not count."""
    skipped: int
    """Steps that the guard left out because their norm was not finite."""
    in_a_row: int
    """Non-finite steps since the last finite one."""
    last_norm: float | None
    median_norm: float | None
    """Over the window; with a clip by z-score it is over the norms after the clip."""
    threshold: float | None
    """What bounded the last norm; None where nothing did, or the norm was not finite."""

    @classmethod
    def read(cls, tally: Tensor, seen: int, counted: int, settings: GuardSettings) -> Self:
        """What a tally says after `seen` rows and `counted` counted steps."""
        tally = folded(tally, seen % BLOCK, settings)
        head, window = tally[:HEAD].tolist(), tally[WINDOW:]
        median = float(torch.where(window < torch.inf, window, torch.nan).nanquantile(0.5))
        clipped, spikes, nonfinite, skipped, lost, _, in_a_row = (int(v) for v in head[:LAST])
        return cls(
            steps=counted - lost,
            clipped=clipped,
            spikes=spikes,
            nonfinite=nonfinite,
            skipped=skipped,
            in_a_row=in_a_row,
            last_norm=head[LAST] if seen else None,
            median_norm=median if median == median else None,
            threshold=head[BOUND] if abs(head[LAST]) + abs(head[BOUND]) < torch.inf else None,
        )

    @property
    def share_clipped(self) -> float:
        """The clipped steps as a part of all that moved the weights."""
        return self.clipped / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        spikes = f"{self.spikes} spike{'' if self.spikes == 1 else 's'}"
        counts = f"{spikes}, {self.nonfinite} not finite, {self.skipped} skipped"
        words = [f"{self.steps} steps", f"{self.share_clipped:.0%} clipped", counts]
        for name, value in (
            ("median norm", self.median_norm),
            ("last", self.last_norm),
            ("threshold", self.threshold),
        ):
            if value is not None:
                words.append(f"{name} {value:.3g}")
        return ", ".join(words)


def new_tally(window: int, device: torch.device) -> Tensor:
    """A tally of nothing, for a window of so many norms."""
    # Doubles hold any norm exactly and any count; Apple's devices have none.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    counts = torch.zeros(LAST, dtype=dtype, device=device)
    return torch.cat([counts, counts.new_full((WINDOW - LAST + window,), torch.nan)])


def fitted(tally: Tensor, window: int, device: torch.device) -> Tensor:
    """The tally on this device, with the newest norms of a window of this length."""
    tally = tally.to(device, non_blocking=True)
    surplus = tally.numel() - WINDOW - window
    if surplus == 0:
        return tally
    missing = tally.new_full((max(-surplus, 0),), torch.nan)
    return torch.cat([tally[:WINDOW], missing, tally[WINDOW + max(surplus, 0) :]])


def statistics(tally: Tensor, settings: GuardSettings) -> tuple[Tensor, ...]:
    """What an adaptive clip needs to know of the window: the percentile, or mean and deviation."""
    window = tally[WINDOW:]
    cold = torch.inf if settings.max_norm is None else settings.max_norm
    enough = min(settings.window, ENOUGH)
    if settings.clip == "percentile":
        quantile, known = _quantile(window, settings.percentile / 100)
        return (torch.where(known >= enough, quantile, cold),)
    mean, deviation, known = _mean_and_deviation(window)
    # Around the cold bound with next to no deviation everything else is far above or below.
    tiny = torch.finfo(window.dtype).tiny
    return torch.where(known >= enough, mean, cold), torch.where(known >= enough, deviation, tiny)


def bound_of(known: tuple[Tensor, ...], size: Tensor, settings: GuardSettings) -> Tensor:
    """What an adaptive clip allows a step of this size."""
    if settings.clip == "percentile":
        return known[0]
    mean, deviation = known
    z = ((size - mean) / deviation).clamp(min=settings.z_score)
    return mean + settings.z_score**2 * deviation / z


class Constants:
    """0-dimensional tensors made once: to make one each step costs as much as to use it."""

    def __init__(self) -> None:
        self._made: dict[object, Tensor] = {}

    def full(self, value: float | Tensor, like: Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        key = (value, like.device, like.dtype)
        if key not in self._made:
            self._made[key] = torch.full_like(like, value)
        return self._made[key]

    def flag(self, flag: Tensor | None, like: Tensor) -> Tensor:
        """A flag on the device of `like`; 0 for none."""
        if flag is None:
            return self.full(0.0, like)
        # A copy, since it is read only when the block is full and may be used again before.
        return flag.detach().reshape(()).to(like.device).clone()


def written(tally: Tensor, row: int, values: list[Tensor]) -> Tensor:
    """The tally with further steps from this row on, each of five values.

    These are: its size, the largest of the sizes that are bounded, their bound, and not 0 where
    a GradScaler skips it, and where a kernel leaves out what counts as a step.
    """
    start = HEAD + row * COLUMNS
    return torch.cat([tally[:start], torch.stack(values), tally[start + len(values) :]])


def folded(tally: Tensor, rows: int, settings: GuardSettings) -> Tensor:
    """The tally after its first `rows` rows are counted and their norms are in the window."""
    if not rows:
        return tally
    size, peak, bound, passed, lost = columns = _columns(tally, rows)
    finite = size < torch.inf
    broken = ~finite & (passed == 0)
    window = tally[WINDOW:]
    median, known = _quantile(window, 0.5)
    spike = (size > SPIKE * median) & finite & (known >= min(settings.window, ENOUGH))
    skipped = broken if settings.on_nonfinite == "skip" else torch.zeros_like(broken)
    in_a_row = _in_a_row(broken, tally[IN_A_ROW])
    flags = [
        finite & (peak > bound),
        spike,
        broken,
        skipped,
        lost != 0,
        in_a_row == settings.budget,
    ]
    counts = tally[:IN_A_ROW] + torch.stack(flags).sum(1, dtype=tally.dtype)
    recent = torch.stack([in_a_row[-1], size[-1], bound[-1]])
    entered = torch.cat([window, _entering(columns, settings)])[rows:]
    return torch.cat([counts, recent, tally[HEAD:WINDOW], entered])


def _columns(tally: Tensor, rows: int) -> tuple[Tensor, ...]:
    return tally[HEAD : HEAD + rows * COLUMNS].view(rows, COLUMNS).unbind(1)


def _entering(columns: tuple[Tensor, ...], settings: GuardSettings) -> Tensor:
    size, _, bound, _, _ = columns
    if settings.clip != "z_score":
        return size
    return torch.where(size < torch.inf, size.minimum(bound), torch.nan)


def _in_a_row(broken: Tensor, before: Tensor) -> Tensor:
    """For each row the broken rows up to it, together with those before the block."""
    number = torch.arange(1, len(broken) + 1, dtype=before.dtype, device=before.device)
    last_sound = torch.where(broken, -before, number).cummax(0).values
    return number - last_sound


def _quantile(window: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """The quantile of the finite norms, linear between the nearest two; and how many there are."""
    ordered = window.sort().values
    known = (ordered < torch.inf).sum(dtype=window.dtype)
    rank = (known - 1).clamp(min=0) * q
    places = torch.arange(len(window), dtype=window.dtype, device=window.device)
    weights = (1 - (places - rank).abs()).clamp(min=0)
    return ordered.nan_to_num(0.0, 0.0).dot(weights), known


def _mean_and_deviation(window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of the finite norms; and how many there are."""
    finite = window < torch.inf
    known = finite.sum(dtype=window.dtype)
    mean = torch.where(finite, window, 0.0).sum() / known
    variance = torch.where(finite, window - mean, 0.0).square().sum() / known
    # Where all norms were equal, any other would be infinitely many deviations away.
    return mean, variance.sqrt().maximum(1e-6 * mean), known
