"""From the runs to the table, the page of the documentation and its picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ledger import Row, rows_of
from benchmarks.outcomes.lineup import NOTHING
from benchmarks.outcomes.page import page, picture
from benchmarks.outcomes.scoring import (
    DRAWS,
    Reached,
    best_blind,
    by_policy,
    losing_cases,
    made_worse,
    read,
    row_of,
)
from benchmarks.outcomes.tasks import all_tasks

SHOWN = (
    "solved", "solved_minus_best_blind", "steps_to_target", "cost_to_target",
    "cost_over_best_blind", "worse", "controls_solved",
)  # fmt: skip


def report(folder: Path, pages: Path, draws: int = DRAWS) -> list[Row]:
    """Writes table, losing cases, page and picture, prints them; gives the rows of the table."""
    rows = rows_of(folder / "runs.csv")
    runs = read(rows, {task.name for task in all_tasks() if task.control})
    policies = by_policy(runs)
    if NOTHING not in policies or len(policies) < 2:
        raise SystemExit(f"{folder / 'runs.csv'} holds no run that `{NOTHING}` and others share")
    if left_out := len(rows) - len(runs):
        print(f"{left_out} rows are left out: not every policy has been run on the same ones")
    best = best_blind(policies)
    table = [row_of(name, policies, best, draws) for name in policies]
    table.sort(key=lambda row: -float(row["solved"]))
    losing = losing_cases(policies, best)
    _written(folder.with_suffix(".csv"), table)
    _written(folder / "losing_cases.csv", losing)
    pages.mkdir(parents=True, exist_ok=True)
    (pages / "outcomes.md").write_text(
        page(policies, table, losing, rows[-1], best), encoding="utf-8"
    )
    (pages / "outcomes.svg").write_text(picture(policies), encoding="utf-8")
    _print(table, losing, policies, best)
    return table


def _print(
    table: Sequence[Row], losing: Sequence[Row], policies: dict[str, list[Reached]], best: str
) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("policy", "runs", *(name.replace("_", " ") for name in SHOWN))
    for row in table:
        figures = (f"{row[n]} ({row[f'{n}_low']}..{row[f'{n}_high']})" for n in SHOWN)
        shown.add_row(row["policy"], row["runs"], *figures)
    console = Console(width=200)
    console.print(shown, f"best blind policy: {best}; losing cases of rnnguard:", sep="\n")
    for case in losing:
        console.print(*case.values(), sep=" | ", highlight=False)
    for name, runs in policies.items():
        if name.startswith("rnnguard"):
            worse = [
                f"{r.task}, {r.model}, seed {r.seed}" for r in made_worse(runs, policies[NOTHING])
            ]
            console.print(f"{name} made worse: {'; '.join(worse) or 'none'}", highlight=False)


def _written(path: Path, rows: Sequence[Row]) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
