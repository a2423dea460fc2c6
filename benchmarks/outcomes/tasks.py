"""The tasks: what is learnt, how a user would train it, and when it counts as learnt.

Rates and optimizers are what a user would write down first. Budgets and targets were set from
trainings with good settings (see `pilot.py`), never from what rnnguard makes of a task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks.diagnosis import sequences
from benchmarks.diagnosis.sequences import IGNORED
from benchmarks.diagnosis.tasks import ClassLoss
from benchmarks.outcomes import streams
from benchmarks.outcomes.models import Readout, built
from benchmarks.outcomes.streams import Draw, Stream, held_out

Metric = Literal["accuracy", "error", "nats"]
# Of one training step of the untouched model: what it costs anyway, and per step of its sequences,
# at 16 sequences and 24 units on one thread.
STEP_MS = {
    "rnn": (0.2, 0.036),
    "lstm": (0.15, 0.017),
    "gru": (0.3, 0.099),
    "lstm x2": (0.3, 0.032),
    "bilstm": (0.3, 0.030),
    "written": (0.3, 0.090),
}
# Where a step takes ten times as long as that of an LSTM, three seconds are too few for anybody.
SLOW, SLOWED = ("gru", "written"), 100
MOST_STEPS = 3000
OPTIMIZERS: dict[str, tuple[type[Any], dict[str, float]]] = {
    "adam": (Adam, {}),
    "adamw": (AdamW, {}),
    "sgd": (SGD, {"momentum": 0.9}),
}


@dataclass(frozen=True)
class Task:
    """One task: higher scores are better; `chance` is what a constant answer scores.

    steps: length of the sequences. seconds: what a run may take, in which `budget` steps of the
    untouched model fit, by `STEP_MS`. memory: how far back the answer lies. target_of_both: what
    a model must reach that reads from both ends, where that differs. control: learnt well by the
    untouched model.
    ahead: how many steps ahead the input lies that every step is asked for.
    """

    name: str
    draw: Draw
    steps: int
    inputs: int
    outputs: int
    metric: Metric
    chance: float
    target: float
    memory: int
    readout: Readout = "last"
    tokens: bool = False
    batch: int = 16
    hidden: int = 24
    optimizer: str = "adam"
    rate: float = 1e-3
    target_of_both: float | None = None
    control: bool = False
    seconds: float = 3.0
    budget: int = 0
    ahead: int = 0

    def for_model(self, name: str) -> Task:
        """The task with the budget of that model: as many of its steps as fit into the seconds.

        A budget that stands already is kept.
        """
        if self.budget:
            return self
        fixed, each = STEP_MS[name]
        seconds = 1.8 * self.seconds if name in SLOW and self.steps >= SLOWED else self.seconds
        steps = round(1000 * seconds / (fixed + each * self.steps), -1)
        return replace(self, budget=min(MOST_STEPS, int(steps)))

    def model(self, name: str) -> nn.Module:
        """An untouched model, drawn from torch's global generator."""
        return built(
            name, inputs=self.inputs, outputs=self.outputs, hidden=self.hidden,
            readout=self.readout, tokens=self.tokens, ahead=self.ahead,
        )  # fmt: skip

    def optimizer_of(self, model: nn.Module) -> Optimizer:
        """The user's own optimizer."""
        kind, options = OPTIMIZERS[self.optimizer]
        optimizer: Optimizer = kind(model.parameters(), lr=self.rate, **options)
        return optimizer

    def loss(self) -> nn.Module:
        if self.metric == "error":
            return nn.MSELoss()
        return nn.CrossEntropyLoss() if self.readout == "last" else ClassLoss()

    def stream(self, seed: int) -> Stream:
        """The training batches, the same for the same seed whatever the policy."""
        return Stream(self.draw, self.batch, self.steps, seed, self.budget)

    def target_for(self, model: str) -> float:
        """The score at which this model counts as done."""
        both = self.target_of_both
        return both if both is not None and model == "bilstm" else self.target

    def learnt(self, score: float, model: str) -> float:
        """0 at chance and 1 at the target, within -0.5..1.2."""
        share = (score - self.chance) / (self.target_for(model) - self.chance)
        return min(max(share, -0.5), 1.2)

    @property
    def held_out(self) -> int:
        """Sequences that a score is taken on; fewer where every step has a target."""
        return 250 if self.readout == "last" else 100

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """The held-out score; outputs that are not finite score as chance."""
        x, y = held_out(self.draw, self.held_out, self.steps)
        training = model.training
        model.eval()
        out = model(x)
        model.train(training)
        if not torch.isfinite(out).all():
            return self.chance
        return self._scored(out, y)

    def _scored(self, out: Tensor, target: Tensor) -> float:
        if self.metric == "accuracy":
            asked = target != IGNORED
            return float((out.argmax(-1) == target)[asked].double().mean())
        return -float(self.loss()(out, target))


@cache
def all_tasks() -> tuple[Task, ...]:
    """Every task; names are for ever, since the results cite them."""
    recall, adding = (streams.without_lengths(s) for s in (sequences.recall, sequences.adding))
    ordering, recent, pixels, rows = (
        streams.without_lengths(source)
        for source in (sequences.ordering, sequences.recent, sequences.digit_pixels,
                       sequences.digit_rows)
    )  # fmt: skip
    alphabet = sequences.text()[1]
    return (
        Task("recall-50", recall, 50, 5, 4, "accuracy", 0.25, 0.9, 50),
        Task("recall-100", recall, 100, 5, 4, "accuracy", 0.25, 0.9, 100),
        Task("recall-200", recall, 200, 5, 4, "accuracy", 0.25, 0.9, 200),
        Task("adding-100", adding, 100, 2, 1, "error", -0.167, -0.04, 100),
        Task("adding-200", adding, 200, 2, 1, "error", -0.167, -0.04, 200),
        Task("copying", streams.copying, 40, 5, 4, "accuracy", 0.25, 0.45, 35, "every"),
        Task("ordering", ordering, 60, 6, 4, "accuracy", 0.25, 0.9, 54),
        Task("digits-64", pixels, 64, 1, 10, "accuracy", 0.1, 0.6, 64,
             optimizer="sgd", rate=0.05),
        Task("permuted-digits-64", streams.permuted_digits, 64, 1, 10, "accuracy", 0.1, 0.6, 64),
        Task("characters", streams.characters, 50, alphabet, alphabet, "nats", -3.2, -2.4, 10,
             "every", tokens=True, optimizer="adamw", ahead=1,
             target_of_both=-2.1),
        Task("forecast", streams.forecast, 50, 1, 1, "error", -1.0, -0.09, 20, "every",
             ahead=streams.LEAD, target_of_both=-0.02),
        Task("tagging", streams.tagging, 40, streams.TAGS, 2, "accuracy", 0.54, 0.7, 12,
             "every", tokens=True, target_of_both=0.85),
        Task("recent-100", recent, 100, 1, 2, "accuracy", 0.5, 0.92, 3, rate=1e-2,
             control=True),
        Task("digit-rows", rows, 8, 8, 10, "accuracy", 0.1, 0.85, 8, rate=5e-3,
             control=True),
    )  # fmt: skip


def task_named(name: str) -> Task:
    """The task of that name."""
    return next(task for task in all_tasks() if task.name == name)
