"""The result files of this benchmark: a row per run, known by seed, task and mutation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import ledger
from benchmarks.diagnosis.training import Run
from benchmarks.ledger import Row as Row
from benchmarks.ledger import rows_of as rows_of

RESULTS = Path(__file__).parents[1] / "results" / "diagnosis"


def run_of(row: Row) -> Run:
    return Run(int(row["seed"]), row["task"], row["mutation"])


def continue_(
    path: Path,
    runs: Iterable[Run],
    work: Callable[[Run], Row],
    *,
    workers: int,
    deadline: float,
) -> int:
    """Appends the row of every run that the file lacks; see `benchmarks.ledger.continue_`."""
    key = ("seed", "task", "mutation")
    return ledger.continue_(path, runs, work, key=key, workers=workers, deadline=deadline)
