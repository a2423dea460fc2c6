"""The documentation's page on outcomes: tables in Markdown and a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.ledger import Row
from benchmarks.outcomes.models import MODELS
from benchmarks.outcomes.scoring import Reached, shares
from benchmarks.outcomes.tasks import all_tasks

# Without these two the file would differ from run to run.
STEADY: Any = {"svg.hashsalt": "rnnguard", "svg.fonttype": "none"}
NO_DATE: dict[str, Any] = {"Date": None}
COLUMNS = {
    "solved": "solved",
    "solved_minus_best_blind": "solved, minus {best}",
    "steps_to_target": "steps to target",
    "cost_to_target": "cost to target",
    "cost_over_best_blind": "cost over that of {best}",
    "worse": "made worse than nothing",
    "controls_solved": "controls solved",
    "controls_worse": "controls made worse",
}


def page(
    policies: dict[str, list[Reached]], table: Sequence[Row], losing: Sequence[Row], machine: Row,
    best: str,
) -> str:  # fmt: skip
    """The whole page; machine: a row that says what it was made on."""
    lines = [
        *_introduction(policies, machine),
        *_table(table, best),
        *_shares("task", policies, [task.name for task in all_tasks()]),
        *_shares("model", policies, MODELS),
        *_losing(losing, best),
    ]
    return "\n".join(lines) + "\n"


def _introduction(policies: dict[str, list[Reached]], machine: Row) -> Iterator[str]:
    runs = next(iter(policies.values()))
    seeds = len({run.seed for run in runs})
    yield "# Outcomes\n"
    yield (
        "What training reaches after each policy under the same compute budget, which pays for "
        "the policy's own work, too. Made by `python -m benchmarks.outcomes`; what a policy is, "
        "how costs are counted and when a run counts as made worse stands in "
        "`benchmarks/README.md`.\n"
    )
    yield (
        f"{len(runs)} runs of each policy: tasks x models on {seeds} seed{'s' * (seeds > 1)}. In "
        "brackets 95 % intervals, from draws of whole cells (task and model), and Wilson's for "
        "shares of runs made worse and of controls. Steps and costs are geometric means, costs in "
        "training steps of the untouched model; a run that misses its target counts with the whole "
        f"budget. rnnguard {machine['rnnguard']}, torch {machine['torch']}, Python "
        f"{machine['python']}, {machine['machine']}.\n"
    )
    yield "![Share of runs solved by the share of the budget that is spent](outcomes.svg)\n"


def _table(table: Sequence[Row], best: str) -> Iterator[str]:
    heads = [head.format(best=best) for head in COLUMNS.values()]
    yield from _markdown(
        ["policy", *heads, "set-up", "step"],
        [
            [row["policy"], *(_figure(row, n) for n in COLUMNS), row["setup_cost"],
             row["step_ratio"]]
            for row in table
        ],
    )  # fmt: skip
    yield "\n`set-up` and `step` are medians, in untouched steps.\n"
    for row in table:
        if row["errors"] != "0":
            yield (
                f"{row['errors']} runs of {row['policy']} ended in an error; what they had reached "
                "by then counts.\n"
            )


def _losing(losing: Sequence[Row], best: str) -> Iterator[str]:
    yield "## Losing cases\n"
    yield (
        "Cells where a policy of rnnguard makes a run worse than nothing does, or solves fewer "
        f"seeds than {best}. `learnt` goes from 0 at chance to 1 at the target, seed by seed.\n"
    )
    if losing:
        yield from _markdown(list(losing[0]), [list(case.values()) for case in losing])
    else:
        yield "None."


def _figure(row: Row, name: str) -> str:
    if not row.get(name):
        return ""
    return f"{row[name]} ({row[f'{name}_low']} to {row[f'{name}_high']})"


def _shares(part: str, policies: dict[str, list[Reached]], names: Sequence[str]) -> Iterator[str]:
    yield f"## Solved by {part}\n"
    found = {
        name: counts
        for name, counts in shares(policies, part, names).items()
        if any(total for _, total in counts.values())
    }
    yield from _markdown(
        [part, *policies],
        [[name, *(f"{n}/{of}" for n, of in counts.values())] for name, counts in found.items()],
    )
    yield ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def picture(policies: dict[str, list[Reached]]) -> str:
    """SVG: how many runs are solved by the time that a share of the budget is spent."""
    import matplotlib
    from matplotlib.figure import Figure

    tasks = {task.name: task for task in all_tasks()}
    spent = np.linspace(0, 1, 101)
    with matplotlib.rc_context(STEADY):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        color = {name: matplotlib.colormaps["tab20"](at) for at, name in enumerate(policies)}
        for name, runs in sorted(policies.items(), key=lambda item: -_solved(item[1])):
            shares = (
                run.cost / tasks[run.task].for_model(run.model).budget for run in runs if run.solved
            )
            done = np.array(list(shares))
            own = name.startswith("rnnguard")
            reached = [(done <= share).sum() / len(runs) for share in spent]
            axes.step(spent, reached, label=name, where="post", color=color[name],
                      linewidth=3 if own else 1.2)  # fmt: skip
        axes.set_xlabel("share of the budget spent, the policy's own work included")
        axes.set_ylabel("share of runs at their target")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small", loc="upper left")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=NO_DATE)
    return file.getvalue()


def _solved(runs: Sequence[Reached]) -> int:
    return sum(run.solved for run in runs)
