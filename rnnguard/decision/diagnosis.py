"""Health levels and findings, from readings and the rule table alone.

The thresholds are those of the health table, refitted where `benchmarks/diagnosis` says so:
spikes alone harm no training, a loss that has risen does, and R of 1e-5 is often overcome.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rnnguard.decision.conditions import When, vocabulary_values
from rnnguard.decision.rulebook import Rule, Rulebook
from rnnguard.measurements import Measurement, RunReadings, SiteReadings
from rnnguard.records import Finding, Level, Record, Severity

EXPLODING_OVER_WINDOW = math.log(100)
EXPANSIVE_OVER_WINDOW = math.log(3)
GROWTH_LIMIT = 100.0
RISEN = 0.2  # of the loss before the trial, the bound of RG412
RISKY_SPIKES = 0.01  # share of trial steps
VANISHED = -6.0  # log10 R
FADED = math.log10(5e-2)


def level_of(site: SiteReadings, run: RunReadings) -> Level:
    """The first row of the health table that the readings meet."""
    if run.nonfinite or run.nonfinite_steps or (run.loss_rise or 0.0) > RISEN:
        return "unstable"
    over_window = site.growth_over_window if site.expansive else 0.0
    if over_window > EXPLODING_OVER_WINDOW or site.growth > GROWTH_LIMIT:
        return "exploding"
    if over_window > EXPANSIVE_OVER_WINDOW or (run.spike_rate or 0.0) >= RISKY_SPIKES:
        return "at risk: expansive"
    if site.memory_needed is None or site.retention_at_memory is None:
        return "unknown"
    # Of a mere bound, or where another path leads around, nothing is known for certain.
    around = site.bypass or site.readout == "pooled"
    sure = site.memory_source in ("declared", "estimated") and not around
    if site.memory_needed > site.window:
        return "truncated" if sure else "at risk: fading"
    if site.retention_at_memory < FADED:
        return "vanishing" if sure and site.retention_at_memory < VANISHED else "at risk: fading"
    return "healthy"


def diagnose(measurement: Measurement) -> Measurement:
    """The same measurement with every site's level filled in."""
    run = measurement.run
    sites = tuple(
        site.model_copy(update={"level": level_of(site, run)}) for site in measurement.sites
    )
    return measurement.model_copy(update={"sites": sites})


def findings_of(
    rulebook: Rulebook, measurement: Measurement, seen: Iterable[Finding] = ()
) -> tuple[Finding, ...]:
    """Every measured rule that fires with what was `seen` beside, worst first.

    Implied findings are folded into their cause.
    """
    found = list(seen)
    for rule in rulebook.rules:
        if rule.when is None:
            continue
        if rule.when.concerns_site:
            found += _at_sites(rule, measurement)
        else:
            found += _fired(rule, rule.when, None, measurement.run)
    kept = [finding for finding in found if not _implied(finding, found, rulebook)]
    order = {"error": 0, "warning": 1, "info": 2}
    return tuple(sorted(kept, key=lambda f: (order[f.severity], f.path or "", f.code)))


def audit_finding(
    rulebook: Rulebook, code: str, message: str, *, location: str | None = None
) -> Finding:
    """A finding about the audit itself, or about what the inspection saw, by its code."""
    rule = rulebook.rule(code)
    return _finding(rule, rule.severity, None, location, message, {})


def _at_sites(rule: Rule, measurement: Measurement) -> list[Finding]:
    assert rule.when is not None
    return [
        finding
        for site in measurement.sites
        for finding in _fired(rule, rule.when, site, measurement.run)
    ]


def _fired(rule: Rule, when: When, site: SiteReadings | None, run: RunReadings) -> list[Finding]:
    values = vocabulary_values(*_records(site, run))
    if not when.holds(values):
        return []
    evidence = when.evidence(values)
    path, location = (site.path, site.location) if site is not None else (None, None)
    places = run.places | (site.places if site is not None else {})
    location = next((places[name] for name in when.cells if name in places), location)
    message = rule.message.format_map(values)
    return [_finding(rule, _severity(rule, values), path, location, message, evidence)]


def _severity(rule: Rule, values: dict[str, Any]) -> Severity:
    if any(when.holds(values) for when in rule.error_when):
        return "error"
    if any(when.holds(values) for when in rule.warning_when):
        return "warning"
    return rule.severity


def _records(site: SiteReadings | None, run: RunReadings) -> tuple[Record, ...]:
    return (run,) if site is None else (site, run)


def _finding(
    rule: Rule, severity: Severity, path: str | None, location: str | None, message: str,
    evidence: dict[str, str],
) -> Finding:  # fmt: skip
    return Finding(
        code=rule.code,
        name=rule.name,
        severity=severity,
        path=path,
        location=location,
        message=message,
        evidence=evidence,
        cure=rule.cure,
        fix=rule.fix,
        refs=rule.refs,
    )


def _implied(finding: Finding, found: list[Finding], rulebook: Rulebook) -> bool:
    """Whether a cause was found at the same site, or one of the two concerns the whole run."""
    causes = rulebook.rule(finding.code).implied_by
    return any(
        (other.path == finding.path or None in (other.path, finding.path))
        and (other.code in causes or other.name in causes)
        for other in found
    )
