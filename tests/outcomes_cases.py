"""A tiny task for the outcomes benchmark, and cases of it as its policies are given them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

MODELS = ("rnn", "lstm", "gru", "lstm x2", "bilstm", "written")


def part(name: str) -> Any:
    """A module of the benchmark by its name; `benchmarks` lies beside the package."""
    root = str(Path(__file__).parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(f"benchmarks.outcomes.{name}")


def tiny() -> Any:
    """A task of the last step's sign, as small as it gets."""

    def draw(batch: int, steps: int, generator: torch.Generator) -> tuple[Any, Any]:
        x = torch.randn(batch, steps, 1, generator=generator)
        return x, (x[:, -1, 0] > 0).long()

    return part("tasks").Task(
        "tiny", draw, 6, 1, 2, "accuracy", 0.5, 0.9, 1, batch=8, hidden=8, rate=0.03, budget=60
    )


def case_of(task: Any, model: str = "lstm", seed: int = 0) -> Any:
    """What a policy is given: the untouched model, with the same weights for the same seed."""
    torch.manual_seed(seed)
    built = task.model(model)
    return part("policies").Case(
        task, model, built, task.optimizer_of(built), task.stream(seed), task.loss(), seed
    )
