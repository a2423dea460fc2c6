"""Events of training steps, made by hand, and what they mean."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rnnguard.probe.step_events import Event
from rnnguard.probe.step_readings import segments_of, step_readings


def events(*calls: str) -> list[Event]:
    """One string per call of the training step, one letter per event.

    z: clear, b: backward, B: one that retains its graph, g: autograd.grad, c: clip to 1,
    C: one of another optimizer's gradients, 0: clip to nothing, x: the gradients are taken away
    without a call, s: step.
    """
    found: list[Event] = []
    norm = 0.0
    kinds: dict[str, Any] = {"z": "clear", "b": "backward", "g": "grad", "c": "clip", "s": "step",
                             "0": "clip"}  # fmt: skip
    for number, letters in enumerate(calls):
        for position, letter in enumerate(letters):
            if letter == "x":
                norm = 0.0
                continue
            event = Event(kinds[letter.lower()], number, f"step.py:{position}", norm)
            norm = {"z": 0.0, "0": 0.0, "b": norm + 3.0, "c": min(norm, 1.0)}.get(
                letter.lower(), norm
            )
            event.after, event.retained, event.taken = norm, letter == "B", letter == "s"
            if event.kind == "clip":
                event.touched, event.threshold = letter != "C", 0.0 if letter == "0" else 1.0
                event.size = event.before
            found.append(event)
    return found


def readings(*calls: str) -> dict[str, Any]:
    return step_readings(events(*calls), half=False, scaled=False)


@pytest.mark.parametrize(
    ("calls", "order"),
    [
        (("zbs", "zbs"), "none"),
        (("zbCs", "zbCs"), "none"),
        (("zbcs", "zbcs"), "sound"),
        (("zbcbcs",), "sound"),
        (("zbcbs",), "sound"),
        (("bcsz", "bcsz"), "sound"),
        (("zb", "b", "bcs", "zb", "b", "bcs"), "sound"),
        (("zbsc", "zbsc"), "after the step"),
        (("zbsc",), "after the step"),
        (("bscz", "bscz"), "after the step"),
        (("zbszc", "bszc"), "before backward"),
        (("zcbs", "zcbs"), "before backward"),
        (("czbs", "czbs"), "before backward"),
        (("zbcsc", "zbcsc"), "sound"),
        (("cszb", "cszb", "cszb"), "sound"),
    ],
)
def test_the_order_of_the_clip(calls: tuple[str, ...], order: str) -> None:
    assert readings(*calls)["clip_order"] == order


@pytest.mark.parametrize(
    ("calls", "retained"),
    [
        (("zBs", "zBs"), True),
        (("zBsBs",), True),
        (("zbBs",), True),
        (("zBbs",), False),
        (("zBs", "zbs"), False),
        (("zBgs",), False),
        (("zBsb",), False),
        (("zbs",), False),
    ],
)
def test_a_retained_graph(calls: tuple[str, ...], retained: bool) -> None:
    assert readings(*calls)["graph_retained"] is retained


@pytest.mark.parametrize(
    ("calls", "piled", "wiped"),
    [
        (("zbs", "zbs"), False, False),
        (("bs", "bs"), True, False),
        (("bs",), False, False),
        (("bsc", "bsc"), True, False),
        (("bs", "bsz", "bs"), False, False),
        (("bs", "bzbs"), False, False),
        (("bzs", "bzs"), False, True),
        (("bzs", "zbs"), False, False),
        (("bxs", "bxs"), False, True),
        (("bcxs", "bcxs"), False, True),
        (("zb0s", "zb0s"), False, False),
        (("zs", "zs"), False, False),
    ],
)
def test_clearing(calls: tuple[str, ...], piled: bool, wiped: bool) -> None:
    found = readings(*calls)
    assert (found["never_cleared"], found["cleared_before_step"]) == (piled, wiped)


def test_the_place_where_gradients_are_taken_away_without_a_call() -> None:
    places = readings("bxs", "bxs")["places"]
    assert places["cleared_before_step"] == "step.py:2"


def test_gradients_that_are_no_number_are_not_cleared() -> None:
    seen = events("bzs", "bzs")
    for event in seen:
        event.before = math.nan if event.kind == "step" else event.before
    assert step_readings(seen, half=False, scaled=False)["cleared_before_step"] is False


def test_no_step_tells_nothing() -> None:
    assert step_readings(events("zbc"), half=True, scaled=False) == {}
    assert segments_of([]) == []


@pytest.mark.parametrize(("size", "use"), [(5.0, "sound"), (11.0, "always"), (0.009, "never"),
                                          (math.nan, "none"), (0.0, "none")])  # fmt: skip
def test_the_use_of_the_clip(size: float, use: str) -> None:
    seen = events("zbcs", "zbcs")
    for event in seen:
        event.size = size
    assert step_readings(seen, half=False, scaled=False)["clip_use"] == use


def test_one_step_is_too_few_to_say_always() -> None:
    seen = events("zbcs")
    seen[2].size = 1e3
    assert step_readings(seen, half=False, scaled=False)["clip_use"] == "sound"


@pytest.mark.parametrize(("half", "scaled", "told"), [(True, False, True), (True, True, False),
                                                      (False, False, False)])  # fmt: skip
def test_half_precision(half: bool, scaled: bool, told: bool) -> None:
    seen = events("zbs", "zbs")
    assert step_readings(seen, half=half, scaled=scaled)["fp16_unscaled"] is told


@pytest.mark.parametrize(("scale", "unscaled"), [(1024.0, False), (2.0, True)])
def test_a_loss_scaled_by_hand_under_a_clip(scale: float, unscaled: bool) -> None:
    seen = events("zbcs", "zbcs")
    for event in seen:
        event.after *= scale if event.kind == "backward" else 1.0
    assert step_readings(seen, half=True, scaled=False)["fp16_unscaled"] is unscaled


@pytest.mark.parametrize(("unit", "met", "told"), [(1024.0, 3.0, True), (1.0, 3.0, False),
                                                   (1024.0, 3.0 / 1024, False)])  # fmt: skip
def test_a_clip_of_scaled_gradients(unit: float, met: float, told: bool) -> None:
    seen = events("zbcs", "zbcs")
    for event in seen:
        if event.kind == "clip":
            event.unit, event.before = unit, met
    found = step_readings(seen, half=False, scaled=True)
    assert found["clip_scaled"] is told and ("clip_scaled" in found["places"]) is told
