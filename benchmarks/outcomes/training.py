"""One run: an untouched model, a policy, and training until the target or the budget's end."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

import rnnguard
from benchmarks.ledger import Row
from benchmarks.outcomes import guarded
from benchmarks.outcomes.accounting import MEASURED, Account, Clock, Yardstick, step
from benchmarks.outcomes.clippers import total_norm
from benchmarks.outcomes.lineup import DECLARED, POLICIES
from benchmarks.outcomes.policies import Case, Policy, Prepared, with_rate
from benchmarks.outcomes.tasks import Task, task_named

SCORED_EVERY = 20
LOST = 20
"""Losses in a row that are not finite, after which nothing is to be hoped for."""
SPIKE, MEMORY = 10.0, 200


@dataclass(frozen=True, order=True)
class Run:
    """A run by name: what the result file is keyed by."""

    seed: int
    task: str
    model: str
    policy: str


@dataclass
class Result:
    """What a training reached; `steps` are those of the last one, where others were given up.

    score: of the best of them, since that would be kept.
    """

    score: float
    best: float = -math.inf
    solved: bool = False
    steps: int = 0
    spikes: int = 0
    stopped: str = ""
    prepared: Prepared | None = None
    norms: list[float] = field(default_factory=list)

    def note_norm(self, norm: float) -> None:
        """Counts a gradient far above the latest ones, or one that is not finite."""
        known = sorted(self.norms[-MEMORY:])
        middle = known[len(known) // 2] if known else math.inf
        self.spikes += not math.isfinite(norm) or norm > SPIKE * middle
        self.norms.append(norm if math.isfinite(norm) else middle)


def worked(run: Run) -> Row:
    """The outcome of one run as a row; whatever a policy or a training raises stands in it."""
    if run.policy.startswith("rnnguard"):
        guarded.warm_up()
    started = time.process_time()
    task = task_named(run.task).for_model(run.model)
    policy = (POLICIES | DECLARED)[run.policy]
    stream = task.stream(run.seed)
    torch.manual_seed(run.seed)
    yardstick = Yardstick(task, task.model(run.model), stream)
    torch.manual_seed(run.seed)
    model = task.model(run.model)
    case = Case(task, run.model, model, task.optimizer_of(model), stream, task.loss(), run.seed)
    account, error = Account(task.budget), ""
    result = Result(task.score(model))
    try:
        train(policy, case, account, yardstick, result)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}".split("\n")[0][:200]
    seconds = time.process_time() - started
    return _row(run, task, account, result, yardstick.unit, error, seconds)


def train(
    policy: Policy, case: Case, account: Account, yardstick: Yardstick, result: Result,
    clock: Clock = time.process_time,
) -> None:  # fmt: skip
    """Has the policy prepare the case, then trains; fills in the result.

    Scores are taken on the held-out set every 20 steps, outside the account.
    """
    started = clock()
    try:
        result.prepared = prepared = with_rate(policy(case))
    finally:
        seconds = clock() - started
        yardstick.measure(MEASURED // 2)
        account.charge_setup(seconds, yardstick.unit)
    losses: list[float] = []
    while account.left:
        loss, seconds, other = _timed_step(prepared, case, result, clock)
        account.charge_step(seconds, yardstick.unit)
        losses.append(loss)
        if other is not None:
            account.abandon_training()
            result.best = max(result.best, case.task.score(prepared.model))
            result.prepared = prepared = with_rate(other)
            result.steps, result.norms, losses = 0, [], []
            continue
        if result.steps % SCORED_EVERY == 0:
            if _reached(case, prepared.model, result):
                return
            yardstick.measure()
        if len(losses) >= LOST and not any(map(math.isfinite, losses[-LOST:])):
            result.stopped = f"{LOST} losses in a row were not finite"
            break
    _reached(case, prepared.model, result)


def _timed_step(
    prepared: Prepared, case: Case, result: Result, clock: Clock
) -> tuple[float, float, Prepared | None]:
    batch = case.data[result.steps]
    watched = 0.0

    def before_update() -> None:
        nonlocal watched
        # The benchmark's own look at the gradient is not the policy's to pay.
        looked = clock()
        result.note_norm(total_norm(prepared.model.parameters()))
        watched = clock() - looked
        if prepared.before_update is not None:
            prepared.before_update()

    started = clock()
    loss, output = step(prepared.model, prepared.optimizer, case.loss, batch, before_update)
    result.steps += 1
    other = prepared.watch and prepared.watch(result.steps, loss, output, batch[1])
    seconds = clock() - started - watched
    return float(loss), seconds, other


def _reached(case: Case, model: nn.Module, result: Result) -> bool:
    result.score = max(case.task.score(model), result.best)
    result.solved = result.score >= case.task.target_for(case.name)
    return result.solved


def _row(
    run: Run, task: Task, account: Account, result: Result, unit: float, error: str,
    seconds: float,
) -> Row:  # fmt: skip
    prepared = result.prepared or Prepared(nn.Identity(), _NO_OPTIMIZER)
    cost = min(account.spent, task.budget) if result.solved else task.budget
    figures: dict[str, float] = {
        "score": result.score,
        "learnt": task.learnt(result.score, run.model),
        "steps_to_target": result.steps if result.solved else task.budget,
        "cost_to_target": cost,
        "setup_cost": account.setup,
        "step_ratio": account.step_ratio,
        "unit_ms": 1000 * unit,
    }
    return {
        "seed": str(run.seed), "task": run.task, "model": run.model, "policy": run.policy,
        "solved": str(result.solved),
        **{name: f"{value:.5g}" for name, value in figures.items()},
        "budget": str(task.budget), "steps": str(result.steps), "spikes": str(result.spikes),
        "done": prepared.done, "rate": prepared.rate, "words": prepared.words,
        "stopped": result.stopped, "error": error, "seconds": f"{seconds:.2f}",
        "torch": torch.__version__.partition("+")[0], "rnnguard": rnnguard.__version__,
        "python": platform.python_version(), "machine": f"{platform.machine()} CPU, 1 thread",
    }  # fmt: skip


_NO_OPTIMIZER = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)


def all_runs(
    tasks: Iterable[str], models: Iterable[str], policies: Iterable[str], seeds: int
) -> Iterator[Run]:
    """Every run of these names, seed by seed."""
    tasks, models, policies = list(tasks), list(models), list(policies)
    for seed in range(seeds):
        for task in tasks:
            for model in models:
                yield from (Run(seed, task, model, policy) for policy in policies)
