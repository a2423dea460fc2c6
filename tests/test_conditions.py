"""Cells of the decision tables: what they allow, how they explain, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from factories import run_readings, site_readings
from pydantic import ValidationError

from rnnguard.decision.conditions import (
    RUN_VOCABULARY,
    SITE_VOCABULARY,
    TEXTS,
    Interval,
    OneOf,
    When,
    display,
    parse_cell,
    vocabulary_values,
)


@pytest.mark.parametrize(
    ("cell", "inside", "outside", "text"),
    [
        ("< 0.9", [0.89, -1.0], [0.9, 1.0], "< 0.9"),
        ("<= 0.9", [0.9], [0.91], "<= 0.9"),
        ("> 3", [3.01], [3.0, 2.0], "> 3"),
        (">= 3", [3, 1e9], [2.99], ">= 3"),
        ("0.1..0.9", [0.1, 0.5, 0.9], [0.09, 0.91], "0.1..0.9"),
        ("-2 .. -1e-3", [-1.0], [0.0], "-2..-0.001"),
        ("<.5", [0.4], [0.5], "< 0.5"),
        (" > 1E2 ", [101], [100], "> 100"),
        (7, [7, 7.0], [6, 8], "= 7"),
        (0.25, [0.25], [0.26], "= 0.25"),
    ],
)
def test_intervals(cell: Any, inside: list[float], outside: list[float], text: str) -> None:
    found = parse_cell("decay_per_step", cell)
    assert isinstance(found, Interval)
    assert all(found.holds(value) for value in inside)
    assert not any(found.holds(value) for value in outside)
    assert str(found) == text


@pytest.mark.parametrize(
    ("name", "cell", "values", "text"),
    [
        ("cell", "lstm", {"lstm"}, "= lstm"),
        ("cell", ["lstm", "gru"], {"lstm", "gru"}, "= gru or lstm"),
        ("bidirectional", True, {True}, "= True"),
        ("level", "at risk: fading", {"at risk: fading"}, "= at risk: fading"),
    ],
)
def test_labels(name: str, cell: Any, values: set[Any], text: str) -> None:
    found = parse_cell(name, cell)
    assert found == OneOf(values=frozenset(values))
    assert str(found) == text
    assert found.holds(next(iter(values)))
    assert not found.holds("something else")


BAD_NUMBER = "write a number, '< 0.9', '>= 3' or '0.1..0.9'"


@pytest.mark.parametrize(
    ("name", "cell", "message"),
    [
        (
            "decay_per_stp",
            "< 1",
            "'decay_per_stp' is not a reading; did you mean 'decay_per_step'?",
        ),
        ("decay_per_step", "=< 1", BAD_NUMBER),
        ("decay_per_step", "one", BAD_NUMBER),
        ("decay_per_step", True, BAD_NUMBER),
        ("decay_per_step", ["< 1"], BAD_NUMBER),
        ("decay_per_step", "< 1 or > 2", BAD_NUMBER),
        (
            "cell",
            "lstmm",
            "'lstmm' is not a value of reading 'cell'; "
            "expected rnn_tanh, rnn_relu, lstm, gru, custom",
        ),
        (
            "bidirectional",
            "yes",
            "'yes' is not a value of reading 'bidirectional'; expected True, False",
        ),
        (
            "bidirectional",
            1,
            "1 is not a value of reading 'bidirectional'; expected True, False",
        ),
    ],
)
def test_a_wrong_cell_says_so(name: str, cell: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_cell(name, cell)
    assert str(caught.value) == message


def test_a_name_far_from_all_lists_them() -> None:
    with pytest.raises(ValueError, match=r"'qqq' is not a reading; known: 'amsgrad', 'basis', "):
        parse_cell("qqq", 1)


def test_a_row_that_is_no_table() -> None:
    with pytest.raises(ValidationError, match=r"write a table such as \{ cell = \['lstm'\]"):
        When.model_validate("cell = lstm")


def test_every_scalar_reading_is_a_word_and_nothing_else() -> None:
    assert {"exponents", "retention", "layer_readings", "path", "location"}.isdisjoint(
        SITE_VOCABULARY
    )
    assert {"cell", "memory_needed", "forget_bias", "silent_input", "level"} <= set(SITE_VOCABULARY)
    assert {"optimizer", "nonfinite", "batches_per_epoch", "precision"} <= set(RUN_VOCABULARY)
    assert "torch" not in RUN_VOCABULARY
    assert set(SITE_VOCABULARY).isdisjoint(RUN_VOCABULARY)


def when(**cells: Any) -> When:
    return When.model_validate(cells)


def test_a_row_holds_when_every_cell_does() -> None:
    row = when(cell="lstm", decay_per_step="< 0.9")
    assert row.holds({"cell": "lstm", "decay_per_step": 0.5})
    assert not row.holds({"cell": "gru", "decay_per_step": 0.5})
    assert not row.holds({"cell": "lstm", "decay_per_step": 0.9})
    assert when().holds({})


@pytest.mark.parametrize("cells", [{"memory_needed": "<= 10"}, {"memory_needed": "> 10"}])
def test_a_reading_not_taken_never_holds(cells: dict[str, Any]) -> None:
    assert not when(**cells).holds({"memory_needed": None})
    assert not when(**cells).holds({})


def test_a_row_concerns_a_site_when_one_cell_does() -> None:
    assert when(cell="lstm").concerns_site
    assert when(optimizer="adam", cell="lstm").concerns_site
    assert not when(optimizer="adam").concerns_site


def test_the_explanation_follows_the_readings_not_the_file() -> None:
    row = when(nonfinite=False, decay_per_step="< 0.9", cell=["gru", "lstm"])
    values = {"cell": "lstm", "decay_per_step": 0.6312345, "nonfinite": False}
    assert row.explain(values) == "cell = lstm, decay_per_step 0.6312 (< 0.9), nonfinite = False"
    assert list(row.evidence(values)) == ["cell", "decay_per_step", "nonfinite"]


def test_what_is_shown_of_a_reading() -> None:
    assert [display(v) for v in (1e-7, 12345.678, 3, True, None, "lstm")] == [
        "1e-07",
        "1.235e+04",
        "3",
        "True",
        "None",
        "lstm",
    ]


def test_the_values_come_from_both_records() -> None:
    values = vocabulary_values(site_readings(), run_readings())
    assert (values["cell"], values["optimizer"]) == ("lstm", "adam")
    assert set(values) == {*SITE_VOCABULARY, *RUN_VOCABULARY, *TEXTS}
    assert set(vocabulary_values(None, run_readings())) - TEXTS == set(RUN_VOCABULARY)


def test_a_text_can_be_told_but_not_compared() -> None:
    assert "idle_names" in TEXTS
    with pytest.raises(ValueError, match="'idle_names' is text, which only a message may name"):
        parse_cell("idle_names", "lstm")
