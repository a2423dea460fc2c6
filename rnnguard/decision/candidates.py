"""Which combinations a trial compares: what the probe chose, its parts, and the rows' rivals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rnnguard.decision.planning import (
    SITE_SCOPES,
    Prescriber,
    allowed,
    matching,
    prescribed,
)
from rnnguard.decision.rulebook import Rulebook, Scenario
from rnnguard.measurements import Measurement, SiteReadings
from rnnguard.records import Change, Tier

Changes = tuple[Change, ...]


def combinations(
    rulebook: Rulebook,
    measurement: Measurement,
    chosen: Sequence[Change],
    remedies: Mapping[str, Prescriber],
    tiers: Sequence[Tier],
    skip: frozenset[str],
) -> list[Changes]:
    """The sites' changes that are worth a trial, likeliest first; none of them is empty.

    `chosen`: what the probe has kept. Then come its values without its structure, and the rivals
    that the matching rows name, each at all sites whose row names it.
    """
    found: list[Changes] = [tuple(chosen)]
    found.append(tuple(change for change in chosen if change.tier == "values"))
    rows = list(_matched(rulebook, measurement, skip))
    for name in dict.fromkeys(rival for _, row in rows for rival in row.rivals):
        rival = rulebook.scenario(name)
        mine = [(site, row) for site, row in rows if name in row.rivals]
        replaced = {(site.path, row.id) for site, row in mine if row.scope == rival.scope}
        kept = [c for c in chosen if (c.path, c.scenario) not in replaced]
        added = [
            change
            for site, row in mine
            for change in _prescriptions(rival, row, site, measurement, remedies, tiers)
        ]
        if added:
            found.append((*kept, *added))
    distinct = {_key(changes): changes for changes in reversed(found) if changes}
    return list(reversed(distinct.values()))


def _matched(
    rulebook: Rulebook, measurement: Measurement, skip: frozenset[str]
) -> Iterator[tuple[SiteReadings, Scenario]]:
    for site in measurement.sites:
        if site.path in skip or site.trained:
            continue
        for scope in SITE_SCOPES:
            row = matching(rulebook, scope, site, measurement.run)
            if row is not None:
                yield site, row


def _prescriptions(
    rival: Scenario, row: Scenario, site: SiteReadings, measurement: Measurement,
    remedies: Mapping[str, Prescriber], tiers: Sequence[Tier],
) -> Iterator[Change]:  # fmt: skip
    """A rival's remedies at a site whose row is another, once each; only one of structure."""
    if site.memory_needed is None:
        # Nothing is needed for certain, and all there is may be.
        site = site.model_copy(update={"memory_needed": site.steps})
    why = f"A rival of {row.id}, which only training can tell from it."
    structured = False
    for name in dict.fromkeys(remedy.name for remedy in allowed(rival, remedies, tiers)):
        change = prescribed(rival, why, remedies[name], site, measurement.run)
        if change is None or (structured and change.tier == "structure"):
            continue
        structured |= change.tier == "structure"
        yield change


def _key(changes: Changes) -> tuple[tuple[str, str], ...]:
    """Which remedies act where; a rival of another dose is no other candidate."""
    return tuple(sorted({(change.remedy, change.path or "") for change in changes}))
