"""The forward reach as a share of the memory needed."""

from __future__ import annotations

import pytest
from factories import site_readings

from rnnguard.probe.reach import reach_share


@pytest.mark.parametrize("source", ["declared", "estimated"])
def test_the_share(source: str) -> None:
    site = site_readings(memory_needed=40, forward_reach=10, memory_source=source)
    assert reach_share(site) == 0.25


@pytest.mark.parametrize(
    "fields",
    [
        {"memory_source": "assumed"},
        {"memory_source": "unknown", "memory_needed": None},
        {"forward_reach": None},
        {"memory_needed": 0},
    ],
)
def test_what_is_not_known_has_none(fields: dict[str, object]) -> None:
    known: dict[str, object] = {"memory_needed": 40, "forward_reach": 10}
    assert reach_share(site_readings(**known | fields)) is None
