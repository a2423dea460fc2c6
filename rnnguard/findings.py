"""Which rules are in force, and what of their findings the user is to hear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from rnnguard.decision.diagnosis import findings_of
from rnnguard.decision.planning import advised, matching
from rnnguard.decision.rulebook import Rulebook, Scenario, load_rulebook
from rnnguard.decision.selection import Selected, selected
from rnnguard.decision.settings import Settings
from rnnguard.inspection.comments import comments_of
from rnnguard.probe.measurement import Look
from rnnguard.records import Finding
from rnnguard.replay import REMEDY
from rnnguard.report.notes import audit_findings

Rules = Sequence[str | Path | Settings] | str | Path | Settings | None


def rulebook_of(rules: Rules) -> Rulebook:
    """The built-in rules with those given on top; RulesError for what is wrong in them."""
    if rules is None or isinstance(rules, str | Path | Settings):
        rules = [] if rules is None else [rules]
    rulebook = load_rulebook(rules)
    rulebook.check_remedies(list(REMEDY))
    return rulebook


def findings_told(
    rulebook: Rulebook, model: nn.Module, before: Look, after: Look | None = None
) -> Selected:
    """The findings of the looks, without what settings and the user's comments leave out."""
    found = [_findings(rulebook, look) for look in (before, after or before)]
    sites = [site.record for site in before.sites]
    comments = comments_of(model, sites, [f.location for both in found for f in both])
    return selected(rulebook, comments, found[0], before.measurement, found[1])


def advice(
    rulebook: Rulebook, told: Sequence[Finding], before: Look, after: Look | None = None
) -> Iterator[str]:
    """What the scenarios that match say to do by hand, for each site and for the run.

    Those of structure and output are matched on what the changes have left. What a finding
    `told` already says to do is left out.
    """
    newest = (after or before).measurement
    for scope in ("recurrence", "input", "structure", "output", "run"):
        look = newest if scope in ("structure", "output") else before.measurement
        for site in (None,) if scope == "run" else look.sites:
            row = matching(rulebook, scope, site, look.run)
            if row is None or not row.advice or _is_told(row, told):
                continue
            where = "" if site is None else f" for `{site.label}`"
            yield f"Advice{where}: {advised(row, site, look.run)}"


def _is_told(row: Scenario, told: Sequence[Finding]) -> bool:
    return any(finding.fix == "manual" and finding.code in row.codes for finding in told)


def _findings(rulebook: Rulebook, look: Look) -> tuple[Finding, ...]:
    return findings_of(rulebook, look.measurement, audit_findings(rulebook, look))
