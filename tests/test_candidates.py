"""Which combinations a trial compares, from what the probe kept and from the rows' rivals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from factories import measurement, site_readings

from rnnguard.decision.candidates import Changes, combinations
from rnnguard.decision.rulebook import Rulebook, Scenario
from rnnguard.errors import RulesError
from rnnguard.records import TIERS, Change, Tier
from rnnguard.replay import REMEDY


def row(name: str, apply: Sequence[str], rivals: Sequence[str] = (), **fields: Any) -> Scenario:
    known: dict[str, Any] = {"when": {"cell": "lstm"}, "why": "Because.", "refs": ["a paper"]}
    return Scenario(id=name, apply=tuple(apply), rivals=tuple(rivals), **known | fields)


CHRONO = row("chrono", ["chrono_bias"], ["spread", "inside"],
             dose={"chrono_bias": {"t_max": "memory_needed"}})  # fmt: skip
SPREAD = row("spread", ["uniform_gate_bias", "orthogonal"], when={"cell": "gru"})
INSIDE = row("inside", ["layer_norm_inside", "residual_rnn"], when={"cell": "gru"},
             scope="structure")  # fmt: skip
KEPT = Change(remedy="chrono_bias", path="lstm", tier="values", dose={"t_max": 100, "seed": 0},
              scenario="chrono")  # fmt: skip
NORM = Change(remedy="layer_norm", path="lstm", tier="structure", scenario="faint-output")


def found(
    kept: Sequence[Change], *rows: Scenario, tiers: Sequence[Tier] = TIERS,
    skip: frozenset[str] = frozenset(), **site: Any,
) -> list[Changes]:  # fmt: skip
    book = Rulebook(rules=(), scenarios=rows)
    looked = measurement(site_readings(**site))
    return combinations(book, looked, kept, REMEDY, tiers, skip)


def names(plans: list[Changes]) -> list[list[str]]:
    return [[change.remedy for change in plan] for plan in plans]


def test_first_comes_what_the_probe_kept_then_its_values_alone() -> None:
    plain = CHRONO.model_copy(update={"rivals": ()})
    assert found([KEPT, NORM], plain) == [(KEPT, NORM), (KEPT,)]
    assert found([KEPT], plain) == [(KEPT,)]
    assert found([], plain) == []


def test_a_rival_takes_the_place_of_the_row_and_leaves_the_rest() -> None:
    plans = found([KEPT, NORM], CHRONO, SPREAD, INSIDE)
    assert names(plans)[2:] == [
        ["layer_norm", "uniform_gate_bias", "orthogonal"],
        ["chrono_bias", "layer_norm", "layer_norm_inside"],
    ]
    rival = plans[2][1]
    assert (rival.path, rival.scenario, rival.outcome) == ("lstm", "spread", "planned")
    assert "rival of chrono" in rival.why


def test_a_rival_keeps_to_the_tiers() -> None:
    plans = found([KEPT], CHRONO, SPREAD, INSIDE, tiers=("step", "values"))
    assert names(plans) == [["chrono_bias"], ["uniform_gate_bias", "orthogonal"]]


@pytest.mark.parametrize("site", [{"trained": True}, {"path": "other"}])
def test_trained_and_skipped_sites_have_no_rivals(site: dict[str, Any]) -> None:
    plans = found([], CHRONO, SPREAD, INSIDE, skip=frozenset({"other"}), **site)
    assert plans == []


def test_an_unknown_memory_is_at_most_the_sequence() -> None:
    turned = row("turned", ["uniform_gate_bias"], ["far"])
    far = CHRONO.model_copy(update={"id": "far", "rivals": (), "priority": 5})
    (plan,) = found([], turned, far, memory_needed=None, memory_source="unknown")
    assert plan[0].dose["t_max"] == 100


def test_a_rival_at_several_sites_is_one_candidate() -> None:
    book = Rulebook(rules=(), scenarios=(CHRONO.model_copy(update={"rivals": ("spread",)}), SPREAD))
    looked = measurement(site_readings(path="one"), site_readings(path="two"))
    kept = [KEPT.model_copy(update={"path": path}) for path in ("one", "two")]
    plans = combinations(book, looked, kept, REMEDY, TIERS, frozenset())
    assert [(c.remedy, c.path) for c in plans[1]] == [
        ("uniform_gate_bias", "one"), ("orthogonal", "one"),
        ("uniform_gate_bias", "two"), ("orthogonal", "two"),
    ]  # fmt: skip


def test_an_unknown_rival_is_told_with_the_nearest_name() -> None:
    book = Rulebook(rules=(), scenarios=(CHRONO.model_copy(update={"rivals": ("spreat",)}), SPREAD))
    with pytest.raises(RulesError, match="did you mean 'spread'"):
        book.check_remedies(list(REMEDY))
