"""Whether a remedy did what it was chosen for, judged by measuring again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rnnguard.decision.diagnosis import EXPANSIVE_OVER_WINDOW, FADED, GROWTH_LIMIT
from rnnguard.measurements import SiteReadings
from rnnguard.records import Tier

Aim = Literal["health", "growth", "input", "output", "depth"]

# Half a decade of retention is beyond the spread of the estimate over directions.
NOTICEABLE = 0.5
# Below it nothing calls for a change of depth: the bound of RG404 and of its scenario.
UNEVEN = 1e3


@dataclass(frozen=True)
class Verdict:
    """Kept or not, and the sentence with the figures that say so."""

    kept: bool
    sentence: str


def distance_from_health(site: SiteReadings) -> float:
    """Decades between the site and the healthy band, growth included; 0 is healthy."""
    fade = 0.0
    if site.retention_at_memory is not None:
        fade = max(0.0, FADED - site.retention_at_memory)
    return fade + _growth(site)


def wanting(aim: Aim | None, site: SiteReadings) -> bool:
    """Whether the reading that a remedy aims at leaves anything to do."""
    if aim == "health":
        return distance_from_health(site) > 0
    return aim != "depth" or (site.layer_ratio or 1.0) > UNEVEN


def _growth(site: SiteReadings) -> float:
    """Decades of growth beyond the limits; a rescale may trade them for fading, cured next."""
    excess = max(0.0, math.log10(max(site.growth, 1e-300)) - math.log10(GROWTH_LIMIT))
    over = max(0.0, site.growth_over_window - EXPANSIVE_OVER_WINDOW) if site.expansive else 0.0
    return excess + over / math.log(10)


def verify(
    aim: Aim | None, before: SiteReadings, after: SiteReadings, tier: Tier = "values"
) -> Verdict:
    """Compares the reading that the remedy aims at; health must never be lost for another aim.

    A change of structure is for good, so it must lead to health or half of the way there.
    Without an aim, for what was asked for and no probe can judge, that is all there is to hold.
    """
    lost = distance_from_health(after) - distance_from_health(before)
    if aim is None:
        return Verdict(lost < NOTICEABLE, _health_sentence(before, after))
    if aim == "health":
        healthy = lost < 0 and distance_from_health(after) == 0
        least = distance_from_health(before) / 2 if tier == "structure" else 0.0
        enough = -lost >= max(NOTICEABLE, least) or healthy
        # Nothing may be cured of fading by making it explode.
        kept = enough and _growth(after) <= _growth(before)
        return Verdict(kept, _health_sentence(before, after))
    if aim == "growth":
        return Verdict(_growth(after) < _growth(before), _health_sentence(before, after))
    name, read = _READINGS[aim]
    was, now = read(before), read(after)
    nearer = abs(math.log10(max(now, 1e-30))) < abs(math.log10(max(was, 1e-30)))
    kept = nearer and lost < NOTICEABLE
    sentence = f"{name} {was:.3g} -> {now:.3g}; {_health_sentence(before, after)}"
    return Verdict(kept, sentence)


def spared(before: SiteReadings, after: SiteReadings) -> bool:
    """Whether a change aimed at another site has cost this one no health."""
    was = distance_from_health(before)
    return distance_from_health(after) <= was + (NOTICEABLE if was else 0.0)


_READINGS: dict[Aim, tuple[str, Callable[[SiteReadings], float]]] = {
    "input": ("input drive", lambda site: site.input_drive or 0.0),
    "output": ("output rms", lambda site: site.output_rms or 0.0),
    "depth": ("ratio of the layers' gradients", lambda site: site.layer_ratio or 1.0),
}


def _health_sentence(before: SiteReadings, after: SiteReadings) -> str:
    parts = [f"decay per step {before.decay_per_step:.3f} -> {after.decay_per_step:.3f}"]
    if before.retention_at_memory is not None and after.retention_at_memory is not None:
        was, now = _log(before.retention_at_memory), _log(after.retention_at_memory)
        parts.append(f"log10 R({before.memory_needed}) {was} -> {now}")
    if max(before.growth, after.growth) > GROWTH_LIMIT:
        parts.append(f"max R {before.growth:.3g} -> {after.growth:.3g}")
    return ", ".join(parts)


def _log(log10: float) -> str:
    return "-inf" if log10 < -1000 else f"{log10:.2f}"
