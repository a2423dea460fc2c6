"""From readings to ordered changes: the first matching scenario of each scope, with doses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from rnnguard.decision.conditions import vocabulary_values
from rnnguard.decision.rulebook import FORM, Rulebook, Scenario
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Change, Dose, Tier

# In this order: structure is for what values have not cured.
SITE_SCOPES = ("recurrence", "input", "structure", "depth", "output")


class Prescriber(Protocol):
    """What planning needs to know of a remedy."""

    @property
    def name(self) -> str: ...
    @property
    def tier(self) -> Tier: ...
    def prescribe(self, wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
        """The final dose, or None when the readings show nothing left to do."""


def matching(
    rulebook: Rulebook, scope: str, site: SiteReadings | None, run: RunReadings
) -> Scenario | None:
    """The row of the scope whose cells all hold; of several the one that comes first."""
    values = vocabulary_values(site, run)
    rows = (row for row in rulebook.ranked(scope) if row.when.holds(values))
    return next(rows, None)


def reason(row: Scenario, site: SiteReadings | None, run: RunReadings) -> str:
    """Why the row speaks for these readings: its own words, then cell by cell."""
    values = vocabulary_values(site, run)
    because = row.why.format_map(values)
    return f"{because} Matched {row.id} because {row.when.explain(values)}."


def advised(row: Scenario, site: SiteReadings | None, run: RunReadings) -> str:
    """What the row says to do by hand, in its own words; nothing for most rows."""
    return row.advice.format_map(vocabulary_values(site, run))


def prescribed(
    row: Scenario, why: str, remedy: Prescriber, site: SiteReadings | None, run: RunReadings
) -> Change | None:
    """One remedy of the row as a change, its dose computed from these readings."""
    values = vocabulary_values(site, run)
    dose = remedy.prescribe(_wanted(row, remedy.name, values), site, run)
    if dose is None:
        return None
    path = None if site is None else site.path
    return Change(
        remedy=remedy.name, path=path, tier=remedy.tier, dose=dose, scenario=row.id, why=why
    )


def allowed(
    row: Scenario, remedies: Mapping[str, Prescriber], tiers: Iterable[Tier]
) -> list[Prescriber]:
    """The row's remedies in its order, without those of tiers that may not act."""
    permitted = set(tiers)
    return [remedies[name] for name in row.apply if remedies[name].tier in permitted]


def _wanted(row: Scenario, remedy: str, values: Mapping[str, Any]) -> Dose:
    """The row's dose with the names of readings replaced by what was read."""
    asked = row.dose.get(remedy, {})
    named = {key for key, value in asked.items() if isinstance(value, str) and key != FORM}
    return {key: values[str(v)] if key in named else v for key, v in asked.items()}
