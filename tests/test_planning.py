"""From readings to changes: which row wins, which remedies may act, which dose they get."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
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
    Interval,
    vocabulary_values,
)
from rnnguard.decision.planning import SITE_SCOPES, allowed, matching, prescribed, reason
from rnnguard.decision.rulebook import Rulebook, Scenario, load_rulebook
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import TIERS, Change, Dose, Tier
from rnnguard.remedies import REMEDIES

BOOK = load_rulebook()
REMEDY = {remedy.name: remedy for remedy in REMEDIES}
every_row = pytest.mark.parametrize("row", BOOK.scenarios, ids=lambda row: row.id)


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


def near(bound: float, whole: bool) -> list[float]:
    """Values at and around a bound."""
    step = 1 if whole else max(1e-6, abs(bound) * 1e-3)
    found = [bound - step, bound, bound + step]
    return [int(value) for value in found] if whole else found


def options(name: str) -> list[Any]:
    """Values of a reading that lie on either side of every bound that any row draws."""
    record = SiteReadings if name in SITE_VOCABULARY else RunReadings
    annotation = record.model_fields[name].annotation
    whole = annotation is int or int in get_args(annotation)
    kind = VOCABULARY[name]
    if kind is bool:
        return [False, True]
    if kind is not float:
        return list(kind)
    cells = [row.when.cells[name] for row in BOOK.scenarios if name in row.when.cells]
    bounds = {b for c in cells if isinstance(c, Interval) for b in (c.low, c.high)}
    return [value for b in sorted(bounds) if math.isfinite(b) for value in near(b, whole)]


def readings_for(row: Scenario) -> Iterator[tuple[SiteReadings | None, RunReadings]]:
    """Readings that meet the row's cells, in all combinations of what its scope asks about."""
    peers = [other for other in BOOK.scenarios if other.scope == row.scope]
    names = sorted({name for other in peers for name in other.when.cells})
    allowed_values = [
        [v for v in options(name) if name not in row.when.cells or row.when.cells[name].holds(v)]
        for name in names
    ]
    for values in itertools.islice(itertools.product(*allowed_values), 200_000):
        fields = dict(zip(names, values, strict=True))
        site = {k: v for k, v in fields.items() if k in SITE_VOCABULARY}
        run = {k: v for k, v in fields.items() if k in RUN_VOCABULARY}
        yield None if row.scope == "run" else site_readings(**site), run_readings(**run)


def witness(row: Scenario) -> tuple[SiteReadings | None, RunReadings] | None:
    """The first readings for which the row is the one that matches."""
    return next(
        (pair for pair in readings_for(row) if matching(BOOK, row.scope, *pair) is row), None
    )


@every_row
def test_every_row_is_reachable(row: Scenario) -> None:
    assert witness(row) is not None, f"{row.id} is hidden by the rows before it"


@every_row
def test_every_row_has_its_reason_and_doses(row: Scenario) -> None:
    found = witness(row)
    assert found is not None
    site, run = found
    said = reason(row, site, run)
    assert said.endswith(".") and "{" not in said and "None" not in said
    for remedy in allowed(row, REMEDY, TIERS):
        change = prescribed(row, said, remedy, site, run)
        assert change is None or (change.remedy, change.scenario) == (remedy.name, row.id)


OPTIONAL = {n for n, f in SiteReadings.model_fields.items() if type(None) in get_args(f.annotation)}


@every_row
def test_a_dose_by_a_reading_that_was_not_taken_is_no_dose(row: Scenario) -> None:
    named = {v for dose in row.dose.values() for v in dose.values() if isinstance(v, str)}
    for name in named & OPTIONAL:
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
