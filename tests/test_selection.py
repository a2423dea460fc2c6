"""What is told and what is hidden: comments beside findings, and comments that are idle."""

from __future__ import annotations

import os
from typing import Any

import pytest
from factories import measurement, site_readings

from rnnguard.decision.rulebook import Rulebook, load_rulebook
from rnnguard.decision.selection import Selected, selected
from rnnguard.decision.settings import Settings
from rnnguard.inspection.comments import Comment
from rnnguard.records import Finding


@pytest.fixture
def book() -> Rulebook:
    return load_rulebook()


def finding(code: str = "RG401", path: str | None = "lstm", **fields: Any) -> Finding:
    names = {"RG401": "vanishing-through-time", "RG201": "bidirectional-last-step",
             "RG501": "no-clipping", "RG101": "forget-bias-neutral"}  # fmt: skip
    known: dict[str, Any] = dict(
        name=names[code], severity="error", location="model.py:18", message="m", evidence={},
        cure="c", fix="manual",
    )  # fmt: skip
    return Finding(code=code, path=path, **known | fields)


def comment(*names: str, **fields: Any) -> Comment:
    """One at model.py:12 that speaks of the site `lstm`."""
    known: dict[str, Any] = dict(
        location="model.py:12", reason="known", lines=frozenset(), paths=frozenset({"lstm"}),
        sure=True,
    )  # fmt: skip
    return Comment(names=names, **known | fields)


def told(
    book: Rulebook, comments: list[Comment], *findings: Finding, run: dict[str, Any] | None = None
) -> Selected:
    look = measurement(
        site_readings(level="vanishing", bidirectional=True, reverse_seen=9), **run or {}
    )
    return selected(book, comments, findings, look)


def idle(chosen: Selected) -> list[str]:
    return [f"{f.location} {f.message}" for f in chosen.findings if f.code == "RG005"]


def codes(findings: tuple[Finding, ...]) -> list[str]:
    return [f.code for f in findings]


@pytest.mark.parametrize("word", ["RG401", "RG4", "RG40", "vanishing-through-time"])
def test_a_comment_hides_what_it_names_of_its_site(book: Rulebook, word: str) -> None:
    chosen = told(book, [comment(word)], finding(), finding("RG201"), finding(path="other"))
    assert codes(chosen.findings) == ["RG201", "RG401"]
    assert chosen.findings == chosen.remaining
    (hidden,) = chosen.suppressed
    assert (hidden.finding, hidden.reason, hidden.comment) == (finding(), "known", "model.py:12")


def test_a_comment_hides_what_is_found_on_its_line(book: Rulebook) -> None:
    line = frozenset({f"{os.getcwd()}/model.py:18"})
    chosen = told(book, [comment("RG401", lines=line, paths=frozenset())], finding(path="x"))
    assert (chosen.findings, len(chosen.suppressed)) == ((), 1)
    elsewhere = finding(location="other.py:18", path="x")
    beside = comment("RG401", lines=line, paths=frozenset(), sure=False)
    assert codes(told(book, [beside], elsewhere).findings) == ["RG401"]


def test_what_has_neither_path_nor_line_goes_with_the_model(book: Rulebook) -> None:
    found = finding("RG501", None, location=None)
    at_the_model = comment("no-clipping", paths=frozenset({""}))
    assert codes(told(book, [at_the_model], found).findings) == []
    at_a_site = comment("no-clipping", sure=False)
    assert codes(told(book, [at_a_site], found).findings) == ["RG501"]


def test_a_comment_without_names_hides_nothing_and_is_found(book: Rulebook) -> None:
    chosen = told(book, [comment(sure=False)], finding())
    assert codes(chosen.findings) == ["RG401", "RG005"]
    assert idle(chosen) == [
        "model.py:12 it names no rule, so it hides nothing; write `# rnnguard: ignore[RG201] "
        "reason`."
    ]


@pytest.mark.parametrize("word", ["ALL", "RG"])
def test_nor_does_one_that_names_everything(book: Rulebook, word: str) -> None:
    chosen = told(book, [comment(word, sure=False)], finding())
    assert codes(chosen.findings) == ["RG401", "RG005"]
    (said,) = idle(chosen)
    assert said == (
        f"model.py:12 '{word}' would hide everything, so it hides nothing; name the rules."
    )


def test_an_unknown_word_is_named_anywhere(book: Rulebook) -> None:
    chosen = told(book, [comment("RG401", "no-cliping", "zzz", sure=False)], finding())
    assert idle(chosen) == [
        "model.py:12 'no-cliping' is not a known rule; did you mean 'no-clipping'? 'zzz' is not a "
        "known rule; `rnnguard rule` lists them all."
    ]
    assert len(chosen.suppressed) == 1


def test_an_unused_comment_is_told_where_that_is_sure(book: Rulebook) -> None:
    sure = comment("RG201", "RG401")
    assert idle(told(book, [sure], finding())) == [
        "model.py:12 there is no finding of RG201 to hide."
    ]
    assert idle(told(book, [comment("RG201", sure=False)], finding())) == []
    assert idle(told(book, [comment("RG401")], finding())) == []


def test_what_nobody_looked_for_is_not_unused(book: Rulebook) -> None:
    # No optimizer; no trial; a code of what the audit itself raises, or refuses.
    for word in ("RG501", "RG509", "RG109", "RG903"):
        assert idle(told(book, [comment(word)], run={"optimizer": "none"})) == []
    assert idle(told(book, [comment("RG508")], run={"optimizer": "adamw"})) != []


def test_what_is_folded_into_its_cause_is_not_unused(book: Rulebook) -> None:
    assert "RG401" in book.rule("RG101").implied_by
    assert idle(told(book, [comment("RG101")], finding())) == []


def test_settings_leave_out_after_the_comments_did(book: Rulebook) -> None:
    quiet = book.model_copy(update={"settings": Settings(ignore=("RG4",))})
    chosen = told(quiet, [comment("RG401")], finding(), finding("RG201"))
    # The comment is not idle, and what nobody wants to hear of is not counted as hidden either.
    assert codes(chosen.findings) == ["RG201"]
    assert chosen.suppressed == ()
    off = book.model_copy(update={"settings": Settings(severity={"unused-suppression": "off"})})
    assert codes(told(off, [comment()], finding("RG201")).findings) == ["RG201"]


def test_sites_are_left_out_by_their_patterns(book: Rulebook) -> None:
    settings = Settings(per_site_ignores={"decoder.*": ("RG401",)})
    quiet = book.model_copy(update={"settings": settings})
    chosen = told(quiet, [], finding(path="decoder.rnn"), finding(path="encoder"))
    assert [f.path for f in chosen.findings] == ["encoder"]


def test_after_a_change_both_looks_count(book: Rulebook) -> None:
    look = measurement(site_readings(level="vanishing", bidirectional=True))
    both = [comment("RG401"), comment("RG201", location="model.py:31")]
    chosen = selected(book, both, [finding(), finding("RG201")], look, [finding("RG201")])
    # The first comment hid what is mended by now.
    assert codes(chosen.findings) == codes(chosen.remaining) == []
    assert [s.comment for s in chosen.suppressed] == ["model.py:31"]
