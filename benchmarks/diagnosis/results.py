"""From the result files to the table: detectors side by side on the same labelled runs."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.diagnosis.first_steps import STEPS
from benchmarks.diagnosis.fitting import MODELS, refitted
from benchmarks.diagnosis.labels import Cell, cells
from benchmarks.diagnosis.ledger import Row, rows_of
from benchmarks.diagnosis.peers import PEERS
from benchmarks.diagnosis.scoring import DRAWS, MEASURES, Judged, losing_cases, row_of, with_scores
from benchmarks.diagnosis.tasks import all_tasks
from benchmarks.diagnosis.verdicts import (
    MODES,
    TABLE,
    VIEWS,
    Readings,
    Threshold,
    derived,
    level_score,
    score,
)

Scores = dict[str, list[Judged]]
TORCH = torch.__version__.partition("+")[0]


def report(folder: Path, seeds: int, draws: int = DRAWS) -> list[Row]:
    """Writes and prints cells, figures and losing cases; gives the rows of the table."""
    labelled = cells(rows_of(folder / "outcomes.csv"), seeds)
    _written(folder / "cells.csv", [cell.row() for cell in labelled])
    print("cells:", dict(Counter(cell.label for cell in labelled)))
    held_out = {task.name for task in all_tasks() if task.held_out}
    scores = detectors(folder, labelled, held_out)
    table, losing = [], []
    for name, judged in scores.items():
        halves = {
            "held out": [j for j in judged if j.task in held_out],
            # What was fitted to these runs would be flattered by them.
            "training": [j for j in judged if j.task not in held_out and "fitted" not in name],
        }
        for half, part in halves.items():
            if part:
                table.append(row_of(name, half, part, draws) | {"torch": TORCH})
        losing += [{"detector": name} | case for case in losing_cases(halves["held out"])]
    _written(folder / "losing_cases.csv", losing)
    _written(folder.with_suffix(".csv"), table)
    _print(table, losing)
    return table


def detectors(folder: Path, labelled: Sequence[Cell], held_out: set[str]) -> Scores:
    """Every detector's scores on the labelled runs of the seeds that all of them have judged."""
    faults = {
        (c.task, c.mutation): c.label == "fault"
        for c in labelled
        if c.label in ("fault", "healthy")
    }
    rows, peers = rows_of(folder / "verdicts.csv"), rows_of(folder / "peers.csv")
    common = {_key(row) for row in rows} & {_key(row) for row in peers}
    counts = Counter(seed for _, _, seed in common)
    # A seed that was judged in part would weigh some tasks more than others.
    whole = {key for key in common if counts[key[2]] == max(counts.values())}
    rows, peers = ([row for row in part if _key(row) in whole] for part in (rows, peers))
    found: Scores = {}
    for view in VIEWS if rows else ():
        readings = _read(view)
        for kind, scored in (("levels", level_score), ("table", score)):
            scorer = _composed(scored, readings)
            found[f"rnnguard, {kind}, {view}"] = with_scores(faults, rows, scorer)
        found |= _fitted(faults, rows, held_out, readings, view)
    for name in PEERS if peers else ():
        for steps in (1, STEPS):
            column = f"{name} @{steps}"
            found[column] = with_scores(faults, peers, _composed(float, itemgetter(column)))
    return found


def _fitted(
    faults: dict[tuple[str, str], bool], rows: list[Row], held_out: set[str],
    readings: Callable[[Row], Readings], view: str,
) -> Scores:  # fmt: skip
    known = [row for row in rows if (row["task"], row["mutation"]) in faults]
    training = [row for row in known if row["task"] not in held_out]
    judged = [row for row in known if row["task"] in held_out]
    fault = np.array([faults[row["task"], row["mutation"]] for row in training])
    if not judged or not fault.any() or fault.all():
        return {}
    seen, unseen = [readings(row) for row in training], [readings(row) for row in judged]
    table = refitted(TABLE, seen, fault)
    _print_limits(view, table)
    tasks = [row["task"] for row in training]
    found = {
        f"rnnguard, table fitted, {view}": with_scores(
            faults, judged, lambda row: score(readings(row), table)
        )
    }
    for name, fit in MODELS.items():
        scores = map(float, fit(TABLE, seen, fault, tasks)(unseen))
        known_score = dict(zip(map(_key, judged), scores, strict=True))
        found[f"rnnguard, {name} fitted, {view}"] = with_scores(
            faults, judged, _composed(known_score.__getitem__, _key)
        )
    return found


def _composed(outer: Callable[[Any], float], inner: Callable[[Row], Any]) -> Callable[[Row], float]:
    return lambda row: outer(inner(row))


def _key(row: Row) -> tuple[str, str, str]:
    return row["task"], row["mutation"], row["seed"]


def _read(view: str) -> Callable[[Row], Readings]:
    known: dict[tuple[str, str, str], Readings] = {}

    def read(row: Row) -> Readings:
        if _key(row) not in known:
            stored = {mode: json.loads(row[f"readings {mode}"]) for mode in MODES}
            known[_key(row)] = derived(VIEWS[view](stored))
        return known[_key(row)]

    return read


def _print_limits(view: str, table: Sequence[Threshold]) -> None:
    print(f"limits fitted on the training half, {view}:")
    for before, after in zip(TABLE, table, strict=True):
        print(f"  {before.reading} {before.side} {before.limit:.3g} -> {after.limit:.3g}")


def _print(table: Sequence[Row], losing: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("detector", "half", *(name.replace("_", " ") for name in MEASURES))
    for row in table:
        figures = (f"{row[n]} ({row[f'{n}_low']}..{row[f'{n}_high']})" for n in MEASURES)
        shown.add_row(row["detector"], row["half"], *figures)
    console = Console(width=190)
    console.print(shown)
    for case in losing:
        if case["detector"].startswith("rnnguard"):
            console.print(*case.values(), sep=" | ", highlight=False)


def _written(path: Path, rows: Sequence[Row]) -> None:
    if not rows:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
