"""The memory that data demand, on tasks whose answer is known by construction."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from rnnguard.demo import digit_sequences
from rnnguard.probe import memory_demand
from rnnguard.probe.demand import FEWEST, SEQUENCES, Demand, MemoryDemand, demand_of
from rnnguard.probe.demand_data import site_parts

Pair = tuple[Tensor, Tensor]
COUNT = 144
WIDTH = 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(steps: int, count: int = COUNT, seed: int = 0) -> Tensor:
    return torch.randn(count, steps, WIDTH, generator=seeded(seed))


def recall(steps: int = 100, count: int = 256, seed: int = 0) -> Pair:
    """One of four symbols at step 0, then noise in a channel of its own."""
    generator = seeded(seed)
    label = torch.randint(4, (count,), generator=generator)
    x = torch.zeros(count, steps, 5)
    x[torch.arange(count), 0, label] = 1
    x[:, 1:, 4] = torch.randn(count, steps - 1, generator=generator)
    return x, label


def adding(steps: int = 100, count: int = 512, seed: int = 0) -> Pair:
    """The sum of two marked values, one in each half."""
    generator, rows, half = seeded(seed), torch.arange(count), steps // 2
    values, marks = torch.rand(count, steps, generator=generator), torch.zeros(count, steps)
    for low in (0, half):
        marks[rows, low + torch.randint(half, (count,), generator=generator)] = 1
    return torch.stack([values, marks], dim=-1), (values * marks).sum(1, keepdim=True)


def echo(steps: int = 200, count: int = 128, seed: int = 0) -> Pair:
    """At every step the input of 20 steps ago."""
    x = torch.randn(count, steps, generator=seeded(seed))
    y = torch.zeros(count, steps)
    y[:, 20:] = x[:, :-20]
    return x, y


def autoregression(steps: int = 200, count: int = 128, seed: int = 0) -> Pair:
    """At every step the next value of a process that rests on its last three."""
    noise = torch.randn(count, steps + 101, generator=seeded(seed))
    x = noise.clone()
    for t in range(3, x.shape[1]):
        x[:, t] += 0.5 * x[:, t - 1] - 0.3 * x[:, t - 2] + 0.4 * x[:, t - 3]
    x = x[:, 100:]
    return x[:, :-1, None], x[:, 1:, None]


def digits(count: int = 512, seed: int = 0) -> Pair:
    (x, y), _ = digit_sequences()
    picks = torch.randperm(len(x), generator=seeded(seed))[:count]
    return x[picks], y[picks]


def tokens(steps: int = 30, count: int = 256, seed: int = 0) -> Pair:
    """The label is the first of the tokens, of which there are 20."""
    ids = torch.randint(20, (count, steps), generator=seeded(seed))
    return ids, ids[:, 0]


TASKS: dict[str, tuple[Callable[..., Pair], int, int]] = {
    "recall": (recall, 95, 100),
    "adding": (adding, 90, 100),
    "echo": (echo, 18, 22),
    "autoregression": (autoregression, 3, 6),
    "digits": (digits, 40, 64),
    "tokens": (tokens, 30, 30),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_the_steps_known_by_construction_are_found(name: str, seed: int) -> None:
    task, least, most = TASKS[name]
    found = memory_demand(task(seed=seed))
    assert found.source == "estimated"
    assert found.steps is not None and found.low is not None and found.high is not None
    assert least <= found.steps <= most
    assert found.low <= found.steps <= found.high
    assert found.score is not None and found.chance is not None
    assert found.score > found.chance + 0.1


@pytest.mark.parametrize("name", TASKS)
def test_shuffled_targets_are_unknown(name: str) -> None:
    sizes = {} if name == "digits" else {"steps": 40}
    x, y = TASKS[name][0](count=96, seed=5, **sizes)
    shuffled = y[torch.randperm(len(y), generator=seeded(6))]
    assert memory_demand((x, shuffled)) == MemoryDemand()


def test_the_lags_that_matter_are_named() -> None:
    assert memory_demand(recall(seed=3)).lags == (99,)
    assert memory_demand(echo(steps=60, seed=3)).lags == (20,)
    assert memory_demand(tokens(seed=3)).lags == (29,)
    assert set(memory_demand(autoregression(steps=60, seed=3)).lags) >= {0, 1, 2}


def test_lags_too_faint_to_see_alone_are_found_beside_the_others() -> None:
    """One step of a hundred is marked for two sequences in a hundred only."""
    assert len(memory_demand(adding(seed=3)).lags) > 50


def test_the_present_step_alone_needs_one() -> None:
    x = noise(40, count=256)
    error = torch.randn(256, generator=seeded(1))
    found = memory_demand((x, x[:, -1, 0] + 0.5 * error))
    assert (found.low, found.steps) == (1, 1)
    assert found.lags[0] == 0
    # Of variance 1 beside noise of variance 1/4, 0.8 can be told.
    assert found.score == pytest.approx(0.8, abs=0.06)
    assert found.chance == 0


def test_rare_classes_are_scored_against_even_chance() -> None:
    x = noise(50, count=1024)
    found = memory_demand((x, x[:, 30, 0] > 1.5))
    assert found.steps == 20
    assert found.chance == 0.5
    assert found.score is not None and found.score > 0.8


def test_trees_find_what_only_two_steps_together_tell() -> None:
    x = torch.randint(2, (512, 8), generator=seeded(0)).float()
    found = memory_demand((x, (x[:, 0] != x[:, 1]).long()))
    assert found.steps == 8
    assert found.score is not None and found.score > 0.9


def test_parity_among_many_steps_is_honestly_unknown() -> None:
    x = torch.randint(2, (256, 60), generator=seeded(0)).float()
    assert memory_demand((x, x.sum(1).long() % 2)) == MemoryDemand()


def test_a_target_spread_over_all_steps_is_not_concentrated() -> None:
    x = noise(64, count=512)
    found = memory_demand((x, x[:, :, 0].mean(1)))
    assert found.steps is not None and found.half is not None
    assert found.steps >= 60
    assert found.half / found.steps < 0.8


def test_a_faint_far_lag_does_not_lengthen_the_memory() -> None:
    """It explains one part in ten thousand of the variance, which no read-out needs."""
    x = torch.randn(512, 120, generator=seeded(0))
    y = torch.zeros(512, 120)
    y[:, 5:] += x[:, :-5]
    y[:, 100:] += 0.01 * x[:, :-100]
    found = memory_demand((x, y))
    assert found.steps == 6


def test_inputs_that_go_together_do_not_lengthen_the_memory() -> None:
    """Each step is nearly the last one again, but only the third from the end counts."""
    noise = torch.randn(512, 80, generator=seeded(0))
    x = noise.clone()
    for t in range(1, 80):
        x[:, t] += 0.9 * x[:, t - 1]
    error = torch.randn(512, generator=seeded(1))
    found = memory_demand((x, x[:, -3] + 0.5 * error))
    assert found.steps is not None and 3 <= found.steps <= 4
    assert 2 in found.lags and found.lags[-1] <= 4


def test_a_course_that_all_follow_by_the_clock_is_no_memory() -> None:
    """Where a sequence starts, the missing steps would tell the time."""
    clock = torch.linspace(0, 3, 40)
    x = torch.randn(64, 40, generator=seeded(0))
    y = torch.randn(64, 40, generator=seeded(1)) + clock
    assert memory_demand((x + clock, y)) == MemoryDemand()
    late = (torch.rand(64, 40, generator=seeded(2)) < clock / 3).long()
    assert memory_demand((x, late)) == MemoryDemand()


def test_few_long_sequences_suffice_for_targets_at_every_step() -> None:
    found = memory_demand(echo(steps=1000, count=SEQUENCES))
    assert found.steps == 21
    assert memory_demand(echo(steps=1000, count=SEQUENCES - 1)) == MemoryDemand()


def test_classes_at_every_step_are_told_from_token_ids() -> None:
    """A language of 30 letters in which every letter repeats the third before it."""
    ids = torch.randint(30, (64, 60), generator=seeded(0))
    found = memory_demand((ids[:, :-1], ids.roll(2, 1)[:, :-1]))
    assert (found.steps, found.lags) == (3, (2,))
    assert found.chance == pytest.approx(1 / 30)


def test_steps_without_a_target_are_left_out() -> None:
    x = torch.randn(64, 60, generator=seeded(0))
    y = (x.roll(4, 1) > 0).long()
    y[:, :10] = -100
    found = memory_demand((x, y))
    assert found.steps == 5
    assert found.chance == 0.5
    assert memory_demand((x, torch.full_like(y, -100))) == MemoryDemand()


def test_more_kinds_of_token_than_columns_share_them() -> None:
    ids = torch.randint(500, (512, 12), generator=seeded(0))
    ids[:, 2] = torch.randint(2, (512,), generator=seeded(1)) + 500
    found = memory_demand((ids, (ids[:, 2] == 501).long()))
    assert found.steps == 10


def test_whole_numbers_of_a_wide_range_are_read_as_numbers_too() -> None:
    levels = torch.randint(-100, 100, (256, 20), generator=seeded(0))
    assert memory_demand((levels, (levels[:, 5] > 0).long())).steps == 15


BATCH_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "one pair": lambda x, n, y: ((x, n), y),
    "batches": lambda x, n, y: [
        ((x[i : i + 50], n[i : i + 50]), y[i : i + 50]) for i in range(0, len(x), 50)
    ],
    "a stream": lambda x, n, y: iter([((x, n), y)]),
    "packed": lambda x, n, y: (
        pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False),
        y,
    ),
    "a target in a column": lambda x, n, y: ((x, n), y[:, None]),
}


def variable_recall() -> tuple[Tensor, Tensor, Tensor]:
    """The symbol stands 7 steps before each end; what lies behind an end is not to be seen."""
    steps, lag = 40, 7
    lengths = torch.randint(lag, steps + 1, (COUNT,), generator=seeded(0))
    lengths[0] = steps
    label = torch.randint(2, (COUNT,), generator=seeded(1))
    x = torch.zeros(COUNT, steps, WIDTH)
    x[torch.arange(COUNT), lengths - lag, 0] = 2.0 * label - 1
    behind = torch.arange(steps) >= lengths[:, None]
    x[behind] = torch.nan
    return x, lengths, label


@pytest.mark.parametrize("name", BATCH_FORMS)
def test_sequences_are_aligned_by_their_ends_in_every_form(name: str) -> None:
    x, lengths, label = variable_recall()
    found = memory_demand(BATCH_FORMS[name](x, lengths, label))
    assert (found.low, found.steps, found.high) == (7, 7, 7)
    assert found.lags == (6,)
    assert found.score == 1.0


def test_steps_may_come_first() -> None:
    x, y = recall(20)
    assert memory_demand((x.transpose(0, 1), y), batch_first=False) == memory_demand((x, y))
    x, y = echo(60)
    assert memory_demand((x.T, y.T), batch_first=False) == memory_demand((x, y))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_unknown(bad: float) -> None:
    x, label = recall(20)
    number = label.float()
    number[3] = bad
    assert memory_demand((x, number)) == MemoryDemand()
    x[3, 4, 4] = bad
    assert memory_demand((x, label)) == MemoryDemand()


def test_constant_features_count_for_nothing() -> None:
    x, label = recall(20)
    padded = torch.cat([x, torch.full((len(x), 20, 2), 7.0)], dim=2)
    assert memory_demand((padded, label)).steps == 20
    assert memory_demand((torch.ones(COUNT, 20, 2), label[:COUNT])) == MemoryDemand()


@pytest.mark.parametrize("value", [0, 1, 0.0, 0.1, 3.0])
def test_a_constant_target_is_unknown(value: float) -> None:
    assert memory_demand((noise(20), torch.full((COUNT,), value))) == MemoryDemand()


def test_too_few_sequences_are_unknown() -> None:
    x, label = recall(10, count=FEWEST)
    assert memory_demand((x, label)).steps == 10
    assert memory_demand((x[1:], label[1:])) == MemoryDemand()


@pytest.mark.parametrize("classes", [COUNT, COUNT // 2])
def test_classes_that_hardly_recur_are_unknown(classes: int) -> None:
    assert memory_demand((noise(10), torch.arange(COUNT) % classes)) == MemoryDemand()


def test_one_step_needs_one_step() -> None:
    x = noise(1)
    assert memory_demand((x, x[:, 0, 0])).steps == 1


def test_outliers_neither_hide_nor_make_a_signal() -> None:
    x = noise(30, count=256)
    x[0, 3, 1] = 1e6
    draw = torch.randn(256, generator=seeded(1))
    draw[0] = 1e4
    assert memory_demand((x, draw)) == MemoryDemand()
    assert memory_demand((x, x[:, -5, 0])).steps == 5


def test_the_windows_and_their_scores_stand_side_by_side() -> None:
    found = memory_demand(recall(60))
    assert found.windows[0] == 1 and found.windows[-1] == 60
    assert list(found.windows) == sorted(set(found.windows))
    scores = dict(zip(found.windows, found.scores, strict=True))
    assert found.steps == 60 and scores[60] == found.score == 1.0
    assert max(scores[k] for k in found.windows if k < 60) < 0.4


def test_the_record_is_frozen_and_travels_as_data() -> None:
    found = memory_demand(recall(20))
    assert MemoryDemand.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValidationError):
        found.steps = 3  # type: ignore[misc]


def test_no_random_state_moves_and_the_same_seed_finds_the_same() -> None:
    x, y = digits(count=128)

    def state() -> tuple[bytes, str, str]:
        own = torch.get_rng_state().numpy().tobytes()
        return own, repr(random.getstate()), repr(numpy.random.get_state())

    before = state()
    found = memory_demand((x, y), seed=3)
    assert state() == before
    torch.manual_seed(9)
    numpy.random.seed(9)
    assert found.steps is not None
    assert memory_demand((x, y), seed=3) == found


def demand_at_site(x: Tensor, target: Tensor, lengths: Tensor | None = None) -> Demand | None:
    full = torch.full((len(x),), x.shape[1])
    given = [x.transpose(0, 1)], [full if lengths is None else lengths], [target]
    return demand_of(site_parts(*given) or [])


def test_a_site_asks_the_same_with_steps_first() -> None:
    x, label = recall(30)
    found, public = demand_at_site(x, label), memory_demand((x, label))
    assert found is not None
    assert (found.steps, found.half, found.concentration) == (30, 30, 1.0)
    for name in ("steps", "low", "high", "half", "score", "chance", "windows", "scores", "lags"):
        assert getattr(found, name) == getattr(public, name)


def test_a_site_s_batches_count_together() -> None:
    x, label = recall(20)
    parts = list(zip(x.chunk(3), label.chunk(3), strict=True))
    given = site_parts(
        [part.transpose(0, 1) for part, _ in parts],
        [torch.full((len(y),), 20) for _, y in parts],
        [y for _, y in parts],
    )
    found = demand_of(given or [])
    assert found == demand_at_site(x, label)


OTHER_TARGETS: dict[str, Tensor] = {
    "one per step": torch.zeros(COUNT, 20, dtype=torch.long),
    "several numbers": torch.zeros(COUNT, 2),
    "one for all": torch.tensor(1.0),
    "complex": torch.randn(COUNT, dtype=torch.complex64),
    "another number": torch.zeros(COUNT - 1),
}


@pytest.mark.parametrize("name", OTHER_TARGETS)
def test_a_target_of_another_form_tells_a_site_nothing(name: str) -> None:
    assert demand_at_site(noise(20), OTHER_TARGETS[name]) is None


def test_a_site_in_half_precision_asks_the_same() -> None:
    x = noise(20, count=256)
    found = demand_at_site(x.bfloat16(), x[:, -5:, 0].sum(1).bfloat16())
    assert found is not None and found.steps == 5
