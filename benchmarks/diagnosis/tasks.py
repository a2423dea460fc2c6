"""The clean tasks: what is learnt, by which setting, and when it counts as learnt.

Every task belongs to one of two halves. Thresholds are fitted on the training half alone;
figures are read off the held-out half alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.diagnosis import sequences
from benchmarks.diagnosis.models import SequenceModel, Setting
from benchmarks.diagnosis.sequences import IGNORED, Sample, Source

Metric = Literal["accuracy", "error", "nats"]
Batch = tuple[Any, Tensor]
HELD_OUT_SEED = 10**6


@dataclass(frozen=True)
class Task:
    """One clean task: higher scores are better; `chance` is what a constant answer scores.

    target: the score that counts as learnt. held_out: whether thresholds may not see it.
    """

    name: str
    source: Source | None
    steps: int
    setting: Setting
    chance: float
    target: float
    metric: Metric
    held_out: bool = False
    batch: int = 32

    def declared_memory(self, setting: Setting) -> int:
        """What a user who knows the task would declare; a far target moves with the length."""
        far = setting.memory > self.steps / 2
        return round(setting.memory * setting.length) if far else setting.memory

    def loss(self) -> nn.Module:
        return nn.MSELoss() if self.metric == "error" else ClassLoss()

    def batches(self, setting: Setting, seed: int) -> list[Batch]:
        """The training batches, the same for the same seed whatever the mutation."""
        return [_batch(s, setting) for s in self._samples(setting, self.batch, 1000 + seed)]

    def score(self, model: SequenceModel, setting: Setting) -> float:
        """The held-out score; NaN outputs score as chance."""
        samples = self._samples(setting, 360, HELD_OUT_SEED, count=1 if self.source else 4)
        model.state = None
        found = [self._scored(model, *_batch(s, setting)) for s in samples]
        value = sum(found) / len(found)
        return value if value == value else self.chance

    @torch.no_grad()
    def _scored(self, model: SequenceModel, inputs: Any, target: Tensor) -> float:
        out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        if not torch.isfinite(out).all():
            return float("nan")
        if self.metric == "accuracy":
            asked = target != IGNORED
            return float((out.argmax(-1) == target)[asked].double().mean())
        return -float(self.loss()(out, target))

    def _samples(
        self, setting: Setting, batch: int, seed: int, count: int | None = None
    ) -> list[Sample]:
        count = setting.steps if count is None else count
        steps = round(self.steps * setting.length)
        if self.source is None:
            return sequences.streams(batch if batch < 64 else 64, steps, count, seed)
        generator = torch.Generator().manual_seed(seed)
        return [self.source(batch, steps, generator) for _ in range(count)]


class ClassLoss(nn.Module):
    """Cross-entropy of (B, C) or (B, T, C) logits; steps without a target are left out."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = nn.functional.cross_entropy(
            logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED
        )
        return loss


def _batch(sample: Sample, setting: Setting) -> Batch:
    x, lengths, target = sample
    if x.is_floating_point():
        x = x * setting.input_scale
    return (x if lengths is None else (x, lengths)), target


def _task(
    name: str, source: Source | None, steps: int, chance: float, target: float,
    metric: Metric, setting: Setting, *, held_out: bool = False, batch: int = 32,
) -> Task:  # fmt: skip
    return Task(name, source, steps, setting, chance, target, metric, held_out, batch)


def all_tasks() -> tuple[Task, ...]:
    """Every clean task; names are for ever, since the results cite them."""
    return (*_remembering(), *_near_sighted(), *_stepwise())


