"""What a guard counts, against a slow count of the same norms; and where the counts travel."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed
from torch.optim import SGD, Adam, Optimizer

from rnnguard.rewrite.engagement import BLOCK, ENOUGH, WINDOW, Engagement, fitted, new_tally
from rnnguard.rewrite.stepguard import GuardSettings, StepGuard, engagement_of, guard_of

NORMS = st.lists(
    st.sampled_from([0.5, 1.0, 1.5, 2.0, 40.0, math.inf, math.nan]), min_size=1, max_size=60
)


def guarded(optimizer: Optimizer, **fields: Any) -> StepGuard:
    guard = StepGuard(GuardSettings(**fields))
    guard.install(optimizer)
    return guard


def stepped(optimizer: Optimizer, norms: list[float]) -> Engagement:
    """Steps whose gradients have these norms; what the guard then says."""
    (param,) = optimizer.param_groups[0]["params"]
    for norm in norms:
        param.grad = torch.tensor([norm, 0.0], dtype=param.dtype)
        optimizer.step()
    seen = engagement_of(optimizer)
    assert seen is not None
    return seen


def one_parameter(**fields: Any) -> SGD:
    optimizer = SGD([nn.Parameter(torch.zeros(2, dtype=torch.float64))], 0.0 + 1e-9)
    guarded(optimizer, **fields)
    return optimizer


@settings(max_examples=40, derandomize=True, deadline=None)
@given(norms=NORMS, window=st.integers(2, 30))
def test_the_counts_are_those_of_a_slow_count(norms: list[float], window: int) -> None:
    seen = stepped(one_parameter(max_norm=1.5, window=window), norms)
    spikes = 0
    for step, norm in enumerate(norms):
        recent = [n for n in norms[: step // BLOCK * BLOCK][-window:] if math.isfinite(n)]
        enough = len(recent) >= min(window, ENOUGH)
        spikes += enough and math.isfinite(norm) and norm > 10 * float(numpy.median(recent))
    every = [norm for norm in norms if math.isfinite(norm)]
    assert seen.steps == len(norms)
    assert seen.clipped == sum(norm > 1.5 for norm in every)
    assert (seen.nonfinite, seen.skipped) == (len(norms) - len(every), 0)
    assert seen.spikes == spikes
    assert seen.last_norm == pytest.approx(norms[-1], nan_ok=True)
    assert seen.threshold == (1.5 if math.isfinite(norms[-1]) else None)
    in_a_row = next((i for i, norm in enumerate(reversed(norms)) if norm in every), len(norms))
    assert seen.in_a_row == in_a_row


def test_the_median_is_over_the_window() -> None:
    seen = stepped(one_parameter(max_norm=9.0, window=4), [100.0, 1.0, math.nan, 3.0, 2.0])
    assert seen.median_norm == 2.0


def test_nothing_is_known_before_the_first_step() -> None:
    optimizer = one_parameter(max_norm=1.0)
    assert engagement_of(optimizer) == Engagement(0, 0, 0, 0, 0, 0, None, None, None)
    assert engagement_of(SGD([torch.zeros(1)], 1.0)) is None


def test_it_reads_as_a_sentence() -> None:
    optimizer = one_parameter(max_norm=1.5, on_nonfinite="skip")
    seen = stepped(optimizer, [1.0, 2.0, math.inf, 1.0, 1.25])
    assert str(seen) == (
        "4 steps, 25% clipped, 0 spikes, 1 not finite, 1 skipped, "
        "median norm 1.12, last 1.25, threshold 1.5"
    )
    assert seen.share_clipped == 0.25
    assert str(Engagement(0, 0, 0, 0, 0, 0, None, None, None)) == (
        "0 steps, 0% clipped, 0 spikes, 0 not finite, 0 skipped"
    )


# The adaptive forms


@pytest.mark.parametrize("form", ["percentile", "z_score"])
@pytest.mark.parametrize("max_norm", [None, 3.0])
def test_adaptive_forms_start_at_max_norm_or_unclipped(form: Any, max_norm: float | None) -> None:
    optimizer = one_parameter(clip=form, max_norm=max_norm)
    until = math.ceil(ENOUGH / BLOCK) * BLOCK
    cold = stepped(optimizer, [10.0] * until)
    assert (cold.threshold, cold.clipped) == (max_norm, 0 if max_norm is None else until)
    warm = stepped(optimizer, [10.0])
    wanted = 3.0 if (form, max_norm) == ("z_score", 3.0) else 10.0
    assert warm.threshold == pytest.approx(wanted, rel=1e-5)


def test_a_short_window_is_enough_when_it_is_full() -> None:
    norms = [1.0] * (BLOCK + 1)
    assert stepped(one_parameter(clip="percentile", window=BLOCK + 1), norms).threshold is None
    assert stepped(one_parameter(clip="percentile", window=BLOCK), norms).threshold == 1.0


@pytest.mark.parametrize("form", ["percentile", "z_score"])
def test_a_norm_that_is_not_finite_counts_for_nothing(form: Any) -> None:
    """The calm run remembers the same 25 finite norms."""
    calm, broken = one_parameter(clip=form, window=25), one_parameter(clip=form, window=100)
    norms = [1.0, 2.0, 1.0, 4.0] * 8
    mixed = [n for norm in norms for n in (norm, math.inf, math.nan, math.inf)]
    assert stepped(broken, [*mixed, 3.5]).threshold == stepped(calm, [*norms, 3.5]).threshold
    assert engagement_of(broken).nonfinite == 96


def test_a_spike_is_brought_down_further_the_higher_it_is() -> None:
    """ZClip: a norm z deviations above the mean comes down to z_score^2 / z of them."""
    bounds = []
    for spike in (3.0, 30.0):
        optimizer = one_parameter(clip="z_score", window=8)
        bounds.append(stepped(optimizer, [1.0, 2.0] * (BLOCK // 2) + [spike]).threshold)
    assert bounds == pytest.approx([1.5 + 0.5 * 2.5**2 / 3, 1.5 + 0.5 * 2.5**2 / 57])


# Where it travels


STATEFUL: dict[str, dict[str, Any]] = {
    "percentile": {"clip": "percentile", "percentile": 50.0, "window": 5},
    "z_score": {"clip": "z_score", "z_score": 1.0, "window": 5},
}
FIRST = [1.0, 3.0, 2.0, 9.0, math.nan, 4.0, 1.0, 5.0, 2.0, 7.0, math.nan] * 2
SECOND = [2.0, 8.0, 1.0, 1.0, 30.0, 3.0, 9.0, 4.0, 6.0] * 2


def moved(optimizer: Optimizer) -> tuple[list[float], str]:
    seen = stepped(optimizer, SECOND)
    return optimizer.param_groups[0]["params"][0].tolist(), str(seen)


def started(form: str) -> SGD:
    optimizer = one_parameter(**STATEFUL[form], on_nonfinite="skip", warmup=20)
    stepped(optimizer, FIRST)
    return optimizer


@pytest.mark.parametrize("form", STATEFUL)
def test_training_goes_on_as_if_it_had_not_stopped(form: str) -> None:
    whole = started(form)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    fresh = one_parameter(**STATEFUL[form], on_nonfinite="skip", warmup=20)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        fresh.param_groups[0]["params"][0].copy_(whole.param_groups[0]["params"][0])
    assert moved(fresh) == moved(whole)


def test_a_saved_state_stays_as_it_was() -> None:
    optimizer = started("percentile")
    saved = optimizer.state_dict()["param_groups"][0][StepGuard.TALLY_KEY]
    before = saved.clone()
    stepped(optimizer, SECOND)
    torch.testing.assert_close(saved, before, rtol=0, atol=0, equal_nan=True)


def test_a_copy_keeps_the_keys_and_has_no_guard() -> None:
    """A copy knows the steps up to the last full block; nobody tells a guard of copies."""
    optimizer = started("z_score")
    stepped(optimizer, [1.5] * (2 * BLOCK - len(FIRST)))
    twin = copy.deepcopy(optimizer)
    assert guard_of(twin) is None
    torch.testing.assert_close(
        twin.param_groups[0][StepGuard.TALLY_KEY],
        optimizer.param_groups[0][StepGuard.TALLY_KEY],
        equal_nan=True,
    )
    guarded(twin, **STATEFUL["z_score"], on_nonfinite="skip", warmup=20)
    assert moved(twin) == moved(optimizer)


@pytest.mark.parametrize("flat", [False, True])
def test_it_travels_through_a_distributed_checkpoint(flat: bool) -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    one, two = (Adam(model.parameters(), 1e-3) for model in models)
    guarded(one, clip="percentile", window=4)
    for scale in (1.0, 5.0, 2.0, 7.0, 3.0, 1.0, 2.0, 9.0, 4.0) * 2:
        one.zero_grad()
        (scale * models[0](torch.ones(1, 3))).sum().backward()
        one.step()
    options = distributed.StateDictOptions(flatten_optimizer_state_dict=flat)
    state = distributed.get_optimizer_state_dict(models[0], one, options=options)
    guarded(two, clip="percentile", window=4)
    distributed.set_optimizer_state_dict(models[1], two, state, options=options)
    assert engagement_of(two) == engagement_of(one)
    assert engagement_of(two).steps == 18


def test_an_older_checkpoint_starts_a_tally_anew() -> None:
    optimizer = one_parameter()
    older = SGD(optimizer.param_groups[0]["params"], 1.0).state_dict()
    stepped(optimizer, [1.0, 2.0])
    optimizer.load_state_dict(older)
    assert engagement_of(optimizer) == Engagement(0, 0, 0, 0, 0, 0, None, None, None)
    assert stepped(optimizer, [1.0]).steps == 1


def test_a_window_of_another_length_keeps_the_newest_norms() -> None:
    tally = new_tally(3, torch.device("cpu"))
    tally[WINDOW:] = torch.tensor([1.0, 2.0, 3.0])
    shorter, longer = (fitted(tally, n, tally.device)[WINDOW:].tolist() for n in (2, 4))
    assert shorter == [2.0, 3.0]
    assert longer == pytest.approx([math.nan, 1.0, 2.0, 3.0], nan_ok=True)
    assert fitted(tally, 3, tally.device) is tally
