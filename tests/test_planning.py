"""From readings to changes: which row wins, which remedies may act, which dose they get."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from factories import run_readings, site_readings

from rnnguard.decision.conditions import (
    RUN_VOCABULARY,
    SITE_VOCABULARY,
    TEXTS,
    VOCABULARY,
    vocabulary_values,
)
from rnnguard.decision.planning import SITE_SCOPES, allowed, matching, prescribed, reason
from rnnguard.decision.rulebook import Rulebook, Scenario, load_rulebook
from rnnguard.decision.tablecheck import reached
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import TIERS, Change, Dose, Record, Tier
from rnnguard.remedies import REMEDIES

BOOK = load_rulebook()
REMEDY = {remedy.name: remedy for remedy in REMEDIES}
CHOSEN = [row for row in BOOK.scenarios if not row.only_rival]
every_row = pytest.mark.parametrize("row", CHOSEN, ids=lambda row: row.id)


@dataclass(frozen=True)
class Cure:
    """A remedy that takes the dose it is asked for, or declines."""

    name: str
    tier: Tier = "values"
    declines: bool = False

    def prescribe(self, wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
        return None if self.declines else wanted


CURES = {c.name: c for c in (Cure("norm", "structure"), Cure("bias"), Cure("clip", "step"))}
ROWS = """
schema = 1
[[scenario]]
id = "long"
when = { cell = "lstm", memory_needed = "> 50" }
apply = ["norm", "bias", "clip"]
dose = { bias = { t_max = "memory_needed", gain = 1.5, cell = "cell" }, clip = { factor = 2.0 } }
why = "Over {memory_needed} steps."
refs = ["me"]

[[scenario]]
id = "any-lstm"
when = { cell = "lstm" }
apply = ["bias"]
why = "Any."
refs = ["me"]

