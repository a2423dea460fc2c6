"""Nothing named in a table is missing, and nothing that exists is missing from the tables."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from rnnguard.decision.rulebook import Rulebook, load_rulebook
from rnnguard.records import TIERS
from rnnguard.remedies import REMEDIES
from rnnguard.remedies.remedy import Remedy

NOT_REMEDIES = {"__init__", "morph", "remedy"}


@pytest.fixture(scope="module")
def book() -> Rulebook:
    return load_rulebook()


def files(root: Path) -> list[str]:
    folder = root / "rnnguard" / "remedies"
    return sorted(file.stem for file in folder.glob("*.py") if file.stem not in NOT_REMEDIES)


def test_every_file_is_a_registered_remedy(root: Path) -> None:
    assert sorted(remedy.name for remedy in REMEDIES) == files(root)


def test_every_file_defines_the_remedy_of_its_name(root: Path) -> None:
    for name in files(root):
        module = importlib.import_module(f"rnnguard.remedies.{name}")
        found = getattr(module, name.upper())
        assert isinstance(found, Remedy)
        assert found.name == name and found in REMEDIES


def test_every_remedy_named_in_a_scenario_exists(book: Rulebook) -> None:
    book.check_remedies([remedy.name for remedy in REMEDIES])


def test_every_remedy_is_used_by_a_scenario(book: Rulebook) -> None:
    used = {name for row in book.scenarios for name in row.apply}
    chosen = {remedy.name for remedy in REMEDIES if not remedy.on_request}
    assert sorted(used) == sorted(chosen)


def test_every_remedy_is_told_in_a_sentence(book: Rulebook) -> None:
    # What only a trial may choose is judged by training.
    probed = {name for row in book.scenarios for name in row.apply if not row.only_rival}
    for remedy in REMEDIES:
        assert remedy.tier in TIERS
        assert remedy.summary.endswith("."), remedy.name
        verified = remedy.aim is not None or remedy.on_request or remedy.name not in probed
        assert remedy.tier == "step" or verified, f"{remedy.name} is never verified"


def test_every_code_of_a_scenario_exists(book: Rulebook) -> None:
    known = {rule.code for rule in book.rules}
    assert sorted({code for row in book.scenarios for code in row.codes} - known) == []


def test_every_code_has_its_text(book: Rulebook) -> None:
    for rule in book.rules:
        for text in (rule.what, rule.why, rule.cure):
            assert text.endswith("."), f"{rule.code}: {text!r}"
        assert rule.name != rule.code


def test_names_are_unique(book: Rulebook) -> None:
    names = [rule.name for rule in book.rules]
    assert sorted(names) == sorted(set(names))


def test_every_scenario_cites_something(book: Rulebook) -> None:
    assert [row.id for row in book.scenarios if not row.refs or not all(row.refs)] == []


def test_a_fix_by_a_tier_has_a_remedy_of_that_tier(book: Rulebook) -> None:
    """What a finding says that stabilize would do must be something that it can do."""
    tiers = {remedy.name: remedy.tier for remedy in REMEDIES}
    offered = {tiers[name] for row in book.scenarios for name in row.apply}
    assert {rule.fix for rule in book.rules} - {"manual", "none"} <= offered
