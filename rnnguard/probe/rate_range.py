"""Learning-rate range test: how far the rate may go up, from one short sweep that is taken back.

Smith 2017 (arXiv 1506.01186), with the batches' own difficulty taken out of the losses, and with
another rule: neither the steepest fall nor the least loss, but where the loss leaves. On a task
that begins with a plateau there is no fall to go by.

Over 14 trainings at three rates and three seeds, 150 to 300 steps with warm-up, cosine and a clip
of 1, the rule was never worse than the user's own rate beyond noise (steepest fall 7 times of 126,
a tenth of the rate of least loss 13 times), and within a factor of 1.9 of the best peaks, where
the user's rate is within 7. Sweeps of 25, 30 and 40 steps did the same.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from pydantic import ConfigDict
from torch.optim import Optimizer

from rnnguard.errors import Refusal, refuse
from rnnguard.probe.snapshot import Snapshot, scaled_rates
from rnnguard.probe.subject import Subject
from rnnguard.probe.training import Training, as_in_training, needs_closure
from rnnguard.records import Record

WINDOW = 5  # losses to a median: two spikes in five, as of Adam at its edge, are not the end
RISE = 0.05  # of the size of the untouched losses, above them, at which the loss has left
NOISE = 3.0  # standard deviations of a loss that are no rise
OVERSHOT = 6.3
"""How far beyond the edge a sweep leaves: errors shrank below it, and must grow back first.