def _remembering() -> tuple[Task, ...]:
    """Tasks whose target lies many steps back."""
    s, q = Setting, sequences
    return (
        _task("recall-60 lstm", q.recall, 60, 0.25, 0.9, "accuracy",
              s("lstm", 5, 4, 60, start="chrono", steps=450)),
        _task("recall-12 gru", q.recall, 12, 0.25, 0.9, "accuracy",
              s("gru", 5, 4, 12, steps=300), held_out=True),
        _task("recall-30 tanh", q.recall, 30, 0.25, 0.9, "accuracy",
              s("tanh", 5, 4, 30, start="orthogonal", rate=2e-3, steps=400)),
        _task("recall-40 packed lstm", q.recall_of_lengths, 40, 0.25, 0.9, "accuracy",
              s("lstm", 5, 4, 40, start="chrono", packed=True, steps=350), held_out=True, batch=16),
        _task("adding-24 lstm", q.adding, 24, -0.167, -0.02, "error",
              s("lstm", 2, 1, 24, start="chrono", rate=1e-2, steps=600)),
        _task("adding-20 relu", q.adding, 20, -0.167, -0.02, "error",
              s("relu", 2, 1, 20, start="identity", rate=2e-3, steps=600), held_out=True),
        _task("copying-16 gru", q.copying, 16, 0.25, 0.9, "accuracy",
              s("gru", 5, 4, 14, start="chrono", readout="every", rate=1e-2, steps=450)),
        _task("ordering-30 lstm", q.ordering, 30, 0.25, 0.9, "accuracy",
              s("lstm", 6, 4, 27, start="chrono", rate=1e-2, steps=500), held_out=True),
        _task("digits tanh", q.digit_pixels, 64, 0.1, 0.75, "accuracy",
              s("tanh", 1, 10, 64, hidden=48, start="orthogonal", rate=2e-3, steps=450,
                resizable=False)),
        _task("recall-40 attention gru", q.recall, 40, 0.25, 0.9, "accuracy",
              s("gru", 5, 4, 40, readout="attention", steps=300), held_out=True, batch=16),
    )  # fmt: skip


def _near_sighted() -> tuple[Task, ...]:
    """Hard to look at, yet fine: what is asked for lies in the last few steps."""
    s, q = Setting, sequences
    return (
        _task("recent-200 lstm", q.recent, 200, 0.5, 0.9, "accuracy",
              s("lstm", 1, 2, 3, hidden=24, rate=1e-2), held_out=True, batch=16),
        _task("silent-60 lstm", q.silent, 60, 0.25, 0.9, "accuracy",
              s("lstm", 4, 4, 8, rate=1e-2)),
        _task("padded-40 gru", q.recent_of_lengths, 40, 0.5, 0.9, "accuracy",
              s("gru", 1, 2, 3, hidden=24, rate=1e-2), batch=16),
        _task("chaotic-40 tanh", q.recent, 40, 0.5, 0.9, "accuracy",
              s("tanh", 1, 2, 3, start="gaussian"), held_out=True),
        _task("spiky-12 tanh sgd", q.spiky, 12, 0.25, 0.9, "accuracy",
              s("tanh", 5, 4, 3, optimizer="sgd", rate=0.1, steps=500)),
        _task("digit rows relu sgd", q.digit_rows, 8, 0.1, 0.8, "accuracy",
              s("relu", 8, 10, 8, optimizer="sgd", rate=0.1, steps=1000, resizable=False),
              held_out=True),
    )  # fmt: skip


def _stepwise() -> tuple[Task, ...]:
    """Tasks with a target at every step."""
    s, q = Setting, sequences
    alphabet = sequences.text()[1]
    return (
        _task("echo-5 tanh", q.echo, 40, -0.333, -0.05, "error",
              s("tanh", 1, 1, 6, readout="every", start="orthogonal", steps=400)),
        _task("waves gru sgd", q.waves, 40, -0.5, -0.05, "error",
              s("gru", 1, 1, 3, readout="every", optimizer="sgd", rate=0.3, steps=350),
              held_out=True, batch=16),
        _task("characters lstm", None, 32, -3.3, -2.35, "nats",
              s("lstm", alphabet, alphabet, 8, hidden=64, readout="every", embedded=True,
                stateful=True, rate=5e-3, steps=250)),
        _task("tagging bilstm", q.tagging, 24, 0.5, 0.9, "accuracy",
              s("lstm", 12, 2, 2, hidden=16, readout="every", embedded=True,
                bidirectional=True, rate=1e-2), held_out=True, batch=16),
        _task("digit rows deep lstm", q.digit_rows, 8, 0.1, 0.8, "accuracy",
              s("lstm", 8, 10, 8, layers=2, rate=5e-3, steps=400, resizable=False)),
    )  # fmt: skip
