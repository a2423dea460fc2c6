"""Every policy by name; names are for ever, since the results cite them."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.outcomes import guarded
from benchmarks.outcomes.autotrainer import autotrainer
from benchmarks.outcomes.clippers import agc, autoclip, zclip
from benchmarks.outcomes.policies import Policy, clipped, nothing
from benchmarks.outcomes.rate_finder import found_rate_and_clip
from benchmarks.outcomes.recipes import at_random, blind
from benchmarks.outcomes.starts import chrono_and_clip

NOTHING = "nothing"
POLICIES: dict[str, Policy] = {
    NOTHING: nothing,
    "clip": clipped,
    "blind recipe": blind,
    "chrono": chrono_and_clip,
    "zclip": zclip,
    "agc": agc,
    "autoclip": autoclip,
    "rate finder": found_rate_and_clip,
    "autotrainer": autotrainer,
    "random recipe": at_random,
    "rnnguard probe": guarded.probed,
    "rnnguard trial": guarded.tried,
}
DECLARED: dict[str, Policy] = {
    "rnnguard probe with memory": guarded.probed_for_memory,
    "rnnguard trial with memory": guarded.tried_for_memory,
}


def chosen(asked: str, names: Iterable[str]) -> list[str]:
    """The names that equal an asked word, or hold it where none equals it; all for no word."""
    names = list(names)
    found: dict[str, None] = {}
    for word in filter(None, asked.split(",")):
        exact = [name for name in names if name == word]
        held = exact or [name for name in names if word in name]
        if not held:
            raise SystemExit(f"{word!r} is none of: {', '.join(names)}")
        found |= dict.fromkeys(held)
    return list(found) if asked else names