On a parabola of curvature c under plain descent a step at rate r multiplies the error by
|1 - rc|. Along an exponential sweep these factors multiply to 1 where the real part of Li2(rc)
is 0, at rc = 12.595, however fast the sweep; the edge of stability lies at rc = 2.
"""
BELOW = 2.0  # parts of the edge that are the peak, as on that parabola the best rate, and measured
MOST = 10.0  # peak, however far the loss stays: a few steps tell little of a long training
NOTICEABLE = 1.5  # a peak nearer to 1 than this is the user's own rate
FEWEST = 10  # steps of a sweep
BATCHES = 8  # in turn: each costs two looks at the untouched model


class RateRange(Record):
    """A sweep of the learning rate: factors on the user's own, and what the loss did there.

    `losses`: as taken, one per step, each before the step at that factor. `smoothed`: running
    median of how far they lie above the untouched model's on the same batch, as a share of the
    untouched losses' size. `left`: the factor after which they stay above; `edge`: the factor
    from which steps overshoot, which shows only later; None where nothing left. `peak`: the
    factor proposed for the top of warm-up and cosine, 1 for the user's own rate, below 1 where
    that rate is too large already, None where the sweep shows nothing. `words` say why.
    """

    # A sweep may end in a loss that is no number, and must survive the way through JSON.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    factors: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    smoothed: tuple[float, ...] = ()
    left: float | None = None
    edge: float | None = None
    peak: float | None = None
    words: str

    def __str__(self) -> str:
        return self.words


def rate_range(
    subject: Subject,
    *,
    steps: int = 30,
    seconds: float | None = None,
    lowest: float = 0.1,
    highest: float = 150.0,
) -> RateRange:
    """How far up the learning rate may go, from real steps at growing rates, all taken back.

    lowest, highest: factors on each group's own rate at rest, between which it grows
    exponentially; seconds: no step begins that would likely end later. The sweep ends where the
    loss leaves. Parameters, optimizer, random state and what model and loss hold are afterwards
    bit for bit as before, also where a step raises, whose error is then told in `words`. Raises
    RefusedError (RG912) without optimizer or loss, and for a sweep that cannot be meant.
    """
    refuse(_refusals(subject, steps, lowest, highest))
    optimizer = subject.optimizer
    assert optimizer is not None
    if words := _unswept(optimizer):
        return RateRange(words=words)
    started = time.perf_counter()
    snapshot = Snapshot(subject.model, optimizer=optimizer, others=(subject.batches,))
    factors = [lowest * (highest / lowest) ** (i / (steps - 1)) for i in range(steps)]
    few = replace(subject.batches, batches=subject.batches.batches[:BATCHES])
    try:
        training = Training(replace(subject, batches=few), optimizer)
        torch.manual_seed(subject.seed)
        with as_in_training(subject.model):
            sweep = _Sweep(training.losses(), training.losses())
            snapshot.restore()
            torch.manual_seed(subject.seed)
            if sweep.size:
                sweep.words = _swept(sweep, training, optimizer, factors, seconds, started)
    finally:
        snapshot.restore()
        torch.clear_autocast_cache()
    return _proposed(sweep, factors[: len(sweep.losses)])


@dataclass
class _Sweep:
    """The losses so far, beside what the untouched model gives on each batch, twice."""

    starts: tuple[float, ...]
    again: tuple[float, ...]
    losses: list[float] = field(default_factory=list)
    words: str | None = None
    """Why it ended before the loss left or the last step was taken."""

    def __post_init__(self) -> None:
        mean = statistics.fmean(map(abs, self.starts)) if self.starts else 0.0
        self.size = mean if math.isfinite(mean) else 0.0
        squares = [(a - b) ** 2 for a, b in zip(self.starts, self.again, strict=False)]
        noise = math.sqrt(statistics.fmean(squares) / 2) if squares else 0.0
        self.bound = max(RISE, NOISE * noise / self.size) if self.size else math.inf

    def rises(self) -> list[float]:
        """How far each loss lies above that of the untouched model, in its size."""
        starts = self.starts
        taken = [(v - starts[i % len(starts)]) / self.size for i, v in enumerate(self.losses)]
        return [rise if math.isfinite(rise) else math.inf for rise in taken]

    def smoothed(self) -> list[float]:
        """Medians of the window around each step; what comes after no number is none either."""
        rises, half = self.rises(), WINDOW // 2
        rises += [math.inf] * half if math.inf in rises[-1:] else []
        whole = range(len(self.losses))
        return [statistics.median(rises[max(0, i - half) : i + half + 1]) for i in whole]

    def has_left(self) -> bool:
        """Whether the newest losses lie above the bound, or are no numbers."""
        newest = self.rises()[-WINDOW:]
        full = len(newest) == WINDOW and statistics.median(newest) > self.bound
        return full or math.inf in newest[-1:]


def _swept(
    sweep: _Sweep,
    training: Training,
    optimizer: Optimizer,
    factors: Sequence[float],
    seconds: float | None,
    started: float,
) -> str | None:
    """Takes steps until the loss leaves; gives why it ended before that, if it did."""
    longest = 0.0
    for index, factor in enumerate(factors):
        begun = time.perf_counter()
        if seconds is not None and begun - started + longest > seconds:
            return f"the time of {seconds:g} s was up after {index} of {len(factors)} steps"
        try:
            with scaled_rates(optimizer, factor):
                loss = training.plain_step(index % len(sweep.starts))
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            return f"at {factor:.3g} times the rate a step raised {type(error).__name__}: {said}"
        sweep.losses.append(loss)
        if sweep.has_left():
            return None
        longest = max(longest, time.perf_counter() - begun)
    return None


def _proposed(sweep: _Sweep, factors: Sequence[float]) -> RateRange:
    if not sweep.size:
        return RateRange(words="the untouched model's loss is nothing to compare with")
    smoothed, reached = sweep.smoothed(), factors[-1] if factors else 0.0
    told = f"the loss has not left at {reached:.3g} times the rate" if factors else ""
    found = RateRange(
        factors=tuple(factors),
        losses=tuple(sweep.losses),
        smoothed=tuple(smoothed),
        words="; ".join(filter(None, (told, sweep.words))),
    )
    above = next((i for i, rise in enumerate(smoothed) if rise > sweep.bound), None)
    if above is not None and sweep.words is None:
        return found.model_copy(update=_below(factors[max(above - 1, 0)]))
    if factors and not any(sweep.rises()):
        return found.model_copy(update={"words": sweep.words or "no step changed the loss"})
    peak = min(MOST, reached / OVERSHOT / BELOW)
    return found if peak < NOTICEABLE else found.model_copy(update={"peak": _rounded(peak)})


def _below(left: float) -> dict[str, object]:
    """The fields that follow from the factor at which the loss left."""
    edge, words = left / OVERSHOT, f"the loss leaves at {left:.3g} times the rate"
    peak = min(MOST, edge / BELOW)
    if peak < NOTICEABLE and left > 1:
        peak, words = 1.0, f"{words}, which leaves the rate as it is"
    elif left <= 1:
        words = f"{words}: the rate itself is too large"
    return {"left": left, "edge": edge, "peak": _rounded(peak), "words": words}


def _rounded(factor: float) -> float:
    """Two digits: more would say what a sweep cannot know."""
    return float(f"{factor:.2g}")


def _unswept(optimizer: Optimizer) -> str:
    """Why the rate of this optimizer cannot be swept, in words; empty where it can."""
    name = type(optimizer).__name__
    if needs_closure(optimizer):
        return f"{name} evaluates the loss several times in a step, and chooses its length itself"
    if not all("lr" in group for group in optimizer.param_groups):
        return f"{name} has a parameter group without a learning rate"
    if not any(torch.as_tensor(group["lr"]).detach().any() for group in optimizer.param_groups):
        return "every learning rate is 0"
    return ""


def _refusals(subject: Subject, steps: int, lowest: float, highest: float) -> Iterator[Refusal]:
    if subject.optimizer is None:
        cure = "Give the optimizer that trains the model."
        yield Refusal("RG912", "rate_range", "there is no optimizer to step.", cure)
    if not subject.batches.has_loss:
        cure = "Give data with `loss=`, or `step=`."
        yield Refusal("RG912", "rate_range", "there is no loss to train on.", cure)
    if steps < FEWEST:
        fact = f"{steps} steps are no sweep."
        yield Refusal("RG912", "rate_range", fact, f"Give at least {FEWEST}.")
    if not 0 < lowest < highest < math.inf:
        fact = f"a sweep from {lowest!r} to {highest!r} cannot be meant."
        yield Refusal("RG912", "rate_range", fact, "Give two factors above 0, the lower one first.")
