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

from benchmarks.diagnosis.first_steps import STEPS
from benchmarks.diagnosis.fitting import forest, refitted
from benchmarks.diagnosis.labels import Cell, cells
from benchmarks.diagnosis.ledger import Row, rows_of
from benchmarks.diagnosis.peers import PEERS
from benchmarks.diagnosis.scoring import DRAWS, MEASURES, Judged, losing_cases, row_of, with_scores
from benchmarks.diagnosis.tasks import all_tasks
from benchmarks.diagnosis.verdicts import MODES, TABLE, Threshold, level_score, score

Scores = dict[str, list[Judged]]


def report(folder: Path, seeds: int, draws: int = DRAWS) -> list[Row]:
    """Writes and prints cells, figures and losing cases; gives the rows of the table."""
    labelled = cells(rows_of(folder / "outcomes.csv"), seeds)
    _written(folder / "cells.csv", [cell.row() for cell in labelled])
    print("cells:", dict(Counter(cell.label for cell in labelled)))
    held_out = {task.name for task in all_tasks() if task.held_out}
    scores = detectors(folder, labelled, held_out)
    table, losing = [], []
    for name, judged in scores.items():
        halves = {"held out": [j for j in judged if j.task in held_out], "all": judged}
        for half, part in halves.items():
            fitted = "fitted" in name
            if part and not (fitted and half == "all"):
                table.append(row_of(name, half, part, draws))
        losing += [{"detector": name} | case for case in losing_cases(halves["held out"])]
    _written(folder / "losing_cases.csv", losing)
    _written(folder.with_suffix(".csv"), table)
    _print(table, losing)
    return table


def detectors(folder: Path, labelled: Sequence[Cell], held_out: set[str]) -> Scores:
    """Every detector's scores on the labelled runs that it has judged."""
    faults = {
        (c.task, c.mutation): c.label == "fault"
        for c in labelled
        if c.label in ("fault", "healthy")
    }
    rows = rows_of(folder / "verdicts.csv")
    found: Scores = {}
    for mode in MODES if rows else ():
        readings = _read(f"readings {mode}")
        for kind, scored in (("levels", level_score), ("table", score)):
            found[f"rnnguard, {kind}, memory {mode}"] = with_scores(
                faults, rows, _composed(scored, readings)
            )
        found |= _fitted(faults, rows, held_out, readings, mode)
    peers = rows_of(folder / "peers.csv")
    for name in PEERS if peers else ():
        for steps in (1, STEPS):
            column = f"{name} @{steps}"
            found[column] = with_scores(faults, peers, _composed(float, itemgetter(column)))
    return found


def _fitted(
    faults: dict[tuple[str, str], bool], rows: list[Row], held_out: set[str],
    readings: Callable[[Row], dict[str, Any]], mode: str,
) -> Scores:  # fmt: skip
    known = [row for row in rows if (row["task"], row["mutation"]) in faults]
    training = [row for row in known if row["task"] not in held_out]
    judged = [row for row in known if row["task"] in held_out]
    fault = np.array([faults[row["task"], row["mutation"]] for row in training])
    if not judged or not fault.any() or fault.all():
        return {}
    seen = [readings(row) for row in training]
    table = refitted(TABLE, seen, fault)
    _print_limits(mode, table)
    model = forest(seen, fault, [row["task"] for row in training])
    probability = dict(zip(map(_key, judged), model([readings(r) for r in judged]), strict=True))
    return {
        f"rnnguard, table fitted, memory {mode}": with_scores(
            faults, judged, lambda row: score(readings(row), table)
        ),
        f"rnnguard, forest fitted, memory {mode}": with_scores(
            faults, judged, lambda row: float(probability[_key(row)])
        ),
    }


def _composed(outer: Callable[[Any], float], inner: Callable[[Row], Any]) -> Callable[[Row], float]:
    return lambda row: outer(inner(row))


def _key(row: Row) -> tuple[str, str, str]:
    return row["task"], row["mutation"], row["seed"]


def _read(column: str) -> Callable[[Row], dict[str, Any]]:
    known: dict[tuple[str, str, str], dict[str, Any]] = {}

    def read(row: Row) -> dict[str, Any]:
        if _key(row) not in known:
            known[_key(row)] = json.loads(row[column])
        return known[_key(row)]

    return read


def _print_limits(mode: str, table: Sequence[Threshold]) -> None:
    print(f"limits fitted on the training half, memory {mode}:")
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
