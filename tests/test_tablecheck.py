"""Overlaps, gaps and dead rows are found exactly, which small tables judged point by point show."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from factories import run_readings, site_readings
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnguard.cli import main
from rnnguard.decision.boxes import Axis
from rnnguard.decision.conditions import VOCABULARY, vocabulary_values
from rnnguard.decision.diagnosis import FADED, level_of
from rnnguard.decision.domains import IMPOSSIBLE, NOT_TAKEN, States, domain_of
from rnnguard.decision.rulebook import Rule, Rulebook, Scenario, load_rulebook
from rnnguard.decision.tablecheck import Problem, problems, reached

SENTENCES = {"what": "W.", "why": "W.", "cure": "C.", "fix": "manual"}
# Every row of a free table names these four, which nothing makes impossible together.
FREE: dict[str, list[Any]] = {
    "optimizer": ["sgd", "adam", "adamw", "other", "none"],
    "amsgrad": [False, True],
    "batches_per_epoch": [None, *range(7)],
    "learning_rate": [None, *(half / 2 for half in range(8))],
}


def scenario(name: str, when: dict[str, Any], priority: int = 10, **fields: Any) -> Scenario:
    known = {"scope": "run", "apply": [], "why": "W.", "refs": ["me"]}
    row = {"id": name, "when": when, "priority": priority} | known | fields
    return Scenario.model_validate(row)


def rule(code: str, when: dict[str, Any] | None = None, **fields: Any) -> Rule:
    known: dict[str, Any] = {"code": code, "name": f"is-{code.lower()}", "severity": "warning"}
    own = {"when": when or {"steps": f"> {code[2:]}"}, "message": "M.", "refs": ["me"]}
    return Rule.model_validate(known | SENTENCES | own | {"example": "e", "twin": "t"} | fields)


def found(
    *rows: Scenario | Rule, kind: str | None = None, remedies: Iterable[str] = ()
) -> list[Any]:
    book = Rulebook(
        rules=tuple(row for row in rows if isinstance(row, Rule)),
        scenarios=tuple(row for row in rows if isinstance(row, Scenario)),
    )
    every = problems(book, remedies)
    return [problem for problem in every if kind is None or problem.kind == kind]


def said(*rows: Scenario | Rule, kind: str, remedies: Iterable[str] = ()) -> list[str]:
    return [problem.sentence for problem in found(*rows, kind=kind, remedies=remedies)]


# --- the built-in tables -----------------------------------------------------------------


def test_a_rival_is_never_chosen_and_must_be_named() -> None:
    rival = scenario("rival", {"guarded": True}, only_rival=True)
    named = scenario("named", {}, rivals=["rival"])
    book = Rulebook(rules=(), scenarios=(named, rival))
    assert book.ranked("run") == [named]
    assert not [p for p in problems(book, []) if p.kind in ("unreachable", "unknown scenario")]
    alone = Rulebook(rules=(), scenarios=(scenario("named", {}, rivals=["rivel"]), rival))
    kinds = {p.kind: p.sentence for p in problems(alone, [])}
    assert kinds["unreachable"] == "rival is no row's rival, and is chosen nowhere else."
    assert kinds["unknown scenario"] == "named names the rival 'rivel'; did you mean 'rival'?"


def test_the_built_in_tables_are_in_order() -> None:
    from rnnguard.remedies import REMEDIES

    every = problems(load_rulebook(), [remedy.name for remedy in REMEDIES])
    assert [str(problem) for problem in every] == []


def test_without_any_one_general_row_there_is_a_gap() -> None:
    book = load_rulebook()
    general = [row for row in book.scenarios if row.priority == 50 and row.scope == "recurrence"]
    for row in general:
        without = tuple(other for other in book.scenarios if other.id != row.id)
        short = problems(book.model_copy(update={"scenarios": without}), ())
        assert "gap" in {problem.kind for problem in short}, row.id


# --- overlaps ----------------------------------------------------------------------------


def test_rows_that_meet_are_told_with_the_place() -> None:
    one = scenario("one", {"optimizer": ["sgd", "adam"], "learning_rate": "> 1"})
    other = scenario("other", {"optimizer": ["adam", "adamw"], "learning_rate": "<= 3"})
    assert said(one, other, kind="overlap") == [
        "one and other, both of priority 10, hold at learning_rate > 1 and <= 3, optimizer = adam."
    ]
    (problem,) = found(one, other, kind="overlap")
    assert (problem.rows, problem.scope, problem.severity) == (("one", "other"), "run", "warning")


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        ("<= 3", "> 3", False),
        ("<= 3", ">= 3", True),
        ("< 3", ">= 3", False),
        ("1..3", "3..5", True),
        ("< 4", "> 3", False),  # no whole number lies between
        ("< 5", "> 3", True),
    ],
)
def test_bounds_are_open_or_closed_as_written(first: str, second: str, meet: bool) -> None:
    rows = [scenario(n, {"batches_per_epoch": c}) for n, c in (("one", first), ("two", second))]
    assert bool(found(*rows, kind="overlap")) == meet


def test_other_priorities_and_scopes_do_not_overlap() -> None:
    cells = {"optimizer": "sgd"}
    assert not found(scenario("one", cells), scenario("two", cells, 11), kind="overlap")
    here, there = scenario("one", cells, scope="input"), scenario("two", cells, scope="output")
    assert not found(here, there, kind="overlap")


def test_what_an_earlier_row_has_taken_is_no_overlap() -> None:
    first = scenario("first", {"optimizer": "adam"}, 10)
    one = scenario("one", {"optimizer": ["sgd", "adam"]}, 20)
    other = scenario("other", {"optimizer": ["adam", "adamw"]}, 20)
    assert not found(first, one, other, kind="overlap")
    assert found(one, other, kind="overlap")


def test_what_cannot_come_together_is_no_overlap() -> None:
    one = scenario("one", {"cell": ["lstm", "rnn_tanh"]}, scope="depth")
    other = scenario("other", {"keep_gate": True, "cell": ["rnn_tanh", "gru"]}, scope="depth")
    assert not found(one, other, kind="overlap")


# --- rows that never match ---------------------------------------------------------------


def test_a_row_behind_others_is_unreachable() -> None:
    low, high = (
        scenario("low", {"learning_rate": "<= 1"}),
        scenario("high", {"learning_rate": "> 1"}),
    )
    late = scenario("late", {"learning_rate": "0..9"}, 20)
    assert said(low, high, late, kind="unreachable") == ["late is hidden by low and high."]
    assert not found(low, late, kind="unreachable")
    # What was not taken meets no cell, so that these two leave something of the general row.
    general = scenario("late", {"optimizer": "sgd"}, 20)
    assert not found(low, high, general, kind="unreachable")


@pytest.mark.parametrize(
    ("scope", "cells"),
    [
        ("input", {"saturation": "> 1.5"}),
        ("run", {"batches": "< 0"}),
        ("run", {"batches": "0.2..0.8"}),
        ("input", {"level": "healthy", "growth": "> 500"}),
        ("input", {"cell": "gru", "proj_size": "> 0"}),
        ("input", {"memory_source": "unknown", "memory_needed": "> 10"}),
        ("run", {"weight_decay": "3..2"}),
    ],
)
def test_cells_that_cannot_hold(scope: str, cells: dict[str, Any]) -> None:
    assert said(scenario("never", cells, scope=scope), kind="unreachable") == [
        "never can never hold."
    ]
    assert said(rule("RG790", cells), kind="unreachable") == ["RG790 can never hold."]


def test_a_users_row_may_take_the_place_of_a_built_in_one() -> None:
    mine, theirs = scenario("mine", {"amsgrad": True}, 0), scenario("theirs", {"amsgrad": True})
    (problem,) = found(mine, theirs, kind="unreachable")
    assert (problem.severity, problem.rows) == ("info", ("theirs", "mine"))
    (problem,) = found(theirs, scenario("later", {"amsgrad": True}, 11), kind="unreachable")
    assert problem.severity == "error"


# --- gaps --------------------------------------------------------------------------------


def test_a_gap_is_told_in_as_few_cells_as_can_be() -> None:
    sgd = scenario("sgd", {"optimizer": "sgd", "amsgrad": False})
    rest = scenario("rest", {"optimizer": ["adam", "adamw", "other", "none"]})
    assert said(sgd, rest, kind="gap") == [
        "no row of scope run holds at amsgrad = True, optimizer = sgd."
    ]


def test_a_reading_that_was_not_taken_is_a_gap() -> None:
    rows = [scenario("a", {"learning_rate": "<= 1"}), scenario("b", {"learning_rate": "> 1"})]
    assert said(*rows, kind="gap") == ["no row of scope run holds at learning_rate not taken."]


def test_only_complete_scopes_have_gaps() -> None:
    cells = {"cell": "lstm"}
    assert said(scenario("one", cells, scope="recurrence"), kind="gap")
    assert not said(scenario("one", cells, scope="depth"), kind="gap")


def test_what_is_impossible_is_no_gap() -> None:
    """A level that rests on the memory needed leaves no room for a memory that is not known."""
    known = scenario("known", {"memory_needed": ">= 0"}, scope="recurrence")
    calm = ["unstable", "exploding", "at risk: expansive", "unknown"]
    rest = scenario("rest", {"level": calm}, 20, scope="recurrence")
    assert said(known, rest, kind="gap") == []
    fewer = scenario("rest", {"level": calm[1:]}, 20, scope="recurrence")
    assert said(known, fewer, kind="gap") == [
        "no row of scope recurrence holds at level = unstable, memory_needed not taken."
    ]


# --- point by point ----------------------------------------------------------------------


def cell_of(name: str) -> st.SearchStrategy[Any]:
    if name in ("optimizer", "amsgrad"):
        return st.lists(st.sampled_from(FREE[name]), min_size=1, max_size=3, unique=True)
    number = st.sampled_from([0, 1, 2, 3])
    compared = st.builds("{} {}".format, st.sampled_from(["<", "<=", ">", ">="]), number)
    ranges = st.tuples(number, number).map(lambda ends: f"{min(ends)}..{max(ends)}")
    return compared | ranges


tables = st.lists(
    st.tuples(
        st.sampled_from([10, 20]),
        st.fixed_dictionaries({}, optional={name: cell_of(name) for name in FREE}),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(table=tables)
def test_boxes_judge_as_the_points_do(table: list[tuple[int, dict[str, Any]]]) -> None:
    rows = [scenario(f"row-{at}", cells, prio) for at, (prio, cells) in enumerate(table)]
    book = Rulebook(rules=(), scenarios=tuple(rows))
    ranked = book.ranked("run")
    values = [dict(zip(FREE, point, strict=True)) for point in itertools.product(*FREE.values())]
    winners, ties, empty = set(), set(), False
    for point in values:
        holding = [row for row in ranked if row.when.holds(point)]
        empty = empty or not holding
        if holding:
            winners.add(holding[0].id)
            equal = [row.id for row in holding if row.priority == holding[0].priority]
            ties |= {frozenset(pair) for pair in itertools.combinations(equal, 2)}
    every = problems(book, ())
    assert {row.id for row in rows if reached(book, row) is not None} == winners
    assert {p.rows[0] for p in every if p.kind == "unreachable"} == {r.id for r in rows} - winners
    assert {frozenset(p.rows) for p in every if p.kind == "overlap"} == ties
    assert any(p.kind == "gap" for p in every) == empty
    for row in rows:
        reading = reached(book, row)
        assert reading is None or next(r for r in ranked if r.when.holds(reading)) is row


def parts(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(list(values))


@settings(max_examples=400, deadline=None)
@given(
    site=st.fixed_dictionaries(
        {
            "growth": parts([0.5, 2.0, 99.0, 100.0, 101.0]),
            "growth_over_window": parts([-1.0, 1.5, 5.0]),
            "expansive": st.booleans(),
            "bypass": st.booleans(),
            "readout": parts(["last_step", "pooled", "all_steps"]),
            "window": parts([10, 100]),
            "retention_at_memory": parts([-9.0, -6.0, -3.0, FADED, -1.0]),
        }
    ),
    memory=parts([(None, "unknown"), (50, "assumed"), (50, "declared"), (50, "estimated")]),
    run=st.fixed_dictionaries(
        {
            "nonfinite": st.booleans(),
            "nonfinite_steps": parts([None, 0, 2]),
            "spike_rate": parts([None, 0.0, 0.009, 0.01, 0.5]),
        }
    ),
)
def test_what_counts_as_impossible_no_level_ever_gives(
    site: dict[str, Any], memory: tuple[int | None, str], run: dict[str, Any]
) -> None:
    known = {"memory_needed": memory[0], "memory_source": memory[1]}
    if memory[0] is None:
        known["retention_at_memory"] = None
    readings, of_run = site_readings(**site | known), run_readings(**run, trial_steps=40)
    values = vocabulary_values(readings, of_run) | {"level": level_of(readings, of_run)}
    for fact in IMPOSSIBLE:
        assert not all(lies_in(values[name], states) for name, states in fact.items()), fact


def lies_in(value: Any, states: States) -> bool:
    if isinstance(states, str):
        return (value is None) == (states == NOT_TAKEN)
    return value is not None and states.holds(value)


@pytest.mark.parametrize("name", sorted(VOCABULARY))
def test_every_reading_has_a_domain(name: str) -> None:
    """An axis without any bound still has its values, and their names."""
    axis = Axis(name, domain_of(name), ())
    assert axis.pieces and axis.full
    assert axis.words(axis.full).startswith(name)


# --- rules and names ---------------------------------------------------------------------


def test_rules_with_the_same_cells() -> None:
    cells = {"cell": "lstm", "steps": "> 9"}
    rows = [rule("RG790", cells), rule("RG791", dict(reversed(cells.items()))), rule("RG792")]
    assert said(*rows, kind="same cells") == ["RG790 and RG791 have the same cells."]


def test_a_circle_of_causes_is_told_once() -> None:
    rows = [
        rule("RG790", implied_by=["is-rg791"]),
        rule("RG791", implied_by=["RG792"]),
        rule("RG792", implied_by=["RG790"]),
        rule("RG793", implied_by=["RG790"]),
    ]
    assert said(*rows, kind="cycle") == [
        "RG790 -> RG791 -> RG792 -> RG790 imply each other, so that none is told."
    ]
    assert found(rule("RG790", implied_by=["RG790"]), kind="cycle")
    assert not found(*rows[1:3], rule("RG790"), kind="cycle")


def test_what_does_not_exist() -> None:
    row = scenario("mine", {"amsgrad": True}, apply=["ortogonal"], codes=["RG79"])
    every = found(row, rule("RG790", implied_by=["RG791"]), remedies=["orthogonal"])
    assert [str(problem) for problem in every if problem.severity == "error"] == [
        "error: unknown remedy: mine applies 'ortogonal'; did you mean 'orthogonal'?",
        "error: unknown rule: mine names the rule 'RG79'; did you mean 'RG790'?",
        "error: unknown rule: RG790 is implied by 'RG791'; did you mean 'RG790'?",
    ]


def test_a_rule_without_source_example_or_twin() -> None:
    bare = rule("RG790", refs=[], twin="")
    told = rule("RG791", stage="audit", refs=[], example="", twin="")
    every = found(bare, told, rule("RG792", example=""))
    assert [(problem.severity, problem.sentence) for problem in every] == [
        ("error", "RG790 cites nothing."),
        ("warning", "RG790 and RG792 lack an example or its healthy twin."),
    ]


# --- the command -------------------------------------------------------------------------

ROW = """
schema = 1
[[scenario]]
id = "{id}"
priority = {priority}
scope = "{scope}"
when = {when}
apply = {apply}
why = "W."
refs = ["me"]
"""


def checked(folder: Path, capsys: pytest.CaptureFixture[str], **row: Any) -> tuple[int, str]:
    known = {"id": "mine", "priority": 0, "scope": "depth", "apply": "[]"}
    (folder / "scenarios.toml").write_text(ROW.format(**known | row))
    code = main(["rules", "check", str(folder)])
    return code, capsys.readouterr().out


def test_the_command_tells_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never = '{ layers = "< 0" }'
    code, out = checked(tmp_path, capsys, when=never)
    assert code == 1 and "error: unreachable: mine can never hold.\n" in out
    code, out = checked(tmp_path, capsys, when='{ layers = "> 1" }', apply='["magic"]')
    assert code == 1 and "error: unknown remedy: mine applies 'magic'; known: " in out


def test_the_command_warns_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = checked(tmp_path, capsys, when='{ layers = "> 1", trained = false }', priority=40)
    assert code == 0 and "scenarios are in order.\n" in out
    assert "warning: overlap: mine and deep-stack, both of priority 40, hold at " in out


def test_a_problem_is_data() -> None:
    (problem,) = found(scenario("never", {"batches": "< 0"}), kind="unreachable")
    assert Problem.model_validate(problem.model_dump()) == problem
