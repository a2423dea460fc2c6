"""Trial readings: what a few real optimizer steps show, after which nothing has happened."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from rnnguard.errors import Refusal, refuse
from rnnguard.inspection.gates import parameter_name, recurrences
from rnnguard.inspection.sites import recurrent_modules
from rnnguard.probe.nonfinite import FirstNonfinite
from rnnguard.probe.snapshot import Snapshot
from rnnguard.probe.subject import Subject
from rnnguard.probe.training import StepReading, Training, as_in_training, needs_closure
from rnnguard.probe.trial_readings import Stop, Trial

__all__ = ["FirstNonfinite", "Stop", "Trial", "run_trial"]

STILL = -300.0  # log10 of a change that is exactly zero
_SERIES = ("applied", "cut_to", "calibrating")


def run_trial(
    subject: Subject,
    steps: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
    scheduler: Any = None,
    clip: float | None = None,
    seconds: float | None = None,
) -> Trial:
    """Trains for `steps` optimizer steps on the subject's batches in turn, and takes all back.

    The optimizer runs with its hooks, the `scheduler` steps once after each applied step (leave
    out one that steps per epoch), a `scaler` scales and skips as in training. Afterwards
    parameters, optimizer state, groups, scheduler, scaler, random state and whatever model,
    loss and hooks hold are bit for bit as before, also when a step raises. What they keep in
    global variables, in files or in another process is not given back. Meanwhile memory holds
    a second copy of all that.

    clip: norm up to which no step counts as a spike (by default the largest that a clip was
    seen to leave); seconds: no step begins that would likely end later. An error in a step
    ends the trial and is told in `Trial.stopped`. Raises RefusedError (RG912) without
    optimizer, loss or steps, and (RG906) for a GradScaler with an optimizer that needs a
    closure.
    """
    refuse(_refusals(subject, steps, scaler))
    optimizer = subject.optimizer
    assert optimizer is not None
    model, batches = subject.model, subject.batches
    started = time.perf_counter()
    snapshot = Snapshot(model, optimizer=optimizer, others=(scaler, scheduler, batches))
    try:
        training = Training(subject, optimizer, scaler, scheduler)
        torch.manual_seed(subject.seed)
        with as_in_training(model):
            starts, again = training.losses(), training.losses()
            snapshot.restore()
            torch.manual_seed(subject.seed)
            readings, stop = _taken(training, steps, seconds, started)
    finally:
        snapshot.restore()
        torch.clear_autocast_cache()
    seconds_taken = time.perf_counter() - started
    found = _trial(readings, _recurrent_weights(subject), clip)
    return Trial(
        **found,
        planned=steps,
        starts=starts,
        noise=_noise(starts, again),
        stopped=stop,
        first_nonfinite=training.first_nonfinite,
        seconds=seconds_taken,
    )


def _trial(readings: list[StepReading], recurrent: set[str], clip: float | None) -> dict[str, Any]:
    """The fields of a Trial that come from its steps."""
    series = ("losses", "loss"), ("norms", "norm"), *((name, name) for name in _SERIES)
    return {
        **{field: tuple(getattr(r, name) for r in readings) for field, name in series},
        "clip": _clip(readings) if clip is None else clip,
        "update_ratios": _update_ratios(readings),
        "recurrent_update_ratio": _joint_ratio(readings, recurrent),
    }


def _noise(once: tuple[float, ...], again: tuple[float, ...]) -> float:
    """Standard deviation of a loss, from two of each batch; 0 where there are not two."""
    squares = [(a - b) ** 2 for a, b in zip(once, again, strict=False)]
    return math.sqrt(statistics.fmean(squares) / 2) if squares else 0.0


def _refusals(subject: Subject, steps: int, scaler: Any) -> list[Refusal]:
    found = []
    if subject.optimizer is None:
        cure = "Give the optimizer that trains the model."
        found.append(Refusal("RG912", "trial", "there is no optimizer to step.", cure))
    elif scaler is not None and scaler.is_enabled() and needs_closure(subject.optimizer):
        fact = f"a GradScaler cannot step {type(subject.optimizer).__name__} with a closure."
        found.append(Refusal("RG906", "trial", fact, "Train without the GradScaler."))
    if not subject.batches.has_loss:
        cure = "Give data with `loss=`, or `step=`."
        found.append(Refusal("RG912", "trial", "there is no loss to train on.", cure))
    if steps < 1:
        found.append(Refusal("RG912", "trial", f"{steps} steps show nothing.", "Give at least 1."))
    return found


def _taken(
    training: Training, steps: int, seconds: float | None, started: float
) -> tuple[list[StepReading], Stop | None]:
    """The steps until all are taken, one raises, or the time is up."""
    readings: list[StepReading] = []
    longest = 0.0
    for index in range(steps):
        begun = time.perf_counter()
        if seconds is not None and begun - started + longest > seconds:
            words = f"the time of {seconds:g} s was up after {index} of {steps} steps"
            return readings, Stop(step=index, stage="time", words=words)
        try:
            readings.append(training.step(index))
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            words = f"{training.stage} raised {type(error).__name__}: {said}"
            return readings, Stop(step=index, stage=training.stage, words=words)
        longest = max(longest, time.perf_counter() - begun)
    return readings, None


def _recurrent_weights(subject: Subject) -> set[str]:
    """The names of every hidden-to-hidden weight of the model."""
    return {
        ".".join(filter(None, (path, parameter_name(module, "weight_hh", layer, direction))))
        for path, module in recurrent_modules(subject.model).items()
        for layer, direction in recurrences(module)
    }


def _update_ratios(readings: list[StepReading]) -> dict[str, float]:
    names = readings[0].moved if readings else {}
    found = {name: _joint_ratio(readings, {name}) for name in names}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _joint_ratio(readings: list[StepReading], names: set[str]) -> float | None:
    """log10 of |change| / |weight|, median over applied steps; None where no weight was."""
    ratios = []
    for reading in readings:
        held = [name for name in names if name in reading.moved]
        weight = math.hypot(*(reading.weights[name] for name in held))
        moved = math.hypot(*(reading.moved[name] for name in held))
        if reading.applied and weight > 0 and math.isfinite(moved / weight):
            ratios.append(moved / weight)
    if not ratios:
        return None
    middle = statistics.median(ratios)
    return math.log10(middle) if middle > 0 else STILL


def _clip(readings: list[StepReading]) -> float | None:
    return max((r.cut_to for r in readings if r.cut_to is not None), default=None)
