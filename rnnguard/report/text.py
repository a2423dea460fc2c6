"""The terminal view of a report: readable at 80 columns, with and without colour."""

# ruff: noqa: E402
from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import IO, TYPE_CHECKING

# rich draws from Python's random numbers when it is imported: a printed report must not
# change what a training run draws next.
_drawn_so_far = random.getstate()

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

random.setstate(_drawn_so_far)

import rnnguard
from rnnguard.measurements import SiteReadings
from rnnguard.race import Race
from rnnguard.records import Change, Finding
from rnnguard.report.words import (
    BLOCKS,
    FLOOR,
    NO_SITES,
    at,
    closing,
    counted,
    dose,
    logarithm,
    place,
    power,
    shape,
    sparkline,
)

if TYPE_CHECKING:
    from rnnguard.report.report import Report

_ASCII_BLOCKS = " .:-=+*#@"
_SEVERITY_STYLE = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_OUTCOME_STYLE = {"applied": "green", "taken back": "yellow", "planned": "cyan"}
_LEVEL_STYLE = {"healthy": "green", "unknown": "dim"}


def view(report: Report, *, ascii_only: bool = False) -> Iterator[RenderableType]:
    """The whole report, part by part."""
    yield from _header(report)
    yield Text()
    if report.sites:
        yield _table(report)
        yield from _curves(report, _ASCII_BLOCKS if ascii_only else BLOCKS)
    elif not report.changes and report.now.run.basis != "not run":
        yield Text(NO_SITES, style="bold red")
    yield from brief(report)


def brief(report: Report) -> Iterator[RenderableType]:
    """Findings, changes, refusals and notes, without the tables of readings."""
    yield from _section("Findings", (_finding(f) for f in report.remaining))
    yield from _section("Mended", (_finding_line(f) for f in report.mended))
    if report.changes:
        yield from _section("Changes", _changes(report.changes))
    else:
        title = "What rnnguard.stabilize(model, optimizer) would do"
        yield from _section(title, _changes(tuple(report.plan)))
    if report.trial is not None:
        yield from _section("Trial", iter([_trial(report.trial)]))
    yield from _section("Left alone", (Text(str(refusal)) for refusal in report.refusals))
    yield from _section("Notes", (Text(note) for note in report.notes))
    yield Text()
    yield from _closing(report)


def plain(
    report: Report,
    width: int = 80,
    file: IO[str] | None = None,
    parts: Callable[[Report], Iterator[RenderableType]] | None = None,
) -> str:
    """The view as text without colour, in characters that `file` can hold."""
    console = Console(
        file=file or io.StringIO(), width=width, color_system=None, force_terminal=False
    )
    with console.capture() as capture:
        for part in parts(report) if parts else [report]:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def show(report: Report) -> None:
    """Prints the view on the terminal."""
    Console().print(report)


def _header(report: Report) -> Iterator[Text]:
    run = report.now.run
    versions = f"rnnguard {rnnguard.__version__}   torch {run.torch}"
    setting = f"{run.device} {run.precision}   seed {run.seed}   {run.seconds:.1f} s"
    yield Text(f"{versions}   {setting}", style="bold")
    made_up = run.basis not in ("real data", "given inputs")
    basis = f"rests on {run.basis} ({counted(run.batches, 'batch', 'es')})"
    if run.basis == "not run":
        yield Text("the model was not run", style="yellow")
        return
    yield Text(basis, style="yellow" if made_up else "")
    losses = [f"{look.run.loss:.4g}" for _, look in report.looks if look.run.loss is not None]
    loss = f"loss before training {' -> '.join(losses)}   " if losses else ""
    norms = " -> ".join(f"{look.run.grad_norm:.2g}" for _, look in report.looks)
    yield Text(f"{loss}gradient norm {norms}")
    if run.nonfinite:
        yield Text("The loss or a gradient is not finite.", style="bold red")


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("site", overflow="fold")
    table.add_column("decay/step", justify="right")
    table.add_column("T_eff(1e-2)", justify="right")
    table.add_column("log10 R at memory", justify="right")
    table.add_column("level")
    for site in report.sites:
        name = Text(f"{site.label}\n") + Text(shape(site), style="dim")
        seen = [look[site.path] for _, look in report.looks if site.path in look]
        if not seen:
            table.add_row(name, "", "", "", Text("not measured", style="yellow"))
            continue
        changed = seen[:1] if len({s.level for s in seen}) == 1 else seen
        levels = Text("\n").join(_level(s, i) for i, s in enumerate(changed))
        known = seen[-1].memory_needed is not None
        source = Text(f"\n{seen[-1].memory_source}" if known else "", style="dim")
        table.add_row(
            name,
            _arrows([f"{s.decay_per_step:.3f}" for s in seen]),
            _arrows([f"{s.effective_length} of {s.window}" for s in seen]),
            _arrows([_at_memory(s) for s in seen]) + source,
            levels,
        )
    return table


