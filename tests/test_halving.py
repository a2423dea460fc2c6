"""Who goes on, who wins, and that noise alone wins nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnguard.decision.halving import (
    Budget,
    Outcome,
    decided,
    gain_of,
    halved,
    leader,
    survivors,
)
from rnnguard.race import NOTHING, Candidate, Course, Heat
from rnnguard.records import Change, Tier

STEPS = 60


def course(losses: Iterable[float], name: str = "one", stopped: str | None = None) -> Course:
    return Course(candidate=name, losses=tuple(map(float, losses)), stopped=stopped)


def candidate(name: str, *tiers: Tier, rank: int = 1) -> Candidate:
    changes = tuple(Change(remedy=name, path="rnn", tier=tier) for tier in tiers)
    return Candidate(name=name, changes=changes, rank=rank)


NONE = Candidate(name=NOTHING)


def levels(**means: float) -> Heat:
    """A heat of courses with these losses and the same small noise in each."""
    noise = 0.001 * numpy.random.default_rng(0).standard_normal(STEPS)
    named = {NOTHING: means.pop("nothing"), **means}
    courses = tuple(course(mean + noise, name) for name, mean in named.items())
    return Heat(seed=0, steps=STEPS, courses=courses)


def test_the_same_losses_gain_nothing() -> None:
    gain = gain_of(course([1.0] * STEPS), course([1.0] * STEPS))
    assert (gain.mean, gain.share, gain.clear) == (0.0, 0.0, False)


def test_what_the_batches_share_is_no_noise() -> None:
    batches = numpy.random.default_rng(0).normal(3, 2, STEPS)
    gain = gain_of(course(batches - 0.1), course(batches))
    assert gain.mean == pytest.approx(0.1) and gain.stderr == pytest.approx(0, abs=1e-12)
    assert gain.clear and not gain_of(course(batches), course(batches - 0.1)).clear


def test_only_the_second_half_counts() -> None:
    late = [2.0] * (STEPS // 2) + [0.5] * (STEPS // 2)
    assert gain_of(course(late), course([1.0] * STEPS)).share == pytest.approx(0.5)


@pytest.mark.parametrize(("correlation", "most"), [(0.0, 0.03), (0.5, 0.06)])
def test_noise_alone_is_rarely_clear(correlation: float, most: float) -> None:
    draw, clear = numpy.random.default_rng(1), 0
    for _ in range(2000):
        noise = draw.standard_normal((2, STEPS))
        for step in range(1, STEPS):
            noise[:, step] += correlation * noise[:, step - 1]
        # Large beside the share of the loss that is asked for, so that this cannot decide.
        clear += gain_of(course(3 + noise[0]), course(3 + noise[1])).clear
    assert clear / 2000 < most


def test_a_widening_gap_is_clear_although_it_varies() -> None:
    draw = numpy.random.default_rng(2)
    plateau = 1.4 + 0.02 * draw.standard_normal(STEPS)
    learning = plateau - numpy.maximum(0, numpy.arange(STEPS) - 30) / 60
    assert gain_of(course(learning), course(plateau)).clear


def test_a_gap_that_nobody_would_notice_is_not_clear() -> None:
    assert not gain_of(course([0.9999] * STEPS), course([1.0] * STEPS)).clear


def test_losses_below_zero_are_compared_by_their_size() -> None:
    gain = gain_of(course([-1.1] * STEPS), course([-1.0] * STEPS))
    assert gain.share == pytest.approx(0.1) and gain.clear


@pytest.mark.parametrize(
    ("mine", "theirs", "clear"),
    [(1.0, math.nan, True), (math.nan, 1.0, False), (math.nan, math.nan, False)],
)
def test_what_ends_beats_what_does_not(mine: float, theirs: float, clear: bool) -> None:
    gain = gain_of(course([mine] * STEPS), course([theirs] * STEPS))
    assert gain.clear is clear
    assert gain_of(course([2.0] * STEPS), course([1.0] * 20, stopped="rose")).clear


def test_the_least_invasive_of_equals_leads() -> None:
    crowd = [NONE, candidate("values", "values"), candidate("step", "step", rank=2)]
    assert leader(crowd, levels(nothing=2.0, step=1.0, values=1.0)).name == "step"
    assert leader(crowd, levels(nothing=2.0, step=1.0, values=0.8)).name == "values"
    assert leader(crowd, levels(nothing=1.0, step=1.0, values=1.0)).name == NOTHING


def test_half_go_on_and_changing_nothing_always_does() -> None:
    crowd = [NONE, *(candidate(name, "values", rank=i) for i, name in enumerate("abcde"))]
    alike = levels(nothing=1.0, a=1.0, b=1.0, c=1.0, d=1.0, e=1.0)
    assert [c.name for c in survivors(crowd, alike)] == [NOTHING, "a", "b", "c"]
    worse = levels(nothing=9.0, a=2.0, b=2.0, c=2.0, d=1.0, e=3.0)
    assert [c.name for c in survivors(crowd, worse)] == [NOTHING, "d"]


def test_the_least_invasive_goes_on_where_it_is_worth_something() -> None:
    crowd = [NONE, candidate("structure", "structure"), candidate("step", "step", rank=2)]
    alike = levels(nothing=2.0, structure=1.0, step=1.0)
    assert [c.name for c in survivors(crowd, alike)] == [NOTHING, "structure", "step"]
    idle = levels(nothing=1.0, structure=1.0, step=1.0)
    assert [c.name for c in survivors(crowd, idle)] == [NOTHING, "structure"]
    better = levels(nothing=2.0, structure=0.5, step=1.0)
    assert [c.name for c in survivors(crowd, better)] == [NOTHING, "structure"]


def test_what_was_stopped_does_not_go_on() -> None:
    heat = Heat(seed=0, steps=3, courses=(course([1] * 3, NOTHING), course([9], "a", "rose")))
    assert survivors([NONE, candidate("a", "values")], heat) == [NONE]


def test_it_is_decided_when_one_beats_all_others() -> None:
    crowd = [NONE, candidate("a", "values"), candidate("b", "values", rank=2)]
    assert decided(crowd, levels(nothing=2.0, a=1.0, b=1.5))
    assert not decided(crowd, levels(nothing=2.0, a=1.0, b=1.0))
    assert not decided(crowd, levels(nothing=1.0, a=2.0, b=2.0))


class Runs:
    """Trains nothing: gives each candidate the loss that a function of the seed says."""

    def __init__(self, loss: Callable[[str, int], float], in_time: int = 99) -> None:
        self.loss, self.in_time = loss, in_time
        self.calls: list[tuple[tuple[str, ...], int, int]] = []

    def __call__(self, running: Sequence[Candidate], steps: int, seed: int) -> tuple[Course, ...]:
        self.calls.append((tuple(c.name for c in running), steps, seed))
        if len(self.calls) > self.in_time:
            return ()
        noise = 0.01 * numpy.random.default_rng(seed).standard_normal(steps)
        return tuple(course(self.loss(c.name, seed) + noise, c.name) for c in running)


def room(crowd: int, lengths: Sequence[int]) -> int:
    """Steps of these heats, when half of the others go on from each."""
    total = 0
    for length in lengths:
        total, crowd = total + crowd * length, 1 + max(1, crowd // 2)
    return total


def outcome(
    crowd: Sequence[Candidate],
    runs: Runs,
    lengths: Sequence[int] = (40, 80),
    left: int | None = None,
) -> Outcome:
    left = room(len(crowd), lengths) if left is None else left
    return halved(crowd, lengths, left, runs)


def test_heats_double_and_each_has_its_own_seed() -> None:
    crowd = [NONE, *(candidate(name, "values", rank=i) for i, name in enumerate("abcde"))]
    runs = Runs(lambda name, seed: 1.0)
    found = outcome(crowd, runs, (20, 40, 80))
    assert [(len(names), steps, seed) for names, steps, seed in runs.calls] == [
        (6, 20, 0), (4, 40, 1), (3, 80, 2)
    ]  # fmt: skip
    assert found.complete
    assert {e.candidate.name: e.fate for e in found.entries}[NOTHING] == "won"


def test_what_is_not_decided_goes_on_while_there_is_room() -> None:
    crowd = [NONE, candidate("late", "values"), candidate("idle", "values", rank=2)]
    late = Runs(lambda name, seed: 0.5 if name == "late" and seed > 2 else 1.0)
    found = outcome(crowd, late, left=3 * 40 + 2 * (80 + 160 + 250))
    assert [(len(names), steps) for names, steps, _ in late.calls] == [
        (3, 40), (2, 80), (2, 160), (2, 250)
    ]  # fmt: skip
    assert next(e for e in found.entries if e.fate == "won").candidate.name == "late"
    never = Runs(lambda name, seed: 1.0)
    outcome(crowd, never, left=3 * 40 + 2 * 80 + 175)
    assert [steps for _, steps, _ in never.calls] == [40, 80]


def test_one_good_heat_is_not_enough() -> None:
    crowd = [NONE, candidate("lucky", "values")]
    lucky = outcome(crowd, Runs(lambda name, seed: 0.5 if name == "lucky" and not seed else 1.0))
    assert {e.candidate.name: e.fate for e in lucky.entries} == {
        NOTHING: "won", "lucky": "not better"
    }  # fmt: skip
    good = outcome(crowd, Runs(lambda name, seed: 0.5 if name == "lucky" else 1.0))
    winner = next(e for e in good.entries if e.fate == "won")
    assert winner.candidate.name == "lucky"
    assert winner.gain is not None and winner.gain.share == pytest.approx(0.5, abs=0.01)
    assert winner.words == "loss 50.1% below that of changing nothing"


def test_a_heat_that_stands_alone_has_to_be_clearer() -> None:
    crowd = [NONE, candidate("a", "values")]
    draw = numpy.random.default_rng(3)
    noise = draw.standard_normal(80)
    # Between the quantiles of both confidences: 2.8 and 4.3 of its standard errors.
    theirs = course(10 + noise, NOTHING)
    error = gain_of(course(10 + 0 * noise), theirs).stderr
    mine = course(10 - 3.5 * error + 0 * noise + noise.mean(), "a")
    shift = gain_of(mine, theirs).mean - 3.5 * error
    mine = course(numpy.array(mine.losses) + shift, "a")

    def run(running: Sequence[Candidate], steps: int, seed: int) -> tuple[Course, ...]:
        return theirs, mine

    def winner(found: Outcome) -> str:
        return next(e.candidate.name for e in found.entries if e.fate == "won")

    assert winner(halved(crowd, (40, 80), 320, run)) == "a"
    assert winner(halved(crowd, (80,), 160, run)) == NOTHING


@pytest.mark.parametrize(
    ("total", "most", "before", "expected"),
    [
        (10**6, 2, 25, (2, (40, 80))),
        (10**6, 7, 25, (7, (20, 40, 80))),
        (420, 2, 25, (2, (40, 80))),
        (300, 4, 25, (1, (40, 80))),
        (250, 4, 25, (1, (112,))),
        (200, 4, 25, (1, (87,))),
        (100, 4, 25, (1, (37,))),
        (290, 4, 0, (2, (40, 80))),
        (10**6, 0, 25, (0, ())),
    ],
)
def test_the_budget_decides_who_runs_how_long(
    total: int, most: int, before: int, expected: tuple[int, tuple[int, ...]]
) -> None:
    assert Budget(steps=80, total=total, seconds=60).course(most, before) == expected


@given(total=st.integers(60, 3000), most=st.integers(1, 9), steps=st.integers(20, 200))
def test_the_budget_is_kept(total: int, most: int, steps: int) -> None:
    count, lengths = Budget(steps=steps, total=total, seconds=60).course(most, 25)
    crowd = [NONE, *(candidate(str(i), "values", rank=i) for i in range(count))]
    runs = Runs(lambda name, seed: 1.0)
    outcome(crowd, runs, lengths, total - 25 * count)
    spent = 25 * count + sum(len(names) * length for names, length, _ in runs.calls)
    assert spent <= max(total, 25 + 2 * 10)


def test_a_heat_that_time_cut_short_counts_for_nothing() -> None:
    crowd = [NONE, candidate("a", "values")]
    found = outcome(crowd, Runs(lambda name, seed: 1.0 if name == NOTHING else 0.1, in_time=1))
    assert len(found.heats) == 1 and not found.complete
    assert next(e for e in found.entries if e.fate == "won").candidate.name == NOTHING


def test_it_ends_when_nobody_is_left() -> None:
    crowd, runs = (
        [NONE, candidate("a", "values")],
        Runs(lambda n, seed: 1.0 if n != "a" else math.nan),
    )
    found = outcome(crowd, runs)
    assert len(runs.calls) == 1 and found.complete
