"""The health table row by row, and which rules fire on which readings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from factories import measurement, run_readings, site_readings

from rnnguard.decision.diagnosis import audit_finding, diagnose, findings_of, level_of
from rnnguard.decision.rulebook import Rulebook, load_rulebook
from rnnguard.errors import RulesError
from rnnguard.records import LEVELS, Finding

OWN_RULE = """
schema = 1
[[rule]]
code = "RG790"
name = "slow"
severity = "warning"
what = "w"
why = "w"
cure = "c"
fix = "manual"
refs = ["me"]
message = "{effective_length} of {steps} steps"
when = { effective_length = "< 20", cell = "lstm" }
error_when = { effective_length = "< 5" }
"""
LN3, LN100, FADED = math.log(3), math.log(100), math.log10(0.05)


@pytest.fixture(scope="module")
def rulebook() -> Rulebook:
    return load_rulebook()


@pytest.fixture
def own_book(tmp_path: Path) -> Rulebook:
    """One rule alone, so that the words of the built-in ones may change."""
    (tmp_path / "rules.toml").write_text(OWN_RULE)
    book = load_rulebook([tmp_path])
    return book.model_copy(update={"rules": (book.rule("RG790"),)})


@pytest.mark.parametrize(
    ("level", "fields"),
    [
        ("exploding", {"expansive": True, "growth_over_window": LN100 + 1e-9}),
        ("at risk: expansive", {"expansive": True, "growth_over_window": LN100}),
        ("at risk: expansive", {"expansive": True, "growth_over_window": LN3 + 1e-9}),
        ("healthy", {"expansive": True, "growth_over_window": LN3}),
        ("healthy", {"expansive": False, "growth_over_window": LN100 + 1}),
        ("exploding", {"growth": 100.001}),
        ("healthy", {"growth": 100.0}),
        ("truncated", {"memory_needed": 101}),
        ("healthy", {"memory_needed": 100}),
        ("vanishing", {"retention_at_memory": -6.001}),
        ("vanishing", {"retention_at_memory": -6.001, "memory_source": "estimated"}),
        ("at risk: fading", {"retention_at_memory": -6.001, "memory_source": "assumed"}),
        ("at risk: fading", {"retention_at_memory": -1e4, "memory_source": "assumed"}),
        ("at risk: fading", {"retention_at_memory": -6.0}),
        ("at risk: fading", {"retention_at_memory": FADED - 1e-9}),
        ("healthy", {"retention_at_memory": FADED}),
        ("healthy", {"retention_at_memory": 2.0}),
        (
            "unknown",
            {"memory_needed": None, "memory_source": "unknown", "retention_at_memory": None},
        ),
    ],
)
def test_the_health_table(level: str, fields: dict[str, Any]) -> None:
    assert level_of(site_readings(**fields), run_readings()) == level


NO_MEMORY = {"memory_needed": None, "memory_source": "unknown", "retention_at_memory": None}


@pytest.mark.parametrize(
    ("level", "run", "fields"),
    [
        ("unstable", {"nonfinite": True}, {"growth": 1e3}),
        ("exploding", {}, {"growth": 1e3, "expansive": True, "growth_over_window": 2.0}),
        ("at risk: expansive", {}, {"expansive": True, "growth_over_window": 2.0, "window": 9}),
        ("truncated", {}, {"window": 9, "retention_at_memory": -9.0}),
        ("unstable", {"nonfinite": True}, NO_MEMORY),
        ("exploding", {}, {"growth": 1e3, **NO_MEMORY}),
        ("at risk: expansive", {}, {"expansive": True, "growth_over_window": 2.0, **NO_MEMORY}),
    ],
)
def test_the_first_row_that_holds_wins(
    level: str, run: dict[str, Any], fields: dict[str, Any]
) -> None:
    assert level_of(site_readings(**fields), run_readings(**run)) == level


def test_diagnose_fills_in_every_level_and_nothing_else() -> None:
    before = measurement(
        site_readings(path="a", level="unknown"),
        site_readings(path="b", level="unknown", retention_at_memory=-9.0),
    )
    after = diagnose(before)
    assert [site.level for site in after.sites] == ["healthy", "vanishing"]
    assert after.level == "vanishing"
    assert after["a"] == before["a"].model_copy(update={"level": "healthy"})
    assert after.run == before.run


def test_the_worst_level_is_the_measurements() -> None:
    for better, worse in zip(LEVELS[1:], LEVELS, strict=False):
        sites = [site_readings(path=level, level=level) for level in (better, worse)]
        assert measurement(*sites).level == worse
    assert measurement().level == "unknown"


def codes(found: tuple[Finding, ...]) -> list[str]:
    return [finding.code for finding in found]


SHORT = {"cell": "rnn_tanh", "level": "at risk: fading", "memory_needed": 10}


@pytest.mark.parametrize(
    ("expected", "fields"),
    [
        ([], {}),
        (["RG101"], {"forget_bias": 0.0, "level": "unknown"}),
        (["RG102"], {"forget_bias_doubled": True}),
        ([], {"forget_bias_doubled": True, "forget_bias": 1.0}),
        (["RG105"], SHORT | {"memory_source": "estimated"}),
        ([], SHORT | {"memory_source": "assumed"}),
        (["RG104"], {"whole_matrix_orthogonal": True}),
        (["RG107"], {"saturation": 0.81}),
        ([], {"saturation": 0.8}),
        (["RG108"], {"input_drive": 4.1}),
        (["RG110"], {"dropout": 0.5}),
        ([], {"dropout": 0.5, "layers": 2}),
        (["RG201"], {"bidirectional": True, "readout": "last_step", "reverse_seen": 1}),
        ([], {"bidirectional": True, "readout": "last_step", "reverse_seen": 100}),
        ([], {"bidirectional": True, "readout": "last_step"}),
        ([], {"bidirectional": True, "readout": "final_state"}),
        (["RG305"], {"level": "truncated"}),
        (["RG401"], {"level": "vanishing"}),
        (["RG402"], {"level": "exploding"}),
        (["RG407"], {"level": "at risk: fading", "retention_at_memory": -3.0}),
        ([], {"level": "at risk: fading", "retention_at_memory": -1.0}),
        ([], {"level": "at risk: fading", "memory_needed": 10}),
        (
            ["RG408"],
            {
                "level": "at risk: expansive",
                "expansive": True,
                "growth": 3.1,
                "growth_over_window": 1.2,
            },
        ),
        ([], {"level": "at risk: expansive"}),  # by spikes, of which RG410 tells
    ],
)
def test_what_fires_at_a_site(
    rulebook: Rulebook, expected: list[str], fields: dict[str, Any]
) -> None:
    assert codes(findings_of(rulebook, measurement(site_readings(**fields)))) == expected


@pytest.mark.parametrize(
    ("expected", "fields"),
    [
        (["RG403"], {"nonfinite": True}),
        (["RG409"], {"grad_norm_spread": 10.5}),
        (["RG501"], {"guarded": False}),
        ([], {"guarded": False, "optimizer": "none"}),
        (["RG506"], {"parameters_missing": 2}),
        (["RG508"], {"weight_decay": 0.01}),
        ([], {"weight_decay": 0.01, "optimizer": "adamw"}),
    ],
)
def test_what_fires_of_the_run(
    rulebook: Rulebook, expected: list[str], fields: dict[str, Any]
) -> None:
    found = findings_of(rulebook, measurement(site_readings(), **fields))
    assert codes(found) == expected
    assert [finding.path for finding in found] == [None] * len(found)


@pytest.mark.parametrize(
    ("severity", "fields"),
    [
        ("warning", {"clip_use": "always", "clip_norm": 0.001}),
        ("info", {"clip_use": "always", "clip_norm": 0.25}),
        ("info", {"clip_use": "never", "clip_norm": 1e6}),
        ("error", {"clip_use": "not positive", "clip_norm": -1.0}),
        ("info", {"nonfinite_passed": True, "precision": "bf16"}),
        ("warning", {"nonfinite_passed": True, "precision": "fp16"}),
    ],
)
def test_how_bad_it_is(rulebook: Rulebook, severity: str, fields: dict[str, Any]) -> None:
    (found,) = findings_of(rulebook, measurement(site_readings(), **fields))
    assert found.severity == severity


@pytest.mark.parametrize(
    ("cause", "folded", "fields"),
    [
        ("RG401", "RG101", {"level": "vanishing", "forget_bias": 0.0}),
        (
            "RG407",
            "RG101",
            {"level": "at risk: fading", "forget_bias": 0.0, "retention_at_memory": -3.0},
        ),
        ("RG401", "RG105", {"level": "vanishing", "cell": "rnn_tanh"}),
        (
            "RG106",
            "RG402",
            {"level": "exploding", "cell": "rnn_relu", "spectral_radius": 2.0},
        ),
    ],
)
def test_an_implied_finding_is_folded_into_its_cause(
    rulebook: Rulebook, cause: str, folded: str, fields: dict[str, Any]
) -> None:
    assert folded in {rule.code for rule in rulebook.rules if cause in rule.implied_by}
    assert codes(findings_of(rulebook, measurement(site_readings(**fields)))) == [cause]


def test_a_cause_at_another_site_folds_nothing(rulebook: Rulebook) -> None:
    sick = site_readings(path="a", level="vanishing")
    neutral = site_readings(path="b", level="unknown", forget_bias=0.0)
    found = findings_of(rulebook, measurement(sick, neutral))
    assert [(finding.code, finding.path) for finding in found] == [("RG401", "a"), ("RG101", "b")]


def test_the_worst_comes_first(rulebook: Rulebook) -> None:
    site = site_readings(level="vanishing", dropout=0.5, saturation=0.9)
    found = findings_of(rulebook, measurement(site, guarded=False, nonfinite=True))
    assert codes(found) == ["RG403", "RG401", "RG107", "RG501", "RG110"]
    assert [f.severity for f in found] == ["error", "error", "warning", "info", "info"]


def test_a_finding_says_all_of_it(own_book: Rulebook) -> None:
    site = site_readings(effective_length=12)
    found = findings_of(own_book, measurement(site))
    assert found == (
        Finding(
            code="RG790",
            name="slow",
            severity="warning",
            path="lstm",
            location="model.py:18",
            message="12 of 100 steps",
            evidence={"cell": "= lstm", "effective_length": "12 (< 20)"},
            cure="c",
            fix="manual",
            refs=("me",),
        ),
    )


def test_evidence_has_the_number_and_the_range(rulebook: Rulebook) -> None:
    (found,) = findings_of(rulebook, measurement(site_readings(saturation=0.912345)))
    assert found.evidence == {"saturation": "0.9123 (> 0.8)"}


def test_a_reading_not_taken_fires_nothing(rulebook: Rulebook) -> None:
    site = site_readings(forget_bias=None, forget_gate=None, level="unknown")
    assert findings_of(rulebook, measurement(site)) == ()


def test_error_when_raises_the_severity(own_book: Rulebook) -> None:
    found = {
        length: [f.severity for f in findings_of(own_book, measurement(site))]
        for length in (4, 5, 20)
        for site in [site_readings(effective_length=length)]
    }
    assert found == {4: ["error"], 5: ["warning"], 20: []}


def test_a_finding_of_the_audit_itself(rulebook: Rulebook) -> None:
    found = audit_finding(rulebook, "RG109", "one cell is lost.", location="model.py:3")
    assert (found.code, found.name, found.severity) == ("RG109", "cells-not-registered", "error")
    assert (found.path, found.location, found.message) == (None, "model.py:3", "one cell is lost.")
    with pytest.raises(RulesError):
        audit_finding(rulebook, "RG000", "nothing")


def test_warning_when_raises_an_info(own_book: Rulebook) -> None:
    (rule,) = own_book.rules
    fields = {"severity": "info", "warning_when": rule.error_when, "error_when": ()}
    book = own_book.model_copy(update={"rules": (rule.model_copy(update=fields),)})
    found = [findings_of(book, measurement(site_readings(effective_length=n))) for n in (10, 4)]
    assert [finding.severity for (finding,) in found] == ["info", "warning"]


def test_a_finding_stands_where_its_reading_was_made(own_book: Rulebook) -> None:
    sites = [
        site_readings(effective_length=10),
        site_readings(effective_length=10, places={"effective_length": "model.py:31"}),
        site_readings(effective_length=10, places={"readout": "model.py:40"}),
    ]
    found = [findings_of(own_book, measurement(site)) for site in sites]
    places = [finding.location for (finding,) in found]
    assert places == ["model.py:18", "model.py:31", "model.py:18"]