def _arrows(values: list[str]) -> Text:
    shown = values[:1] if len(set(values)) == 1 else values
    return Text("\n".join(f"-> {v}" if i else v for i, v in enumerate(shown)))


def _level(site: SiteReadings, position: int) -> Text:
    arrow = Text("-> " if position else "")
    return arrow + Text(site.level, style=_LEVEL_STYLE.get(site.level, _risk_style(site.level)))


def _risk_style(level: str) -> str:
    return "yellow" if level.startswith("at risk") else "bold red"


def _at_memory(site: SiteReadings) -> str:
    if site.memory_needed is None or site.retention_at_memory is None:
        return "-"
    return f"{logarithm(site.retention_at_memory)} at {site.memory_needed}"


def _curves(report: Report, blocks: str) -> Iterator[Text]:
    curves = [s.retention for _, look in report.looks for s in look.sites if s.retention]
    highest = max((v for curve in curves for v in curve if math.isfinite(v)), default=0.0)
    top = max(0, math.ceil(highest))
    yield Text(f"\nGradient by lag: log10 R from {top} (full) to {FLOOR} (blank)", style="bold")
    for site in report.sites:
        yield Text(site.label)
        for name, look in report.looks:
            if site.path in look and (retention := look[site.path].retention):
                last = len(retention) - 1
                line = sparkline(retention, top, blocks)
                yield Text(f"  {name:6}  0 {line} {last}   R({last}) = {power(retention[-1])}")


def _section(title: str, parts: Iterator[RenderableType]) -> Iterator[RenderableType]:
    listed = list(parts)
    if listed:
        yield Text(f"\n{title}", style="bold")
        yield from listed


def _finding_line(finding: Finding) -> Text:
    where = place(finding.location)
    line = Text(f"{where}  " if where else "")
    line.append(f"{finding.code} {finding.severity}", style=_SEVERITY_STYLE[finding.severity])
    return line.append(f"  {finding.name}{at(finding.path)}")


def _finding(finding: Finding) -> RenderableType:
    body = Text(finding.message)
    if finding.evidence:
        because = ", ".join(f"{name} {value}" for name, value in finding.evidence.items())
        body.append(f"\nbecause {because}", style="dim")
    if finding.cure:
        remedy = "what to do" if finding.fix == "none" else f"fix ({finding.fix})"
        body.append(f"\n{remedy}: {finding.cure}")
    return Group(_finding_line(finding), Padding(body, (0, 0, 0, 4)))


def _changes(changes: Sequence[Change]) -> Iterator[RenderableType]:
    """Each scenario's reason once, its changes below it."""
    for (path, why), group in groupby(changes, key=lambda change: (change.path, change.why)):
        yield Text(f"{at(path).strip() or 'optimizer'}: {why}", style="dim")
        yield from map(_change, group)


def _change(change: Change) -> RenderableType:
    line = Text(f"  {change.outcome:10}", style=_OUTCOME_STYLE[change.outcome])
    words = f"  {change.remedy}  ({change.tier})  {dose(change)}"
    line.append(words.rstrip(), style="default")
    if not change.result:
        return line
    return Group(line, Padding(Text(change.result), (0, 0, 0, 6)))


def _trial(race: Race) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
    table.add_column("candidate", overflow="fold")
    table.add_column("loss", justify="right")
    table.add_column("outcome", overflow="fold")
    for entry in race.entries:
        level = race.level(entry.candidate.name)
        style = "green" if entry.fate == "won" else ""
        outcome = f"{entry.fate}: {entry.words}"
        table.add_row(entry.candidate.name, "" if level is None else f"{level:.4g}", outcome,
                      style=style)  # fmt: skip
    return table


@contextmanager
def bar(steps: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on standard error that goes away at its end; call what it gives."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("trial"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=steps)
        yield lambda taken, words: progress.update(task, advance=taken, description=words)


def _closing(report: Report) -> Iterator[Text]:
    style = "green" if report.ok and (report.sites or report.changes) else "bold red"
    first, *rest = closing(report)
    yield Text(first, style=style)
    for sentence in rest:
        yield Text(sentence)
