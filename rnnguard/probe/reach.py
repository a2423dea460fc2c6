"""How much of the memory needed a line reads out of the present state."""

from __future__ import annotations

from rnnguard.measurements import SiteReadings


def reach_share(site: SiteReadings) -> float | None:
    """`forward_reach` over the memory needed; None where the one or the other is not known."""
    known = site.memory_source in ("declared", "estimated")
    if not known or not site.memory_needed or site.forward_reach is None:
        return None
    return site.forward_reach / site.memory_needed
