"""The memory that data demand, on tasks whose answer is known by construction."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import numpy
import pytest
import torch
from torch import Tensor

from rnnguard.probe.demand import CLEAR, FEWEST, Demand, ladder, memory_demand

COUNT = 144
WIDTH = 3


def noise(steps: int, count: int = COUNT) -> Tensor:
    return torch.randn(steps, count, WIDTH)


def recall(steps: int, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """One of four symbols at step 0, then noise in a channel of its own."""
    label = torch.randint(4, (count,))
    x = torch.zeros(steps, count, 5)
    x[0, torch.arange(count), label] = 1
    x[1:, :, 4] = torch.randn(steps - 1, count)
    return x, label


def adding(steps: int, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """The sum of two marked values, one in each half: a product of value and mark."""
    values, marks = torch.rand(steps, count), torch.zeros(steps, count)
    half = steps // 2
    for low in (0, half):
        marks[low + torch.randint(half, (count,)), torch.arange(count)] = 1
    return torch.stack([values, marks], dim=-1), (values * marks).sum(0)


def demand_of(x: Tensor, target: Tensor, lengths: Tensor | None = None) -> Demand | None:
    full = torch.full((x.shape[1],), x.shape[0])
    return memory_demand([x], [full if lengths is None else lengths], [target])


@pytest.mark.parametrize("steps", [10, 50, 100])
def test_recall_needs_every_step(steps: int) -> None:
    found = demand_of(*recall(steps))
    assert found is not None
    assert (found.steps, found.half, found.concentration) == (steps, steps, 1.0)
    assert found.score > 0.99
    assert 0.25 <= found.chance < 0.4
    assert found.windows == ladder(steps) and len(found.scores) == len(found.windows)
    assert max(found.scores[:-1]) < 0.45


@pytest.mark.parametrize("batches", [2, 4])
def test_batches_count_together(batches: int) -> None:
    x, label = recall(20)
    parts = [(part, part_label) for part, part_label in zip(
        x.chunk(batches, dim=1), label.chunk(batches), strict=True)]  # fmt: skip
    lengths = [torch.full((len(y),), 20) for _, y in parts]
    found = memory_demand([p for p, _ in parts], lengths, [y for _, y in parts])
    assert found == demand_of(x, label)


RECENT: dict[str, Callable[[Tensor], Tensor]] = {
    "a class": lambda last: (last.sum(0) > 0).long(),
    "a flag": lambda last: last.sum(0) > 0,
    "a number": lambda last: last.sum(0),
    "a number in a column": lambda last: last.sum(0)[:, None],
    "a number in half precision": lambda last: last.sum(0).bfloat16(),
}


@pytest.mark.parametrize("name", RECENT)
def test_what_the_last_steps_tell_needs_no_more(name: str) -> None:
    x = noise(40)
    found = demand_of(x, RECENT[name](x[-5:, :, 0]))
    assert found is not None
    assert 4 <= found.steps <= 8
    assert found.concentration < 1


def test_chance_is_that_of_classes_or_of_the_mean() -> None:
    x = noise(20)
    last = x[-1, :, 0]
    flag, number = demand_of(x, last > 0), demand_of(x, last)
    assert flag is not None and number is not None
    share = float((last > 0).double().mean())
    assert flag.chance == pytest.approx(max(share, 1 - share))
    assert number.chance == 0.0
    assert flag.steps == number.steps == 1


def test_a_target_spread_over_all_steps_is_not_concentrated() -> None:
    x = noise(64, count=512)
    found = demand_of(x, x[:, :, 0].mean(0))
    assert found is not None
    assert found.steps >= 45
    assert found.concentration < 0.75


def test_trees_find_what_no_line_does() -> None:
    """Whether the last value is large, of either sign."""
    x = noise(12, count=256)
    found = demand_of(x, (x[-1, :, 0].abs() > 0.67).long())
    assert found is not None
    assert found.steps == 1


@pytest.mark.parametrize("target", [torch.long, torch.float32])
def test_noise_demands_nothing(target: torch.dtype) -> None:
    draw = torch.randint(4, (COUNT,)) if target is torch.long else torch.randn(COUNT)
    assert demand_of(noise(40), draw) is None


def test_the_adding_problem_is_not_seen() -> None:
    """A known limit: neither a line nor trees find the product of value and mark."""
    x, total = adding(50)
    assert demand_of(x, total) is None
    assert demand_of(x, total[:, None]) is None


@pytest.mark.parametrize("value", [0, 1, 0.0, 0.1, 3.0])
def test_a_constant_target_demands_nothing(value: float) -> None:
    assert demand_of(noise(20), torch.full((COUNT,), value)) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_demands_nothing(bad: float) -> None:
    x, label = recall(20)
    number = label.float()
    number[3] = bad
    assert demand_of(x, number) is None
    x[4, 3, 4] = bad
    assert demand_of(x, label) is None


def test_too_few_sequences_tell_nothing() -> None:
    x, label = recall(10, count=FEWEST)
    found = demand_of(x, label)
    assert found is not None and found.steps == 10
    assert demand_of(x[:, 1:], label[1:]) is None


def test_one_step_demands_nothing() -> None:
    x = noise(1)
    assert demand_of(x, x[0, :, 0]) is None


OTHER_TARGETS: dict[str, Tensor] = {
    "one per step": torch.zeros(COUNT, 20, dtype=torch.long),
    "several numbers": torch.zeros(COUNT, 2),
    "one for all": torch.tensor(1.0),
    "complex": torch.randn(COUNT, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", OTHER_TARGETS)
def test_a_target_of_another_form_tells_nothing(name: str) -> None:
    assert demand_of(noise(20), OTHER_TARGETS[name]) is None


@pytest.mark.parametrize("classes", [COUNT, COUNT // 2])
def test_classes_that_hardly_recur_tell_nothing_and_warn_of_nothing(classes: int) -> None:
    assert demand_of(noise(10), torch.arange(COUNT) % classes) is None


def test_packed_sequences_are_measured_from_their_ends() -> None:
    """The symbol stands 7 steps before each end; what lies behind an end is not looked at."""
    steps, lag = 40, 7
    lengths = torch.randint(lag, steps + 1, (COUNT,))
    lengths[0] = steps
    label = torch.randint(2, (COUNT,))
    x = torch.zeros(steps, COUNT, WIDTH)
    rows = torch.arange(COUNT)
    x[lengths - lag, rows, 0] = 2.0 * label - 1
    behind = torch.arange(steps)[:, None] >= lengths
    x[behind] = 1e6 * torch.randn(int(behind.sum()), WIDTH)
    found = demand_of(x, label, lengths)
    assert found is not None
    assert found.steps == 8 and found.score > 0.99
    # Each sequence as if it ended with the longest: the symbol's lag is no longer one lag.
    elsewhere = demand_of(x, label)
    assert elsewhere is None or elsewhere.steps > 8


def test_the_ladder_climbs_by_half_octaves_to_the_longest() -> None:
    assert ladder(2) == (1, 2)
    assert ladder(12) == (1, 2, 3, 4, 6, 8, 11, 12)
    for longest in (3, 10, 100, 777, 1024):
        rungs = ladder(longest)
        assert rungs[0] == 1 and rungs[-1] == longest
        assert list(rungs) == sorted(set(rungs))
        assert all(high <= max(low + 1, 1.5 * low) for low, high in pairwise(rungs))


def test_the_steps_are_the_fewest_within_the_error_of_the_best() -> None:
    found = demand_of(*recall(50))
    assert found is not None
    scores = dict(zip(found.windows, found.scores, strict=True))
    error = max(found.score * (1 - found.score), 1e-4) ** 0.5 / COUNT**0.5
    assert found.score == max(scores.values())
    assert scores[found.steps] >= found.score - error
    assert all(scores[k] < found.score - error for k in found.windows if k < found.steps)
    assert found.score - found.chance > CLEAR * error


READOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a line": lambda value: (value > 0).long(),
    "trees": lambda value: (value.abs() > 0.67).long(),
}


@pytest.mark.parametrize("name", READOUTS)
def test_the_same_seed_demands_the_same(name: str) -> None:
    x = noise(6)
    arguments = ([x], [torch.full((COUNT,), 6)], [READOUTS[name](x[-4, :, 0])])
    first = memory_demand(*arguments, seed=3)
    torch.manual_seed(9)
    numpy.random.seed(9)
    assert first is not None
    assert memory_demand(*arguments, seed=3) == first


@pytest.mark.parametrize("name", READOUTS)
def test_trap_33_no_random_state_moves(name: str) -> None:
    x = noise(6)
    target = READOUTS[name](x[-4, :, 0])

    def state() -> tuple[bytes, str, str]:
        own = torch.get_rng_state().numpy().tobytes()
        return own, repr(random.getstate()), repr(numpy.random.get_state())

    before = state()
    assert demand_of(x, target) is not None
    assert state() == before
