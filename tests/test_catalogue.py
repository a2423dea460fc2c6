"""Every rule fires on its example, on nothing else, and is quiet on the healthy twin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from docs.catalogue import audited
from rnnguard.decision.rulebook import Rule, load_rulebook
from rnnguard.inspection.kernel_layout import refuses_backward
from rnnguard.probe import usage
from rnnguard.report.report import Report

BOOK = load_rulebook()
# About the audit itself, or raised while the user trains: no model is their example.
WITHOUT_EXAMPLE = {"RG001", "RG002", "RG003", "RG004", "RG005", "RG413"}
# The mistakes that people are known to make; what has come since stands beside them.
KNOWN_MISTAKES = {
    *("RG101", "RG102", "RG104", "RG105", "RG106", "RG107", "RG108", "RG109", "RG110"),
    *("RG201", "RG202", "RG203", "RG205", "RG206", "RG207", "RG301", "RG302", "RG303", "RG304"),
    *("RG401", "RG402", "RG403", "RG404", "RG405"),
    *("RG501", "RG502", "RG503", "RG504", "RG505", "RG506", "RG509", "RG510"),
    *("RG601", "RG602", "RG605"),
}
RULES = [rule for rule in BOOK.rules if rule.stage != "refusal"]
every_rule = pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule.example], ids=lambda rule: rule.code
)


def loud(report: Report) -> set[str]:
    return {finding.code for finding in report.remaining if finding.severity != "info"}


@pytest.fixture(autouse=True)
def _as_if_on_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule is about a kernel of CUDA's; only where the weights lie is feigned for it."""
    rule = getattr(request.node, "callspec", None) and request.node.callspec.params["rule"]
    if rule and rule.code == "RG605" and not torch.cuda.is_available():
        monkeypatch.setattr(usage, "refuses_backward", lambda m, _: refuses_backward(m, "cuda"))


@every_rule
def test_the_example_has_this_finding_and_no_other(rule: Rule, tmp_path: Path) -> None:
    report = audited(rule, "example", tmp_path)
    assert rule.code in {finding.code for finding in report.remaining}
    assert loud(report) <= {rule.code}


@every_rule
def test_the_healthy_twin_is_quiet(rule: Rule, tmp_path: Path) -> None:
    report = audited(rule, "twin", tmp_path)
    assert loud(report) == set()
    assert rule.code not in {finding.code for finding in report.remaining}


def test_every_rule_explains_itself() -> None:
    for rule in RULES:
        assert rule.how.endswith("."), rule.code
        assert bool(rule.example) == bool(rule.twin), rule.code
        assert bool(rule.example) == (rule.code not in WITHOUT_EXAMPLE), rule.code
        assert rule.refs or rule.code in WITHOUT_EXAMPLE, f"{rule.code} cites nothing"


def test_every_known_mistake_has_a_rule_with_an_example() -> None:
    shown = {rule.code for rule in RULES if rule.example}
    assert len(KNOWN_MISTAKES) == 35 and shown >= KNOWN_MISTAKES
