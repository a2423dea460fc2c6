"""The user's own training step, run a few times under watch and taken back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.inspection.batches import cloned
from rnnguard.inspection.optimized import missing_parameters
from rnnguard.inspection.own_code import names_in, own_functions
from rnnguard.probe.holdings import same_bits
from rnnguard.probe.idle import in_words
from rnnguard.probe.snapshot import Snapshot
from rnnguard.probe.step_events import StepWatch
from rnnguard.probe.step_readings import segments_of, step_readings
from rnnguard.probe.subject import Subject
from rnnguard.probe.training import as_in_training
from rnnguard.usage import ClipOrder

TrainStep = Callable[[nn.Module, Any, Any], Any]
MOST_CALLS = 8  # until an optimizer step is seen, since gradients may be accumulated
BLOWN_UP = 1e6
NO_STEP = "train_step took no step of this optimizer while it was watched."
_MISSING = object()


@dataclass(frozen=True)
class Watched:
    """What watched steps told: fields of RunUsage, and in words why there are not more."""

    readings: dict[str, Any] = field(default_factory=dict)
    words: str | None = None


def watch_steps(
    subject: Subject, optimizer: Any, train_step: TrainStep, steps: int = 3, seconds: float = 10.0
) -> Watched:
    """Runs `train_step(model, optimizer, batch)` and gives what it does with the gradients.

    optimizer: as the training step takes it; where it wraps another, the steps of
    `subject.optimizer` count. After `steps` calls come one or two more, with a gradient that is
    not finite and one that is far too large. No call but the first begins after `seconds`. What
    model, optimizer, batches, the function and the globals of its file hold is bit for bit as
    before, with the random state; not so what is written to files, classes or other files'
    globals, nor what an iterator has given. A step that raises ends it and is told.
    """
    stepped = subject.optimizer if subject.optimizer is not None else optimizer
    if subject.batches.basis not in ("real data", "given inputs"):
        return Watched(words="train_step was not watched: there are no data to run it on.")
    functions = own_functions(train_step)
    held = [f.__globals__[n] for f in functions for n in _globals_in(f) if n in f.__globals__]
    snapshot = Snapshot(
        subject.model,
        optimizer=optimizer,
        others=(stepped, train_step, *functions, *held, subject.batches),
    )
    bindings = [(f.__globals__, n, f.__globals__.get(n, _MISSING))
                for f in functions for n in _globals_in(f)]  # fmt: skip

    def restore() -> None:
        snapshot.restore()
        for names, name, value in bindings:
            _bind(names, name, value)
        torch.clear_autocast_cache()

    try:
        with as_in_training(subject.model):
            run = _Run(subject, stepped, lambda batch: train_step(subject.model, optimizer, batch),
                       restore, time.perf_counter() + seconds)  # fmt: skip
            return run.watched(steps)
    finally:
        restore()


class _Run:
    """Calls of the training step, from the state in which the model was given."""

    def __init__(
        self,
        subject: Subject,
        optimizer: Optimizer,
        step: Callable[[Any], Any],
        restore: Callable[[], None],
        until: float,
    ) -> None:
        self._subject, self._optimizer, self._step = subject, optimizer, step
        self._restore, self._until = restore, until
        self._error: Exception | None = None

    def watched(self, steps: int) -> Watched:
        self._from_the_start()
        watch = StepWatch(self._subject.model, self._optimizer)
        missing = _missing(self._subject.model, self._optimizer)
        self._take(watch, steps)
        unmoved = [name for name, (p, before) in missing.items() if same_bits(p, before)]
        words = None if self._error is None else _said(self._error)
        readings = step_readings(watch.events, half=watch.half, scaled=watch.scaled)
        if not readings:
            return Watched(words=words or NO_STEP)
        if watch.call > 1 and _is_second_backward(self._error):
            readings["graph_kept"] = True
        if len(unmoved) < len(missing):  # another optimizer trains some, or a copy is kept up
            readings |= {"parameters_missing": len(unmoved), "missing_names": in_words(unmoved)}
        if readings["clip_order"] == "none" and not self._subject.guarded:
            readings["clip_order"] = "sound" if watch.hooked else self._hidden_clip()
        readings["nonfinite_passed"] = self._nonfinite_passed()
        if words is None and time.perf_counter() > self._until:
            words = f"train_step was watched for {readings['watched_steps']} steps: time was up."
        return Watched(readings, words)

    def _from_the_start(self) -> None:
        self._restore()
        self._error = None
        torch.manual_seed(self._subject.seed)
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        for parameter in (*self._subject.model.parameters(), *held):
            parameter.grad = None

    def _take(self, watch: StepWatch, steps: int) -> None:
        """That many calls, or more until the optimizer has stepped once."""
        batches = self._subject.batches.batches
        while watch.call < steps or (not segments_of(watch.events) and watch.call < MOST_CALLS):
            if watch.call and time.perf_counter() > self._until:
                return
            raw = cloned(batches[watch.call % len(batches)].raw)
            watch.call += 1
            try:
                with watch:
                    self._step(raw)
            except Exception as error:
                self._error = error
                return

    def _hidden_clip(self) -> ClipOrder:
        """Whether something bounds a far too large gradient: by hand, in the step, or skipping."""
        found = self._disturbed(_blow_up)
        segments = [] if found is None else segments_of(found.events)
        if not segments or self._error is not None:
            return "sound"  # not known, so nothing is said against it
        step, made = segments[0].step, segments[0].of("backward")
        blown = next((event for event in made if event.disturbed), None)
        if blown is None or not step.taken or not 0 < blown.after < math.inf:
            return "sound"
        later = made[made.index(blown) + 1 :]
        left = min(event.before / event.unit for event in (*later, step))
        return "none" if left > 0.5 * blown.after / blown.unit else "sound"

    def _nonfinite_passed(self) -> bool | None:
        """Whether an infinite gradient gets through to the weights, or makes an empty step."""
        found = self._disturbed(_poison)
        if found is None:
            return None
        segments = segments_of(found.events)
        if not all(bool(torch.isfinite(p.detach()).all()) for p in found.parameters):
            return True
        if self._error is not None:
            return False
        return bool(segments[0].step.taken and segments[0].step.before == 0) if segments else None

    def _disturbed(self, disturb: Callable[[list[Tensor]], bool]) -> StepWatch | None:
        """One more step with gradients that are changed behind its backward, if there was one."""
        if time.perf_counter() > self._until:
            return None
        self._from_the_start()
        watch, done = StepWatch(self._subject.model, self._optimizer), []
        watch.disturb = lambda parameters: done.append(disturb(parameters))
        self._take(watch, 1)
        return watch if done and done[0] else None


def _blow_up(parameters: list[Tensor]) -> bool:
    """Multiplies the gradients as far as their precision allows."""
    gradients = _gradients(parameters)
    room = [torch.finfo(g.dtype).max * 1e-4 / max(float(g.abs().max()), 1e-30) for g in gradients]
    factor = min((BLOWN_UP, *room))
    for gradient in gradients:
        gradient.mul_(factor)
    return bool(gradients) and factor > 100


def _poison(parameters: list[Tensor]) -> bool:
    """Makes one entry of a gradient infinite."""
    dense = [gradient for gradient in _gradients(parameters) if not gradient.is_sparse]
    for gradient in dense[:1]:
        gradient[(0,) * gradient.dim()] = math.inf
    return bool(dense)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad.data for p in parameters if p.grad is not None and p.grad.numel()]


def _missing(model: nn.Module, optimizer: Optimizer) -> dict[str, tuple[Tensor, Tensor]]:
    """By name the parameters that the optimizer lacks, with their present values."""
    named = dict(model.named_parameters())
    names = missing_parameters(model, optimizer)
    return {name: (named[name], named[name].detach().clone()) for name in names}


def _globals_in(function: Any) -> list[str]:
    return sorted(names_in(function.__code__))


def _bind(names: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        names.pop(name, None)
    elif names.get(name, _MISSING) is not value:
        names[name] = value


def _is_second_backward(error: Exception | None) -> bool:
    """Whether torch refused to differentiate the same graph once more."""
    return isinstance(error, RuntimeError) and "second time" in str(error)


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0].split(". ")[0]
    again = " (a state kept from the batch before, see RG301)" if _is_second_backward(error) else ""
    return f"train_step raised {type(error).__name__}: {first.rstrip('.')}{again}."
