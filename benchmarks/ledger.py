"""Result files that grow by one row per finished run, so that a stopped run can go on."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

Row = dict[str, str]
R = TypeVar("R")


def rows_of(path: Path) -> list[Row]:
    """The rows of a result file; none when it is not there yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def continue_(
    path: Path,
    runs: Iterable[R],
    work: Callable[[R], Row],
    *,
    key: Sequence[str],
    workers: int,
    deadline: float,
) -> int:
    """Appends the row of every run that the file lacks, until the deadline.

    key: the attributes of a run, and columns of its row, that tell it from all others.
    deadline: on the clock of `time.monotonic`. Gives how many runs are still to be done.
    """
    done = {tuple(row[name] for name in key) for row in rows_of(path)}
    missing = [run for run in runs if tuple(str(getattr(run, n)) for n in key) not in done]
    left = len(missing)
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in _worked(work, missing, workers, deadline):
        _append(path, row)
        left -= 1
        if left % 50 == 0:
            print(f"{path.name}: {left} runs to go", flush=True)
    return left


def _worked(
    work: Callable[[R], Row], runs: list[R], workers: int, deadline: float
) -> Iterator[Row]:
    def in_time() -> Iterator[R]:
        for run in runs:
            if time.monotonic() > deadline:
                return
            yield run

    if workers == 1:
        torch.set_num_threads(1)
        yield from map(work, in_time())
        return
    # Small portions, since a pool takes everything that it is given at once.
    with get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        waiting = in_time()
        while portion := list(islice(waiting, 8 * workers)):
            yield from pool.imap_unordered(work, portion)


def _columns(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _append(path: Path, row: Row) -> None:
    fresh = not path.exists()
    if not fresh and (known := _columns(path)) != list(row):
        raise ValueError(f"{path} has other columns than the new row: move it away. {known}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)