[[scenario]]
id = "of-the-input"
scope = "input"
when = { cell = "lstm" }
apply = []
why = "Any."
refs = ["me"]
"""


@pytest.fixture
def book(tmp_path: Path) -> Rulebook:
    (tmp_path / "scenarios.toml").write_text(ROWS)
    built_in = {row.id for row in BOOK.scenarios}
    found = load_rulebook([tmp_path])
    own = tuple(row for row in found.scenarios if row.id not in built_in)
    return found.model_copy(update={"scenarios": own})


def row_named(book: Rulebook, name: str) -> Scenario:
    return next(row for row in book.scenarios if row.id == name)


def test_the_first_match_wins(book: Rulebook) -> None:
    long, short = site_readings(memory_needed=51), site_readings(memory_needed=50)
    found = [matching(book, "recurrence", site, run_readings()) for site in (long, short)]
    assert [row.id for row in found if row] == ["long", "any-lstm"]


def test_each_scope_has_its_own_match(book: Rulebook) -> None:
    site = site_readings()
    found = {scope: matching(book, scope, site, run_readings()) for scope in SITE_SCOPES}
    assert {s: row.id if row else None for s, row in found.items()} == {
        "recurrence": "long",
        "input": "of-the-input",
        "structure": None,
        "depth": None,
        "output": None,
    }


def test_nothing_matches(book: Rulebook) -> None:
    assert matching(book, "recurrence", site_readings(cell="gru"), run_readings()) is None
    assert matching(book, "run", None, run_readings()) is None


def test_the_reason_has_the_figures(book: Rulebook) -> None:
    assert reason(row_named(book, "long"), site_readings(), run_readings()) == (
        "Over 100 steps. Matched long because cell = lstm, memory_needed 100 (> 50)."
    )


def test_doses_come_from_the_readings(book: Rulebook) -> None:
    site = site_readings(path="encoder", memory_needed=77)
    row = row_named(book, "long")
    assert prescribed(row, "because", CURES["bias"], site, run_readings()) == Change(
        remedy="bias",
        path="encoder",
        tier="values",
        dose={"t_max": 77, "gain": 1.5, "cell": "lstm"},
        scenario="long",
        why="because",
    )
    clip = prescribed(row, "", CURES["clip"], None, run_readings())
    assert clip is not None
    assert (clip.path, clip.dose) == (None, {"factor": 2.0})
    norm = prescribed(row, "", CURES["norm"], site, run_readings())
    assert norm is not None and norm.dose == {}


def test_a_remedy_may_decline(book: Rulebook) -> None:
    cure = Cure("bias", declines=True)
    assert prescribed(row_named(book, "long"), "", cure, site_readings(), run_readings()) is None


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        (TIERS, ["norm", "bias", "clip"]),
        (("step",), ["clip"]),
        (("structure", "values"), ["norm", "bias"]),
        ((), []),
    ],
)
def test_only_allowed_tiers_act(
    book: Rulebook, tiers: tuple[Tier, ...], expected: list[str]
) -> None:
    assert [c.name for c in allowed(row_named(book, "long"), CURES, tiers)] == expected


def optional(record: type[Record]) -> set[str]:
    """The readings of a record that may not have been taken."""
    fields = record.model_fields.items()
    return {name for name, field in fields if type(None) in get_args(field.annotation)}


def witness(row: Scenario) -> tuple[SiteReadings | None, RunReadings] | None:
    """Readings for which the row matches; what its scope does not ask about was not taken."""
    point = reached(BOOK, row)
    if point is None:
        return None
    site = dict.fromkeys(optional(SiteReadings) & SITE_VOCABULARY.keys()) | point
    run = dict.fromkeys(optional(RunReadings) & RUN_VOCABULARY.keys()) | point
    of_run = run_readings(**{k: v for k, v in run.items() if k in RUN_VOCABULARY})
    if row.scope == "run":
        return None, of_run
    return site_readings(**{k: v for k, v in site.items() if k in SITE_VOCABULARY}), of_run


@every_row
def test_every_row_is_reachable(row: Scenario) -> None:
    found = witness(row)
    assert found is not None, f"{row.id} is hidden by the rows before it"
    assert matching(BOOK, row.scope, *found) is row


@every_row
def test_every_row_has_its_reason_advice_and_doses(row: Scenario) -> None:
    found = witness(row)
    assert found is not None
    site, run = found
    said = reason(row, site, run)
    advice = row.advice.format_map(vocabulary_values(site, run))
    assert (said.endswith(".") and not advice) or advice.endswith(".")
    for text in (said, advice):
        assert "{" not in text and "None" not in text
    for remedy in allowed(row, REMEDY, TIERS):
        change = prescribed(row, said, remedy, site, run)
        assert change is None or (change.remedy, change.scenario) == (remedy.name, row.id)


@every_row
def test_a_dose_by_a_reading_that_was_not_taken_is_no_dose(row: Scenario) -> None:
    named = {v for dose in row.dose.values() for v in dose.values() if isinstance(v, str)}
    for name in named & optional(SiteReadings):
        assert name in row.when.cells or any(
            prescribed(row, "", remedy, site_readings(**{name: None}), run_readings()) is None
            for remedy in allowed(row, REMEDY, TIERS)
        )


def applied(scope: str, site: SiteReadings | None, **run: Any) -> tuple[str, ...]:
    row = matching(BOOK, scope, site, run_readings(**run))
    return row.apply if row is not None else ()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize(
    "level", ["exploding", "at risk: expansive", "vanishing", "at risk: fading"]
)
def test_a_sick_untrained_recurrence_gets_something(cell: str, level: str) -> None:
    growth = 1.0 if level in ("vanishing", "at risk: fading") else 200.0
    site = site_readings(cell=cell, level=level, memory_needed=200, growth=growth)
    assert applied("recurrence", site) != ()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_a_run_that_is_not_finite_condemns_no_recurrence_that_does_not_grow(cell: str) -> None:
    site = site_readings(cell=cell, level="unstable", memory_needed=200, growth=1.0)
    assert applied("recurrence", site) == ()


@pytest.mark.parametrize("level", ["healthy", "truncated", "unknown"])
def test_no_weight_is_touched_where_it_could_not_help(level: str) -> None:
    assert applied("recurrence", site_readings(level=level)) == ()


@pytest.mark.parametrize("scope", SITE_SCOPES)
@pytest.mark.parametrize("level", ["exploding", "vanishing", "healthy"])
def test_trained_weights_are_never_rewritten(scope: str, level: str) -> None:
    sick = {"input_drive": 50.0, "output_rms": 1e-6, "readout": "last_step"}
    site = site_readings(trained=True, level=level, **sick)
    values = [n for n in applied(scope, site) if REMEDY[n].tier == "values"]
    assert values == []


def test_a_gated_cell_with_long_memory_gets_a_keep_bias() -> None:
    for cell in ("lstm", "gru"):
        site = site_readings(cell=cell, level="vanishing", memory_needed=200)
        row = matching(BOOK, "recurrence", site, run_readings())
        assert row is not None
        change = prescribed(row, "", REMEDY["chrono_bias"], site, run_readings(seed=3))
        assert change is not None
        assert (change.tier, change.dose) == ("values", {"t_max": 200, "seed": 3})


def test_the_optimizer_is_clipped_once() -> None:
    assert "clip_gradient" in applied("run", None, guarded=False)
    assert applied("run", None, guarded=True) == ()


def test_values_of_both_records_are_words() -> None:
    assert set(vocabulary_values(site_readings(), run_readings())) == {*VOCABULARY, *TEXTS}


def test_the_lowest_priority_comes_first(book: Rulebook) -> None:
    site, run = site_readings(memory_needed=80), run_readings()
    rows = [row.model_copy(update={"priority": 5 * (row.id == "long")}) for row in book.scenarios]
    found = matching(book.model_copy(update={"scenarios": tuple(rows)}), "recurrence", site, run)
    assert found is not None and found.id == "any-lstm"


def test_the_order_of_the_file_decides_nothing() -> None:
    """Every row's own case is judged alike by a table that stands upside down."""
    upside_down = BOOK.model_copy(update={"scenarios": BOOK.scenarios[::-1]})
    for row in CHOSEN:
        found = witness(row)
        assert found is not None
        for scope in SITE_SCOPES if found[0] is not None else ("run",):
            assert matching(BOOK, scope, *found) is matching(upside_down, scope, *found)


