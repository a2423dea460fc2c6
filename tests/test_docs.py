"""The documentation: a page for each rule and remedy, steady pictures, examples that work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import pages, pictures
from rnnguard.decision.rulebook import load_rulebook
from rnnguard.decision.settings import read_settings
from rnnguard.remedies import REMEDIES

BOOK = load_rulebook()


def test_every_rule_and_remedy_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "picture", lambda rule: "<svg/>")
    pages.write_pages(tmp_path)
    rules, remedies = tmp_path / "rules", tmp_path / "remedies"
    listed = (rules / "index.md").read_text()
    for rule in BOOK.rules:
        page = (rules / f"{rule.code}.md").read_text()
        assert page.startswith(f"# {rule.name} ({rule.code})\n")
        assert (f"({rule.code}.svg)" in page) is bool(rule.example)
        assert f"| [{rule.code}]({rule.code}.md) | {rule.name} |" in listed
    for remedy in REMEDIES:
        assert remedy.summary in (remedies / f"{remedy.name}.md").read_text()
        assert f"({remedy.name}.md)" in (remedies / "index.md").read_text()
    table = (tmp_path / "scenarios.md").read_text()
    assert all(f"| {row.id} |" in table for row in BOOK.scenarios)


def test_a_picture_shows_both_and_never_changes() -> None:
    rule = BOOK.rule("RG407")
    drawn = pictures.picture(rule)
    assert drawn is not None and drawn == pictures.picture(rule)
    assert "as in the example: at risk: fading, RG407" in drawn
    assert "healthy twin: healthy" in drawn


def test_a_rule_without_a_recurrence_has_no_picture() -> None:
    rule = BOOK.rule("RG407")
    none = "model = nn.Linear(3, 2)\ninputs = torch.randn(4, 3)\n"
    assert pictures.picture(rule.model_copy(update={"example": none, "twin": none})) is None


def test_the_examples_of_own_rules_are_valid(root: Path, tmp_path: Path) -> None:
    text = (root / "docs" / "own_rules.md").read_text(encoding="utf-8")
    settings, rule, scenario = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "pyproject.toml").write_text(settings)
    team = tmp_path / "rules" / "team"
    team.mkdir(parents=True)
    (team / "rules.toml").write_text(rule)
    (team / "scenarios.toml").write_text(scenario)
    found = read_settings(tmp_path / "pyproject.toml")
    book = load_rulebook([found])
    assert book.rule("RG790").name == "too-few-units"
    assert {row.id for row in book.scenarios} - {row.id for row in BOOK.scenarios} == {
        "long-memory"
    }
