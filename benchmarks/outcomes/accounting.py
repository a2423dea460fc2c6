"""What a run has spent of its budget, counted in training steps of the untouched model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.outcomes.streams import Pair, Stream
from benchmarks.outcomes.tasks import Task

Clock = Callable[[], float]
"""CPU seconds of this process; a run has one thread, so that others' load counts little."""

WARM_UP, MEASURED = 3, 12
WINDOW = 25


class Yardstick:
    """An untouched model of the same kind, trained beside the other one: what a step costs now.

    The same step costs a third more or less within minutes where cores are shared, so that one
    measurement at the start would make budgets of different length.
    """

    def __init__(
        self, task: Task, model: nn.Module, stream: Stream, clock: Clock = time.process_time
    ) -> None:
        self._model, self._optimizer = model, task.optimizer_of(model)
        self._loss, self._stream, self._clock = task.loss(), stream, clock
        self._taken = 0
        self._latest: deque[float] = deque(maxlen=MEASURED)
        self.measure(MEASURED, WARM_UP)

    @property
    def unit(self) -> float:
        """Median CPU seconds of the latest untouched steps."""
        return median(self._latest)

    def measure(self, steps: int = 1, warm_up: int = 1) -> None:
        """Takes untouched steps, which nobody pays for; the first ones find a cold cache."""
        for index in range(warm_up + steps):
            batch = self._stream[self._taken]
            started = self._clock()
            step(self._model, self._optimizer, self._loss, batch)
            if index >= warm_up:
                self._latest.append(self._clock() - started)
            self._taken += 1


@dataclass
class Account:
    """A budget of so many untouched steps, and what went of it, in untouched steps.

    A step costs the median of the latest ones, so that a hiccup of the machine does not count.
    """

    budget: int
    setup: float = 0.0
    training: float = 0.0
    _latest: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _ratios: list[float] = field(default_factory=list)

    @property
    def spent(self) -> float:
        """Everything so far."""
        return self.setup + self.training

    @property
    def left(self) -> bool:
        """Whether anything is left of the budget."""
        return self.spent < self.budget

    @property
    def step_ratio(self) -> float:
        """The median cost of a training step; NaN before the first one."""
        return median(self._ratios) if self._ratios else float("nan")

    def charge_setup(self, seconds: float, unit: float) -> None:
        """Charges what a policy does before the training."""
        self.setup += seconds / unit

    def charge_step(self, seconds: float, unit: float) -> None:
        """Charges one training step, while an untouched one takes `unit` seconds."""
        self._latest.append(seconds)
        self._ratios.append(median(self._latest) / unit)
        self.training += self._ratios[-1]

    def abandon_training(self) -> None:
        """Counts all training so far as set-up: it did not lead to the model that is kept."""
        self.setup, self.training = self.spent, 0.0
        self._latest.clear()
        self._ratios.clear()


def step(
    model: nn.Module,
    optimizer: Optimizer,
    loss: nn.Module,
    batch: Pair,
    before_update: Callable[[], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """One training step as people write it; gives loss and output."""
    optimizer.zero_grad()
    output = model(batch[0])
    value: Tensor = loss(output, batch[1])
    value.backward()  # type: ignore[no-untyped-call]
    if before_update is not None:
        before_update()
    optimizer.step()
    return value.detach(), output.detach()
