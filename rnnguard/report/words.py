"""The words of a report: numbers, places and counts as people read them; no layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rnnguard.measurements import Site
from rnnguard.records import Change

if TYPE_CHECKING:
    from rnnguard.decision.rulebook import Rule
    from rnnguard.report.report import Report

FLOOR = -6  # log10 R below which a sparkline is blank, and a memory vanished
CURVE_WIDTH = 40
BOUNDLESS = 1000  # a log10 R this far below 0 stands for a gradient that is exactly zero
BLOCKS = " ▁▂▃▄▅▆▇█"
NO_SITES = "0 sites: no recurrence was found or left to look at, so no memory was measured."


def shape(site: Site) -> str:
    """Class and size of a site, such as `LSTM(5 -> 32, 2 layers, bidir)`."""
    if site.form == "written":
        return f"{site.module}(carries {site.hidden_size}, written by hand)"
    words = [f"{site.input_size} -> {site.hidden_size}"]
    words += [site.cell.partition("_")[2]] if "_" in site.cell else []
    words += [f"{site.layers} layers"] if site.layers > 1 else []
    words += ["bidir"] if site.bidirectional else []
    return f"{site.module.rpartition('.')[2]}({', '.join(words)})"


def power(log10: float) -> str:
    """A retention from its log10, also where a float would underflow."""
    if not abs(log10) < BOUNDLESS:
        return "0" if log10 < 0 else str(log10)
    mantissa, exponent = f"{10 ** (log10 % 1):.0e}".split("e")
    return f"{mantissa}e{math.floor(log10) + int(exponent):+03d}"


def logarithm(log10: float) -> str:
    return "-inf" if log10 <= -BOUNDLESS else f"{log10:.1f}"


def place(location: str | None) -> str:
    """A file:line as seen from the working directory."""
    if location is None:
        return ""
    path = Path(location)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else location


def at(path: str | None) -> str:
    """Where a finding or a change is: nowhere for the run, "(model)" for the model itself."""
    return "" if path is None else f"  {path or '(model)'}"


def counted(count: int, noun: str, ending: str = "s") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{ending}"


def closing(report: Report) -> list[str]:
    """The sentences that count what was found, what can be mended, and where to read on."""
    found = report.remaining
    if not found and not report.sites:
        made = f"{counted(len(report.changes), 'change')} made" if report.changes else "No findings"
        return [f"{made}, but nothing was measured."]
    if not found:
        mended = f" {counted(len(report.mended), 'finding')} mended." if report.mended else ""
        return [f"No findings{' left' if report.after else ''}.{mended}"]
    endings = {"error": "s", "warning": "s", "info": ""}
    counts = [
        counted(sum(f.severity == severity for f in found), severity, endings[severity])
        for severity in endings
        if any(f.severity == severity for f in found)
    ]
    still = " left" if report.after else ""
    mended = f" {len(report.mended)} mended." if report.mended else ""
    sentences = [f"{counted(len(found), 'finding')}{still} ({', '.join(counts)}).{mended}"]
    by_hand = sum(f.fix == "manual" for f in found)
    ours = sum(f.fix in ("step", "values", "structure") for f in found)
    if ours and report.after is None:
        sentences.append(f"{ours} can be mended by rnnguard.stabilize(model, optimizer).")
    if by_hand:
        sentences.append(f"{by_hand} to be mended by hand.")
    worst = max(found, key=lambda f: ("info", "warning", "error").index(f.severity))
    return [*sentences, f"Explain: rnnguard rule {worst.code}"]


def sparkline(retention: Sequence[float], top: float, blocks: str = BLOCKS) -> str:
    """One character per lag (or per few lags), from FLOOR (blank) to `top` (full)."""
    count = min(CURVE_WIDTH, len(retention))
    picked = [retention[round(i * (len(retention) - 1) / max(count - 1, 1))] for i in range(count)]
    heights = [(value - FLOOR) / (top - FLOOR) if value > FLOOR else 0.0 for value in picked]
    full = len(blocks) - 1
    return "".join(blocks[min(full, math.ceil(height * full))] for height in heights)


def dose(change: Change) -> str:
    given = {name: value for name, value in change.dose.items() if value is not None}
    return ", ".join(f"{name} {_amount(value)}" for name, value in given.items())


def _amount(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rule_data(rule: Rule) -> dict[str, object]:
    """A rule as plain data; its conditions as people write them."""
    words = ("code", "name", "severity", "stage", "fix", "what", "why", "example", "message")
    when = {name: str(cell) for name, cell in rule.when.cells.items()} if rule.when else {}
    data = {word: getattr(rule, word) for word in words}
    return data | {"when": when, "cure": rule.cure, "refs": list(rule.refs)}


def rule_page(rule: Rule) -> str:
    """A rule explained, under the same headings for all."""
    cells = rule.when.cells.items() if rule.when else ()
    sections = {
        "What is wrong": rule.what,
        "Why it hurts": rule.why,
        "Found when": ", ".join(f"{name} {cell}" for name, cell in cells),
        "Example": rule.example,
        "What to do": rule.cure,
        "References": "\n".join(rule.refs),
    }
    told = [f"## {title}\n\n{text.strip()}" for title, text in sections.items() if text]
    return "\n\n".join([f"# {rule.name} ({rule.code})", f"{rule.severity}; fix: {rule.fix}", *told])
