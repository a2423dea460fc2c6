"""Trial readings as a record: series over real optimizer steps, and what follows from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict

from rnnguard.measurements import RunReadings
from rnnguard.probe.nonfinite import FirstNonfinite
from rnnguard.probe.training import Stage
from rnnguard.records import Record

SPIKE = 10.0  # times the running median
HISTORY = 200  # steps that the running median looks back
FEWEST = 5  # norms that make a median


class Stop(Record):
    """Why a trial ended early: the step, what ran then, and torch's own words."""

    step: int
    stage: Stage | Literal["time"]
    words: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.words}"


class Trial(Record):
    """Real optimizer steps, one entry per step taken; numbers beyond them are derived.

    `starts`: what the untouched model gives on each batch; step i takes batch i modulo their count.
    `noise`: by how much its loss on a batch differs from one time to the next, as a standard
    deviation. `losses`: as the user's loss gives them. `norms`: Euclidean norm of all gradients
    of the optimizer's parameters before any clip, and without a GradScaler's factor. `applied`:
    whether any parameter moved. `cut_to`: the norm that a clip left, None where none
    engaged. `calibrating`: gradients not finite only because a GradScaler's factor was too
    large. `update_ratios`: log10 of |change| / |weight| by parameter, median over the
    applied steps; `recurrent_update_ratio`: that of all hidden-to-hidden weights together.
    """

    # A diverged run's losses are no numbers, and must survive the way through JSON.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    planned: int
    starts: tuple[float, ...] = ()
    noise: float = 0.0
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    applied: tuple[bool, ...]
    cut_to: tuple[float | None, ...]
    calibrating: tuple[bool, ...]
    clip: float | None = None
    update_ratios: dict[str, float]
    recurrent_update_ratio: float | None
    stopped: Stop | None = None
    first_nonfinite: FirstNonfinite | None = None
    seconds: float

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones among them."""
        return len(self.losses)

    @property
    def clipped(self) -> tuple[bool, ...]:
        return tuple(norm is not None for norm in self.cut_to)

    @property
    def clip_fraction(self) -> float:
        """Share of steps in which a clip engaged."""
        return _share(sum(self.clipped), self.steps)

    @property
    def median_norm(self) -> float | None:
        """Median of the finite norms; None when there is none."""
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        return statistics.median(finite) if finite else None

    @property
    def skipped(self) -> tuple[int, ...]:
        """Steps that moved no parameter."""
        return tuple(i for i, moved in enumerate(self.applied) if not moved)

    @property
    def calibration_steps(self) -> tuple[int, ...]:
        return tuple(i for i, calibrating in enumerate(self.calibrating) if calibrating)

    @property
    def nonfinite_steps(self) -> tuple[int, ...]:
        """Steps with a loss or norm that is not finite, a GradScaler's calibration aside."""
        pairs = enumerate(zip(self.losses, self.norms, self.calibrating, strict=True))
        return tuple(
            i
            for i, (loss, norm, calibrating) in pairs
            if not calibrating and not (math.isfinite(loss) and math.isfinite(norm))
        )

    @property
    def spikes(self) -> tuple[int, ...]:
        """Steps with a norm above both the clip and 10 x the median of the 200 before, or with
        a loss or norm that is not finite; the first 5 are held against their own median.
        """
        return tuple(sorted({*self.nonfinite_steps, *self._high_steps()}))

    @property
    def spike_rate(self) -> float:
        """Share of spikes among the steps, a GradScaler's calibration aside."""
        return _share(len(self.spikes), self.steps - len(self.calibration_steps))

    @property
    def loss_change(self) -> float | None:
        """Mean loss of the last fifth of the steps minus that of the first; below 0 is better.

        None for fewer than 4 steps or where a loss in either fifth is not finite.
        """
        fifths = self._fifths()
        return None if fifths is None else statistics.fmean(fifths[1]) - statistics.fmean(fifths[0])

    @property
    def loss_change_stderr(self) -> float | None:
        """Standard error of `loss_change` over the steps of both fifths (Welch)."""
        fifths = self._fifths()
        if fifths is None:
            return None
        return math.sqrt(sum(statistics.variance(part) / len(part) for part in fifths))

    @property
    def loss_above_start(self) -> float | None:
        """Mean loss of the last fifth minus that of the untouched model on the same batches.

        The first steps may throw the loss up so far that it falls from there ever after.
        """
        rises = self._rises()
        return None if rises is None else statistics.fmean(rises)

    @property
    def loss_rise(self) -> float | None:
        """`loss_above_start` over the mean size of the untouched model's losses; 0 within noise.

        A policy's loss lies about 0 with either sign, and dropout alone makes it rise or fall.
        """
        rises, size = self._rises(), statistics.fmean(map(abs, self._starts or (0.0,)))
        if rises is None or not size:
            return None
        mean, batches = statistics.fmean(rises), min(len(rises), len(self._starts))
        error = self.noise * math.sqrt(2 / batches)
        return mean / size if abs(mean) > 2 * error else 0.0

    @property
    def improved(self) -> bool | None:
        """Whether the loss fell, by more than two standard errors and below where it began.

        None where that is not clear; False where it rose or ended in no number.
        """
        if self._ends_nonfinite():
            return False
        change, error, above = self.loss_change, self.loss_change_stderr, self.loss_above_start
        if change is None or error is None or above is None or abs(change) <= 2 * error:
            return None
        if change > 0:
            return False
        return True if above < 0 else None

    def _high_steps(self) -> Iterator[int]:
        finite = [(step, norm) for step, norm in enumerate(self.norms) if math.isfinite(norm)]
        norms = [norm for _, norm in finite]
        if len(norms) < FEWEST:
            return
        clip = self.clip or 0.0
        for position, (step, norm) in enumerate(finite):
            # The first step of all may be the one that explodes and leaves a dead, calm network.
            until = max(position, FEWEST)
            bound = SPIKE * statistics.median(norms[max(0, until - HISTORY) : until])
            if norm > bound and (self.clipped[step] or norm > clip):
                yield step

    @property
    def _starts(self) -> tuple[float, ...]:
        return self.starts or self.losses[:1]

    def _rises(self) -> list[float] | None:
        """By how much each loss of the last fifth is above that of the untouched model."""
        fifths = self._fifths()
        if fifths is None:
            return None
        last = range(self.steps - len(fifths[1]), self.steps)
        return [self.losses[i] - self._starts[i % len(self._starts)] for i in last]

    def _fifths(self) -> tuple[list[float], list[float]] | None:
        size = max(2, self.steps // 5)
        first, last = list(self.losses[:size]), list(self.losses[-size:])
        if self.steps < 2 * size or not all(map(math.isfinite, (*first, *last))):
            return None
        return first, last

    def _ends_nonfinite(self) -> bool:
        last = self.losses[-max(2, self.steps // 5) :]
        return not all(map(math.isfinite, last))


def _share(count: int, steps: int) -> float:
    return count / steps if steps > 0 else 0.0


def with_trial(run: RunReadings, trial: Trial) -> RunReadings:
    """The readings of the run together with those of a trial of it."""
    kept = trial.stopped is not None and "backward through the graph a second time" in (
        trial.stopped.words
    )
    counted = trial.steps - len(trial.calibration_steps)
    update = trial.recurrent_update_ratio
    if update is None and trial.update_ratios:
        update = statistics.median(trial.update_ratios.values())
    return run.model_copy(
        update={
            "trial_steps": trial.steps,
            "spike_rate": trial.spike_rate,
            "clip_fraction": trial.clip_fraction,
            "skip_rate": _share(len(trial.skipped) - len(trial.calibration_steps), counted),
            "update_ratio": update,
            "loss_change": trial.loss_change,
            "loss_above_start": trial.loss_above_start,
            "loss_rise": trial.loss_rise,
            "improved": trial.improved,
            "nonfinite_steps": len(trial.nonfinite_steps),
            "first_nonfinite": str(trial.first_nonfinite) if trial.first_nonfinite else None,
            "graph_kept": kept or run.graph_kept,
            "trial_stopped": str(trial.stopped).split(". ")[0] if trial.stopped else None,
        }
    )
