"""Trains every task with every model after every policy; goes on where it was stopped.

python -m benchmarks.outcomes [--stage plan|train|score] [--workers 2] [--minutes 120]
    [--tasks recall,adding] [--models lstm,gru] [--policies nothing,clip] [--seeds 5]
    [--shard 1/4] [--smoke] [--declared] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ledger import continue_
from benchmarks.outcomes.lineup import DECLARED, POLICIES, chosen
from benchmarks.outcomes.models import MODELS
from benchmarks.outcomes.results import report
from benchmarks.outcomes.sizes import plan
from benchmarks.outcomes.tasks import all_tasks
from benchmarks.outcomes.training import Run, all_runs, worked

RESULTS = Path(__file__).parents[1] / "results" / "outcomes"
DOCS = Path(__file__).parents[2] / "docs"
SMOKE_TASKS = ("recall-50", "permuted-digits-64", "digit-rows")
SMOKE_MODELS = ("rnn", "lstm", "written")
KEY = ("seed", "task", "model", "policy")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    # Costs are CPU seconds of one thread; worker processes read this before they load NumPy.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tasks = chosen(options.tasks, [task.name for task in all_tasks()])
    models = chosen(options.models, MODELS)
    policies = chosen(options.policies, [*POLICIES, *(DECLARED if options.declared else ())])
    if options.smoke:
        tasks, models, options.seeds = list(SMOKE_TASKS), list(SMOKE_MODELS), 1
    for stage in options.stage or ("train", "score"):
        if stage == "plan":
            plan(tasks, models, len(policies), options.seeds)
        elif stage == "score":
            whole = options.results == RESULTS
            report(options.results, DOCS if whole else options.results)
        else:
            runs = shard(list(all_runs(tasks, models, policies, options.seeds)), options.shard)
            deadline = time.monotonic() + 60 * options.minutes
            left = continue_(
                options.results / "runs.csv", runs, worked,
                key=KEY, workers=options.workers, deadline=deadline,
            )  # fmt: skip
            print(f"train: {left} runs to go")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.outcomes")
    add = parser.add_argument
    add("--stage", choices=("plan", "train", "score"), action="append",
        help="default: train, then score")  # fmt: skip
    add("--workers", type=int, default=2)
    add("--minutes", type=float, default=120)
    add("--seeds", type=int, default=5)
    add("--tasks", default="", help="names, or parts of them, with commas between")
    add("--models", default="", help="names with commas between")
    add("--policies", default="", help="names with commas between")
    add("--shard", default="1/1", help="of the cells, for several machines")
    add("--smoke", action="store_true", help="a few minutes: nine cells, one seed, all policies")
    add("--declared", action="store_true", help="rnnguard with `memory=` declared, too")
    add("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.smoke and options.results == RESULTS:
        options.results = Path(tempfile.mkdtemp(prefix="outcomes-")) / "outcomes"
        print(f"results go to {options.results}")
    return options


def shard(runs: Sequence[Run], part: str) -> list[Run]:
    """Every n-th cell with all its policies, which are compared with each other."""
    index, count = map(int, part.split("/"))
    cells = list(dict.fromkeys((run.seed, run.task, run.model) for run in runs))
    kept = set(cells[index - 1 :: count])
    return [run for run in runs if (run.seed, run.task, run.model) in kept]


if __name__ == "__main__":
    main()
