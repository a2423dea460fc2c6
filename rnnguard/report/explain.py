"""Rules and remedies as the command line explains them: lists, pages of text, data."""

from __future__ import annotations

import json
from typing import Literal

from rnnguard.decision.rulebook import Rulebook
from rnnguard.errors import RulesError
from rnnguard.records import near_miss
from rnnguard.report.words import remedy_data, remedy_page, rule_data, rule_page

Format = Literal["text", "json"]


def rules_told(book: Rulebook, name: str | None, every: bool, form: Format) -> str:
    """One rule by code or name, or all of them; without `every` a list of one line each."""
    shown = [book.rule(name)] if name else list(book.rules)
    if form == "json":
        return json.dumps([rule_data(rule) for rule in shown], indent=2)
    if name or every:
        return "\n\n".join(map(rule_page, shown))
    return "\n".join(f"{r.code}  {r.severity:7}  {r.fix:9}  {r.name}" for r in shown)


def remedies_told(book: Rulebook, name: str | None, every: bool, form: Format) -> str:
    """One remedy by name, or all of them; without `every` a list of one line each."""
    from rnnguard.remedies import REMEDIES

    known = {remedy.name: remedy for remedy in REMEDIES}
    if name and name not in known:
        hint = near_miss(name, list(known))
        raise RulesError.of("RG914", "", f"{name!r} is not a known remedy;", hint)
    shown = [known[name]] if name else list(REMEDIES)
    if form == "json":
        return json.dumps([remedy_data(r, book) for r in shown], indent=2)
    if name or every:
        return "\n\n".join(remedy_page(remedy, book) for remedy in shown)
    return "\n".join(f"{r.name:27}  {r.tier:9}  {r.summary}" for r in shown)
