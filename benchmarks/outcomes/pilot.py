"""Trainings with good settings, by which budgets and targets were set: no policy, no account.

python -m benchmarks.outcomes.pilot --tasks recall --models lstm --steps 1000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.outcomes.accounting import step
from benchmarks.outcomes.lineup import chosen
from benchmarks.outcomes.models import MODELS
from benchmarks.outcomes.starts import BLOCKS, chrono_, recurrence
from benchmarks.outcomes.tasks import Task, all_tasks

SETTINGS: dict[str, tuple[bool, float]] = {
    "as it is": (False, 1.0),
    "as it is x3": (False, 3.0),
    "as it is x10": (False, 10.0),
    "good start": (True, 1.0),
    "good start x3": (True, 3.0),
    "good start x10": (True, 10.0),
}


def good_start_(model: nn.Module, task: Task) -> None:
    """Chrono biases for the steps that the task needs, or orthogonal matrices without gates."""
    if not chrono_(model, task.memory):
        for name, weight in recurrence(model).named_parameters():
            if "weight_hh" in name:
                for block in weight.chunk(BLOCKS[nn.RNN]):
                    nn.init.orthogonal_(block)


def curve(task: Task, model_name: str, setting: str, steps: int, seed: int = 0) -> list[float]:
    """The held-out score every 50 steps, with clip 1; ends 10 % above the target."""
    start, factor = SETTINGS[setting]
    torch.manual_seed(seed)
    model = task.model(model_name)
    if start:
        good_start_(model, task)
    optimizer, loss, stream = task.optimizer_of(model), task.loss(), task.stream(seed)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    clip: Callable[[], object] = lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # noqa: E731
    scores = []
    for index in range(steps):
        step(model, optimizer, loss, stream[index], clip)
        if (index + 1) % 50 == 0:
            scores.append(task.score(model))
            if task.learnt(scores[-1], model_name) >= 1.1:
                break
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--models", default="")
    parser.add_argument("--settings", default="")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in all_tasks():
        if task.name not in chosen(options.tasks, [task.name for task in all_tasks()]):
            continue
        for model in chosen(options.models, MODELS):
            for setting in chosen(options.settings, SETTINGS):
                started = time.process_time()
                scores = curve(task, model, setting, options.steps)
                each = 1000 * (time.process_time() - started) / (50 * len(scores))
                shown = " ".join(f"{score:.3g}" for score in scores)
                print(f"{task.name} | {model} | {setting} | {each:.1f} ms | {shown}", flush=True)


if __name__ == "__main__":
    main()
