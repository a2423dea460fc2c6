"""The pages of the documentation that are made from the rule files and the remedies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from docs.pictures import picture
from rnnguard.decision.rulebook import Rule, Rulebook, load_rulebook
from rnnguard.remedies import REMEDIES
from rnnguard.report.words import remedy_page, rule_page

GROUPS = {
    "RG0": "The audit itself",
    "RG1": "Initialisation",
    "RG2": "Wiring",
    "RG3": "State",
    "RG4": "Gradient flow",
    "RG5": "Optimizer and precision",
    "RG6": "Layout and distribution",
    "RG9": "Refusals",
}


def write_pages(folder: Path) -> None:
    """Writes one page per rule and remedy, and the tables that lead to them, below `folder`."""
    book = load_rulebook()
    for name in ("rules", "remedies"):
        (folder / name).mkdir(exist_ok=True)
    for rule in book.rules:
        drawn = picture(rule) if rule.example else None
        if drawn is not None:
            (folder / "rules" / f"{rule.code}.svg").write_text(drawn, encoding="utf-8")
        _write(folder / "rules" / f"{rule.code}.md", _rule(rule, drawn is not None))
    _write(folder / "rules" / "index.md", "\n".join(_rules(book)))
    for remedy in REMEDIES:
        _write(folder / "remedies" / f"{remedy.name}.md", remedy_page(remedy, book))
    _write(folder / "remedies" / "index.md", "\n".join(_remedies()))
    _write(folder / "scenarios.md", "\n".join(_scenarios(book)))


def _write(file: Path, text: str) -> None:
    file.write_text(text.rstrip() + "\n", encoding="utf-8")


def _rule(rule: Rule, drawn: bool) -> str:
    shown = (
        f"\n\n## Gradient by lag\n\n![{rule.name}, sick and healthy]({rule.code}.svg)\n\n"
        "Left the example, right its healthy twin; the grey lines are the bounds of fading (0.05) "
        "and of vanishing (1e-6)."
    )
    return rule_page(rule) + (shown if drawn else "")


def _rules(book: Rulebook) -> Iterator[str]:
    yield "# Rules\n\nWhat an audit can find. `rnnguard rule CODE` prints the same in a terminal.\n"
    for prefix, title in GROUPS.items():
        yield f"## {title}\n\n| code | name | severity | fix | what is wrong |"
        yield "|---|---|---|---|---|"
        for rule in book.rules:
            if rule.code.startswith(prefix):
                link = f"[{rule.code}]({rule.code}.md)"
                yield f"| {link} | {rule.name} | {rule.severity} | {rule.fix} | {rule.what} |"
        yield ""
    yield from _hidden_contents(rule.code for rule in book.rules)


def _remedies() -> Iterator[str]:
    yield "# Remedies\n\nWhat `stabilize` can do, least invasive first.\n"
    yield "| remedy | tier | what it does |\n|---|---|---|"
    for remedy in REMEDIES:
        yield f"| [{remedy.name}]({remedy.name}.md) | {remedy.tier} | {remedy.summary} |"
    yield ""
    yield from _hidden_contents(remedy.name for remedy in REMEDIES)


def _scenarios(book: Rulebook) -> Iterator[str]:
    yield "# Scenarios\n\nWhat is done in which situation; the first row of each scope wins."
    for scope in dict.fromkeys(row.scope for row in book.scenarios):
        yield f"\n## {scope}\n\n| priority | row | when | remedies | why |\n|---|---|---|---|---|"
        rivals = [row for row in book.scenarios if row.scope == scope and row.only_rival]
        for row in (*book.ranked(scope), *rivals):
            when = ", ".join(f"{name} {cell}" for name, cell in row.when.cells.items())
            done = ", ".join(row.apply) or (f"advice: {row.advice}" if row.advice else "nothing")
            place = "in a trial" if row.only_rival else row.priority
            yield f"| {place} | {row.id} | {when} | {done} | {row.why} |"


def _hidden_contents(names: Iterator[str]) -> Iterator[str]:
    yield "```{toctree}\n:hidden:\n"
    yield from names
    yield "```"
