"""What a policy is: a function from what a user has to what is then trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.outcomes.streams import Stream
from benchmarks.outcomes.tasks import Task


@dataclass(frozen=True)
class Case:
    """What a policy is given.

    name: of the model. data: the training batches, which the training will start with, too.
    """

    task: Task
    name: str
    model: nn.Module
    optimizer: Optimizer
    data: Stream
    loss: nn.Module
    seed: int


Watch = Callable[[int, Tensor, Tensor, Tensor], "Prepared | None"]


@dataclass(frozen=True)
class Prepared:
    """What is trained, and how.

    before_update: called between backward pass and update. watch: called after every step with
    the number of steps taken, loss, output and target; what it gives is trained from there on in
    the place of this, from its first step. done: what the policy did, for the results.
    """

    model: nn.Module
    optimizer: Optimizer
    done: str = ""
    before_update: Callable[[], Any] | None = None
    watch: Watch | None = None
    rate: str = ""
    words: str = ""


Policy = Callable[[Case], Prepared]


def clipped(case: Case, norm: float = 1.0, done: str = "") -> Prepared:
    """The case with the gradients' total norm clipped at every step."""
    clip = f"clip {norm:g}"
    return Prepared(
        case.model,
        case.optimizer,
        f"{done}, {clip}" if done else clip,
        lambda: nn.utils.clip_grad_norm_(case.model.parameters(), norm),
    )


def nothing(case: Case) -> Prepared:
    """The user's own training."""
    return Prepared(case.model, case.optimizer)


def with_rate(prepared: Prepared) -> Prepared:
    """The same with the optimizer's rate noted, where the policy has not said more of it."""
    rates = ", ".join(f"{group['lr']:.3g}" for group in prepared.optimizer.param_groups)
    return prepared if prepared.rate else replace(prepared, rate=rates)
