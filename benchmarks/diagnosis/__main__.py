"""Trains, judges and scores; every stage goes on where it was stopped.

python -m benchmarks.diagnosis [--stage train|peers|judge|score] [--workers 2] [--minutes 60]
                               [--tasks recall] [--seeds 5]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.diagnosis import results
from benchmarks.diagnosis.ledger import RESULTS, continue_
from benchmarks.diagnosis.stages import WORK
from benchmarks.diagnosis.training import all_runs

STAGES = ("train", "peers", "judge", "score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.diagnosis")
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all of them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--tasks", default="", help="only tasks whose name holds this")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    runs = list(all_runs(options.tasks, options.seeds))
    deadline = time.monotonic() + 60 * options.minutes
    for stage in options.stage or STAGES:
        if stage == "score":
            results.report(options.results, options.seeds)
            continue
        name, work = WORK[stage]
        left = continue_(
            options.results / name, runs, work, workers=options.workers, deadline=deadline
        )
        print(f"{stage}: {left} runs to go")


if __name__ == "__main__":
    main()
