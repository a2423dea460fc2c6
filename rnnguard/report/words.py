"""The words of a report: numbers, places and counts as people read them; no layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rnnguard.measurements import Site
from rnnguard.records import Change

if TYPE_CHECKING:
    from rnnguard.decision.conditions import When
    from rnnguard.decision.rulebook import Rule, Rulebook, Scenario
    from rnnguard.remedies.remedy import Remedy
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
    hidden = f" {len(report.suppressed)} suppressed." if report.suppressed else ""
    if not found and not report.sites:
        made = f"{counted(len(report.changes), 'change')} made" if report.changes else "No findings"
        return [f"{made}, but nothing was measured.{hidden}"]
    if not found:
        mended = f" {counted(len(report.mended), 'finding')} mended." if report.mended else ""
        return [f"No findings{' left' if report.after else ''}.{mended}{hidden}"]
    endings = {"error": "s", "warning": "s", "info": ""}
    counts = [
        counted(sum(f.severity == severity for f in found), severity, endings[severity])
        for severity in endings
        if any(f.severity == severity for f in found)
    ]
    still = " left" if report.after else ""
    mended = f" {len(report.mended)} mended." if report.mended else ""
    sentences = [f"{counted(len(found), 'finding')}{still} ({', '.join(counts)}).{mended}{hidden}"]
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


FIXES = {
    "step": "step, by rnnguard.stabilize; taken back at any time",
    "values": "values, by rnnguard.stabilize; of untrained weights only",
    "structure": "structure, by rnnguard.stabilize; changes what the model computes or saves",
    "manual": "manual, by hand",
    "none": "none",
}


def rule_data(rule: Rule) -> dict[str, object]:
    """A rule as plain data; its conditions as people write them."""
    words = ("code", "name", "severity", "stage", "fix", "what", "why", "method", "how")
    rises = ("warning_when", "error_when")
    data = {word: getattr(rule, word) for word in words}
    data |= {"when": _cells(rule.when)}
    data |= {name: [_cells(when) for when in getattr(rule, name)] for name in rises}
    data |= {word: getattr(rule, word) for word in ("example", "twin", "message", "cure")}
    return data | {"implied_by": list(rule.implied_by), "refs": list(rule.refs)}


def rule_page(rule: Rule) -> str:
    """A rule explained, under the same headings for all."""
    # What the code itself raises is neither probed nor traced by a row's readings.
    method = f"By {_METHODS[rule.method]}. " if rule.when is not None else ""
    sections = {
        "What is wrong": rule.what,
        "Why it hurts": rule.why,
        "How it is found": f"{method}{rule.how}",
        "Found when": _stated(rule.when),
        "A warning when": "\n".join(f"* {_stated(when)}" for when in rule.warning_when),
        "An error when": "\n".join(f"* {_stated(when)}" for when in rule.error_when),
        "Example": code_block(rule.example),
        "The same, healthy": code_block(rule.twin),
        "What to do": rule.cure,
        "Implied by": ", ".join(rule.implied_by),
        "References": "\n".join(f"* {ref}" for ref in rule.refs),
    }
    first = f"{rule.severity}; fix: {FIXES[rule.fix]}"
    return page(f"{rule.name} ({rule.code})", first, sections)


_METHODS = {
    "static": "what the code and the weights show",
    "probe": "measuring the model",
    "recorded step": "watching a real training step",
}


_TIERS = {
    "step": "acts inside the optimizer's step and can be taken back at any time",
    "values": "gives untrained weights other values",
    "structure": "changes what the model computes or what its checkpoints hold",
}
_AIMS = {
    "health": "More of the gradient must reach back as far as needed, without growing.",
    "growth": "The gradient must grow less on its way back.",
    "input": "What the input adds to the pre-activations must come nearer to an rms of 1.",
    "output": "The scale of the output must come nearer to 1.",
    "depth": "The gradients of the layers must come nearer to each other.",
}
_NO_AIM = "No probe can tell, so it may only not harm."


def remedy_data(remedy: Remedy, book: Rulebook) -> dict[str, object]:
    """A remedy as plain data, with the rows that apply it."""
    words = ("name", "tier", "summary", "aim", "adds", "on_request")
    rows = [
        {"id": row.id, "scope": row.scope, "dose": row.dose.get(remedy.name, {}), "why": row.why}
        for row in book.scenarios
        if remedy.name in row.apply
    ]
    data = {word: getattr(remedy, word) for word in words}
    return data | {"doses": dict(remedy.doses), "scenarios": rows, "refs": list(remedy.refs)}


def remedy_page(remedy: Remedy, book: Rulebook) -> str:
    """A remedy explained, under the same headings for all."""
    rows = [_row(remedy, row) for row in book.scenarios if remedy.name in row.apply]
    none = "No row of the table applies it: a plan or a row of your own has to ask for it."
    sections = {
        "What it does": remedy.summary,
        "Dose": "\n".join(f"* {word}: {told}." for word, told in remedy.doses.items()),
        "What it adds": f"A child `{remedy.adds}` of the site's module." if remedy.adds else "",
        "What must improve": _AIMS[remedy.aim] if remedy.aim else _NO_AIM,
        "Applied by": "\n".join(rows) or none,
        "References": "\n".join(f"* {ref}" for ref in remedy.refs),
    }
    return page(remedy.name, f"{remedy.tier}: {_TIERS[remedy.tier]}", sections)


def _row(remedy: Remedy, row: Scenario) -> str:
    dose = ", ".join(f"{word} = {value}" for word, value in row.dose.get(remedy.name, {}).items())
    return f"* {row.id} ({row.scope}){f': {dose}' if dose else ''}"


def page(title: str, first: str, sections: dict[str, str]) -> str:
    """A page of Markdown; sections without a text are left out."""
    told = [f"## {name}\n\n{text.strip()}" for name, text in sections.items() if text.strip()]
    return "\n\n".join([f"# {title}", first, *told])


def code_block(text: str) -> str:
    return f"```python\n{text.strip()}\n```" if text.strip() else ""


def _cells(when: When | None) -> dict[str, str]:
    return {name: str(cell) for name, cell in when.cells.items()} if when else {}


def _stated(when: When | None) -> str:
    return ", ".join(f"{name} {cell}" for name, cell in _cells(when).items())
