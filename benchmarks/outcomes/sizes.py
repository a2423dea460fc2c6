"""What the whole benchmark will take, from a few steps of every task and model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.outcomes.accounting import Yardstick
from benchmarks.outcomes.tasks import Task, task_named
from benchmarks.outcomes.training import SCORED_EVERY

USED = 0.8
"""Of the budgets, since runs end at their targets; from a trial of all policies."""
SETUP_STEPS = 15 + 6


def plan(tasks: Sequence[str], models: Sequence[str], policies: int, seeds: int) -> float:
    """Prints the milliseconds of a step and the estimated time; gives it in core-seconds."""
    torch.set_num_threads(1)
    total = 0.0
    print("milliseconds of an untouched step:", *models, sep="  ")
    for name in tasks:
        task = task_named(name)
        found = [run_seconds(task, model) for model in models]
        each = sum(seconds for _, seconds in found)
        total += each * policies * seeds
        units = "  ".join(f"{1000 * unit:.1f}" for unit, _ in found)
        print(f"{name}: {units}  budget {task.budget}, {each * policies * seeds:.0f} s")
    runs = len(tasks) * len(models) * policies * seeds
    print(f"{runs} runs, about {total:.0f} core-seconds: {total / 7200:.1f} hours on two cores")
    return total


def run_seconds(task: Task, model: str) -> tuple[float, float]:
    """CPU seconds of a step, and of a whole run with its scores and untouched steps."""
    task = task.for_model(model)
    torch.manual_seed(0)
    untouched = task.model(model)
    unit = Yardstick(task, untouched, task.stream(0)).unit
    task.score(untouched)
    started = time.process_time()
    task.score(untouched)
    scored = time.process_time() - started
    # Beside every score, two untouched steps are taken.
    rounds = USED * task.budget / SCORED_EVERY
    return unit, unit * SETUP_STEPS + rounds * (scored + (SCORED_EVERY + 2) * unit)
