"""Which changes are kept after measuring again, and which are taken back."""

from __future__ import annotations

import math
from typing import Any

import pytest
from factories import site_readings

from rnnguard.decision.verification import (
    NOTICEABLE,
    UNEVEN,
    Aim,
    distance_from_health,
    spared,
    verify,
    wanting,
)

FADED = math.log10(0.05)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"retention_at_memory": FADED}, 0.0),
        ({"retention_at_memory": 1.0}, 0.0),
        ({"retention_at_memory": FADED - 2}, 2.0),
        ({"retention_at_memory": None}, 0.0),
        ({"growth": 100.0}, 0.0),
        ({"growth": 1e5}, 3.0),
        ({"growth": 0.0}, 0.0),
        ({"expansive": True, "growth_over_window": math.log(300)}, 2.0),
        ({"expansive": False, "growth_over_window": math.log(300)}, 0.0),
        ({"expansive": True, "growth_over_window": math.log(3)}, 0.0),
        ({"growth": 1e3, "retention_at_memory": FADED - 1}, 2.0),
    ],
)
def test_distance_from_health(fields: dict[str, Any], expected: float) -> None:
    assert distance_from_health(site_readings(**fields)) == pytest.approx(expected)


SICK = {"retention_at_memory": -9.0, "decay_per_step": 0.63}
WILD = {"growth": 1e6, "expansive": True, "growth_over_window": math.log(3e4)}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (SICK, {"retention_at_memory": -0.5}, True),
        (SICK, {"retention_at_memory": -9.0 + NOTICEABLE + 1e-9}, True),
        (SICK, {"retention_at_memory": -9.0 + NOTICEABLE - 1e-6}, False),
        (SICK, SICK, False),
        (SICK, {"retention_at_memory": -12.0}, False),
        ({"retention_at_memory": FADED - 0.1}, {"retention_at_memory": FADED + 0.01}, True),
        ({"retention_at_memory": FADED - 0.1}, {"retention_at_memory": FADED - 0.05}, False),
        (SICK, {"retention_at_memory": 0.0, "growth": 1e3}, False),
        (SICK, {"retention_at_memory": -4.0, **WILD}, False),
        (WILD, {}, True),
        ({}, {}, False),
        ({}, SICK, False),
    ],
)
def test_what_aims_at_health(before: dict[str, Any], after: dict[str, Any], kept: bool) -> None:
    assert verify("health", site_readings(**before), site_readings(**after)).kept is kept


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (WILD, {}, True),
        (WILD, SICK, True),
        (WILD, WILD, False),
        (WILD, {**WILD, "growth": 1e5}, True),
        ({}, {}, False),
    ],
)
def test_what_aims_at_growth(before: dict[str, Any], after: dict[str, Any], kept: bool) -> None:
    """Fading may take the place of growth, since it is cured next."""
    assert verify("growth", site_readings(**before), site_readings(**after)).kept is kept


@pytest.mark.parametrize(("aim", "reading"), [("input", "input_drive"), ("output", "output_rms")])
@pytest.mark.parametrize(
    ("was", "now", "other", "kept"),
    [
        (40.0, 1.1, {}, True),
        (1e-4, 0.9, {}, True),
        (40.0, 0.02, {}, False),
        (40.0, 39.0, {}, True),
        (1.0, 2.0, {}, False),
        (40.0, 1.1, SICK, False),
    ],
)
def test_what_aims_at_scale(
    aim: Any, reading: str, was: float, now: float, other: dict[str, Any], kept: bool
) -> None:
    """Nearer to one on a log scale, and no health lost for it."""
    before = site_readings(**{reading: was})
    after = site_readings(**{reading: now, **other})
    assert verify(aim, before, after).kept is kept


def test_the_sentence_has_the_figures() -> None:
    after = site_readings(retention_at_memory=-0.5, decay_per_step=0.991, output_rms=0.8)
    before = site_readings(**SICK, output_rms=0.001)
    assert verify("health", before, after).sentence == (
        "decay per step 0.630 -> 0.991, log10 R(100) -9.00 -> -0.50"
    )
    assert verify("output", before, after).sentence == (
        "output rms 0.001 -> 0.8; decay per step 0.630 -> 0.991, log10 R(100) -9.00 -> -0.50"
    )


def test_the_sentence_tells_growth_only_where_it_matters() -> None:
    calm = site_readings(retention_at_memory=None, memory_needed=None)
    wild = calm.model_copy(update=WILD)
    assert verify("growth", wild, calm).sentence == (
        "decay per step 0.990 -> 0.990, max R 1e+06 -> 1"
    )
    assert verify("growth", calm, calm).sentence == "decay per step 0.990 -> 0.990"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, True),
        ({}, {"retention_at_memory": FADED - 1e-3}, False),
        (SICK, {"retention_at_memory": -9.0 - NOTICEABLE + 1e-6}, True),
        (SICK, {"retention_at_memory": -9.0 - NOTICEABLE - 1e-6}, False),
        (SICK, {"retention_at_memory": -0.5}, True),
        ({}, WILD, False),
    ],
)
def test_a_site_beside_the_one_aimed_at_keeps_its_health(
    before: dict[str, Any], after: dict[str, Any], expected: bool
) -> None:
    assert spared(site_readings(**before), site_readings(**after)) is expected


@pytest.mark.parametrize(
    ("now", "kept"),
    [(FADED, True), (FADED - 3.9, True), (FADED - 4.1, False), (FADED - 8.1, False)],
)
def test_structure_must_lead_half_of_the_way(now: float, kept: bool) -> None:
    before = site_readings(retention_at_memory=FADED - 8)
    after = site_readings(retention_at_memory=now)
    assert verify("health", before, after, "structure").kept is kept
    assert verify("health", before, after, "values").kept is (now > FADED - 8)


def test_structure_that_heals_the_last_bit_is_kept() -> None:
    before, after = (site_readings(retention_at_memory=FADED + x) for x in (-0.1, 0.1))
    assert verify("health", before, after, "structure").kept


@pytest.mark.parametrize(
    ("was", "now", "other", "kept"),
    [
        (1e5, 3.0, {}, True),
        (1e5, 1e4, {}, True),
        (1e5, 2e5, {}, False),
        (1e5, None, {}, True),
        (1e5, 3.0, SICK, False),
    ],
)
def test_what_aims_at_depth(
    was: float, now: float | None, other: dict[str, Any], kept: bool
) -> None:
    before, after = site_readings(layer_ratio=was), site_readings(layer_ratio=now, **other)
    verdict = verify("depth", before, after)
    assert verdict.kept is kept and "ratio of the layers" in verdict.sentence


@pytest.mark.parametrize(("after", "kept"), [({}, True), (SICK, False), (WILD, False)])
def test_without_an_aim_it_may_only_not_harm(after: dict[str, Any], kept: bool) -> None:
    assert verify(None, site_readings(), site_readings(**after)).kept is kept


@pytest.mark.parametrize(
    ("aim", "fields", "expected"),
    [
        ("health", {}, False),
        ("health", SICK, True),
        ("depth", {"layer_ratio": UNEVEN}, False),
        ("depth", {"layer_ratio": None}, False),
        ("depth", {"layer_ratio": 2 * UNEVEN}, True),
        ("output", {}, True),
        (None, {}, True),
    ],
)
def test_what_leaves_something_to_do(
    aim: Aim | None, fields: dict[str, Any], expected: bool
) -> None:
    assert wanting(aim, site_readings(**fields)) is expected