@pytest.mark.parametrize(
    ("memory", "row"),
    [
        (10, "lstm-short"),
        (11, "lstm-fading-short"),
        (35, "lstm-fading-short"),
        (36, "lstm-fading-chrono"),
        (1000, "lstm-fading-chrono"),
        (1001, "lstm-very-long"),
    ],
)
def test_the_memory_needed_chooses_the_row(memory: int, row: str) -> None:
    site = site_readings(level="at risk: fading", memory_needed=memory)
    found = matching(BOOK, "recurrence", site, run_readings())
    assert found is not None and found.id == row


def test_what_a_short_memory_can_do_without_it_needs_in_half_precision() -> None:
    site = site_readings(level="at risk: fading", memory_needed=8)
    found = [
        matching(BOOK, "recurrence", site, run_readings(precision=p)) for p in ("fp32", "fp16")
    ]
    assert [row.id for row in found if row] == ["lstm-short", "fading-fp16-only"]


def test_trained_weights_that_are_sick_are_left_alone_with_advice() -> None:
    for level in ("vanishing", "exploding"):
        row = matching(BOOK, "recurrence", site_readings(trained=True, level=level), run_readings())
        assert row is not None and (row.id, row.apply) == ("trained-weights", ()) and row.advice
    row = matching(BOOK, "recurrence", site_readings(trained=True), run_readings())
    assert row is not None and (row.id, row.advice) == ("healthy", "")


def test_where_a_path_leads_around_values_are_mended_and_structure_is_not() -> None:
    site = site_readings(
        cell="rnn_tanh", level="at risk: fading", bypass=True, lag_concentration=1.0
    )
    assert applied("recurrence", site) == ("orthogonal",)
    assert applied("structure", site) == ()
    assert applied("structure", site.model_copy(update={"bypass": False})) != ()


def test_a_switched_off_relu_is_woken_however_short_the_memory() -> None:
    short = {"cell": "rnn_relu", "level": "vanishing", "memory_needed": 8}
    assert applied("recurrence", site_readings(**short, dead_units=0.6)) != ()
    assert applied("recurrence", site_readings(**short, dead_units=0.1)) == ()
