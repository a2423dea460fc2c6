"""One training run and its outcome; nothing here knows of rnnguard's verdicts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.diagnosis.models import SequenceModel, Setting
from benchmarks.diagnosis.mutations import mutants
from benchmarks.diagnosis.tasks import Batch, Task, all_tasks

LAGS = (1, 5, 10, 20, 50, 100)


@dataclass(frozen=True, order=True)
class Run:
    """A run by name: what both result files are keyed by."""

    seed: int
    task: str
    mutation: str


@dataclass(frozen=True)
class Outcome:
    """What training reached. learnt: score from 0 at chance to 1 at the target, within -0.5..1.2.

    stopped: why training ended early, empty when it did not. lag_k: log10 of the rms gradient
    of one random read-out of the last step with respect to the recurrence's input k steps
    before, over the same at lag 0, at initialisation; empty beyond the sequence.
    """

    task: str
    mutation: str
    seed: int
    score: float
    chance: float
    target: float
    learnt: float
    converged: bool
    first_loss: float
    last_loss: float
    nonfinite_steps: int
    steps: int
    stopped: str
    lags: tuple[float, ...]
    seconds: float
    torch: str

    def row(self) -> dict[str, str]:
        cells = asdict(self)
        found = cells.pop("lags")
        shown = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in cells.items()}
        padded = [*(f"{value:.3f}" for value in found), *[""] * (len(LAGS) - len(found))]
        return shown | dict(zip((f"lag_{lag}" for lag in LAGS), padded, strict=True))


@dataclass(frozen=True)
class Stage:
    """Everything a run starts from, built from its name alone."""

    task: Task
    setting: Setting
    model: SequenceModel
    optimizer: Optimizer
    batches: list[Batch]
    loss: nn.Module


def all_runs(tasks: str = "", seeds: int = 5) -> Iterator[Run]:
    """Every run of the tasks whose names hold the word, seed by seed."""
    for seed in range(seeds):
        for task in all_tasks():
            if tasks in task.name:
                yield from (Run(seed, task.name, name) for name in mutants(task.setting))


def staged(run: Run) -> Stage:
    """Task, mutant, batches and model of a run; the clean twin has the same seeds."""
    task = next(task for task in all_tasks() if task.name == run.task)
    setting = mutants(task.setting)[run.mutation]
    batches = task.batches(setting, run.seed)
    torch.manual_seed(run.seed)
    model = SequenceModel(setting)
    kind: type[Any] = Adam if setting.optimizer == "adam" else SGD
    optimizer = kind(model.parameters(), lr=setting.rate)
    clip_(optimizer, model, setting.clip)
    return Stage(task, setting, model, optimizer, batches, task.loss())


def clip_(optimizer: Optimizer, model: nn.Module, norm: float | None) -> None:
    """Clips the gradients' total norm at every step, by a hook on the optimizer."""
    if norm is None:
        return

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)

    # A clip in the loop would be out of sight for whoever is given model and optimizer alone.
    optimizer.register_step_pre_hook(clip)


def loss_of(stage: Stage, batch: Batch) -> Tensor:
    """The loss on one batch, with its graph."""
    inputs, target = batch
    out = stage.model(*inputs) if isinstance(inputs, tuple) else stage.model(inputs)
    value: Tensor = stage.loss(out, target)
    return value


def steps_of(stage: Stage) -> Iterator[tuple[Batch, float]]:
    """Trains step by step; yields batch and loss between the backward pass and the update.

    The gradients that are seen there are unclipped.
    """
    for batch in stage.batches:
        stage.optimizer.zero_grad()
        loss = loss_of(stage, batch)
        torch.autograd.backward(loss)
        yield batch, float(loss.detach())
        stage.optimizer.step()


def trained(run: Run) -> Outcome:
    """Trains one run to its end, or to the error or twenty non-finite losses that end it."""
    started = time.perf_counter()
    stage = staged(run)
    lags = lag_profile(stage)
    losses: list[float] = []
    stopped = ""
    try:
        for _, loss in steps_of(stage):
            losses.append(loss)
            if len(losses) >= 20 and not any(map(math.isfinite, losses[-20:])):
                stopped = "twenty losses in a row were not finite"
                break
    except RuntimeError as error:
        stopped = str(error).split(".")[0][:80]
    task = stage.task
    score = task.chance if stopped else task.score(stage.model, stage.setting)
    learnt = (score - task.chance) / (task.target - task.chance)
    finite = [loss for loss in losses if math.isfinite(loss)] or [math.nan]
    tenth = max(1, len(finite) // 10)
    return Outcome(
        run.task, run.mutation, run.seed, score, task.chance, task.target,
        min(max(learnt, -0.5), 1.2), score >= task.target,
        fmean(finite[:tenth]), fmean(finite[-tenth:]),
        len(losses) - sum(map(math.isfinite, losses)), len(losses), stopped, lags,
        time.perf_counter() - started, torch.__version__.partition("+")[0],
    )  # fmt: skip


def lag_profile(stage: Stage) -> tuple[float, ...]:
    """log10 of the gradient by lag at initialisation; see `Outcome`."""
    model, (inputs, _) = stage.model, stage.batches[0]
    x, lengths = inputs if isinstance(inputs, tuple) else (inputs, None)
    embedded = model.embedding(x if stage.setting.embedded else x.to(model.head.weight.dtype))
    embedded = embedded.detach().requires_grad_()
    if stage.setting.packed:
        lengths = torch.full_like(lengths, x.shape[1])
    last = model.outputs(embedded, lengths)[:, -1, : stage.setting.hidden].float()
    model.state = None
    vector = torch.randn(last.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((last * vector).sum(), embedded)
    norms = gradient.double().pow(2).mean((0, 2)).sqrt().flip(0).clamp_min(1e-300)
    found = [lag for lag in LAGS if lag < len(norms)]
    return tuple(float((norms[lag] / norms[0]).log10()) for lag in found)
