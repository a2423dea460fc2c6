"""What follows from a trial's series: spikes, skips, shares, the change of the loss."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest

from rnnguard.probe.nonfinite import FirstNonfinite
from rnnguard.probe.trial_readings import Stop, Trial


def trial(norms: list[float], **fields: Any) -> Trial:
    """A trial with these norms, all else calm unless the fields say otherwise."""
    steps = len(norms)
    known: dict[str, Any] = {
        "planned": steps,
        "losses": (1.0,) * steps,
        "norms": tuple(norms),
        "applied": (True,) * steps,
        "cut_to": (None,) * steps,
        "calibrating": (False,) * steps,
        "update_ratios": {},
        "recurrent_update_ratio": None,
        "seconds": 0.1,
    }
    return Trial(**known | fields)


def test_a_spike_is_above_ten_running_medians() -> None:
    found = trial([1.0, 2.0, 3.0, 4.0, 5.0, 30.0, 36.0, 1.0])
    assert found.spikes == (6,)  # medians before: 3 at step 5, so 30 is not above; 3.5 at step 6
    assert found.spike_rate == 1 / 8
    assert found.median_norm == 3.5


def test_the_running_median_looks_back_200_steps() -> None:
    norms = [100.0] * 150 + [1.0] * 200 + [11.0]
    assert trial(norms).spikes == (350,)
    assert trial([*norms[10:-2], 11.0]).spikes == (339,)
    assert trial([100.0] * 150 + [1.0] * 60 + [11.0]).spikes == ()


def test_a_high_start_and_a_short_trial_are_no_spikes() -> None:
    assert trial([500.0, 200.0, 50.0, 3.0, 1.0, 1.0]).spikes == ()
    assert trial([1.0, 100.0, 1.0]).spikes == ()


def test_a_first_step_that_explodes_is_a_spike() -> None:
    assert trial([1e19, 1.5, 1.3, 0.9, 1.7, 1.5]).spikes == (0,)
    assert trial([math.inf, 1.0, 20.0, 1.0, 1.0, 1.0]).spikes == (0, 2)


def test_the_rise_of_a_loss_about_zero() -> None:
    fields = {"losses": (0.01, -0.03, 0.01, -0.03), "starts": (0.02, -0.04)}
    found = trial([1.0] * 4, **fields).loss_rise
    assert found == pytest.approx(0.0, abs=1e-12)
    risen = trial([1.0] * 4, losses=(0.02, -0.04, 0.05, -0.01), starts=(0.02, -0.04))
    assert risen.loss_above_start == pytest.approx(0.03)
    assert risen.loss_rise == pytest.approx(0.03 / 0.03)


def test_a_rise_within_the_noise_of_the_loss_is_none() -> None:
    fields = {"losses": (1.0, 1.0, 1.3, 1.3), "starts": (1.0, 1.0)}
    for noise, rise in ((0.0, 0.3), (0.1, 0.3), (0.2, 0.0)):  # two errors: 2 x noise here
        assert trial([1.0] * 4, **fields, noise=noise).loss_rise == pytest.approx(rise)


def test_too_few_steps_tell_of_no_rise() -> None:
    assert trial([1.0] * 3, starts=(1.0,)).loss_rise is None
    assert trial([1.0] * 4, losses=(0.0,) * 4, starts=(0.0,)).loss_rise is None


def test_what_stays_below_the_clip_is_no_spike() -> None:
    norms = [0.01] * 6 + [0.5]
    assert trial(norms).spikes == (6,)
    assert trial(norms, clip=1.0).spikes == ()
    cut = (None,) * 6 + (0.4,)
    assert trial(norms, clip=1.0, cut_to=cut).spikes == (6,)


def test_nonfinite_steps_are_spikes_unless_a_scaler_calibrates() -> None:
    norms = [math.inf, math.inf, 1.0, math.nan, 1.0]
    found = trial(
        norms,
        losses=(1.0, 1.0, math.nan, 1.0, 1.0),
        calibrating=(True, True, False, False, False),
        applied=(False, False, True, False, True),
    )
    assert found.calibration_steps == (0, 1)
    assert found.nonfinite_steps == found.spikes == (2, 3)
    assert found.spike_rate == 2 / 3
    assert found.skipped == (0, 1, 3)
    assert found.median_norm == 1.0


def test_shares_of_clipped_steps() -> None:
    found = trial([3.0, 1.0, 2.0, 1.0], cut_to=(1.0, None, 1.0, None))
    assert found.clipped == (True, False, True, False)
    assert found.clip_fraction == 0.5


def test_the_loss_change_is_that_of_the_outer_fifths() -> None:
    losses = numpy.random.default_rng(0).normal(size=25) - numpy.arange(25)
    found = trial([1.0] * 25, losses=tuple(losses.tolist()))
    first, last = losses[:5], losses[-5:]
    error = numpy.sqrt(first.var(ddof=1) / 5 + last.var(ddof=1) / 5)
    assert found.loss_change == pytest.approx(last.mean() - first.mean(), abs=1e-12)
    assert found.loss_change_stderr == pytest.approx(error, abs=1e-12)
    assert found.improved is True
    rising = trial([1.0] * 25, losses=tuple((-losses).tolist()))
    assert rising.improved is False


def test_a_fall_from_where_the_first_steps_threw_it_is_no_improvement() -> None:
    losses = (0.7, 90.0, *range(80, 32, -2))
    found = trial([1.0] * 26, losses=losses)
    assert found.loss_change is not None and found.loss_change < -10
    assert found.loss_above_start == pytest.approx(38.0 - 0.7)
    assert found.improved is None


def test_noise_is_no_change() -> None:
    unclear = 0
    for seed in range(200):
        losses = numpy.random.default_rng(seed).normal(size=50)
        unclear += trial([1.0] * 50, losses=tuple(losses.tolist())).improved is None
    assert unclear >= 180  # two standard errors cover 95 %, a little less with 10 steps each


def test_a_loss_that_ends_in_nan_has_not_improved() -> None:
    found = trial([1.0] * 10, losses=(1.0,) * 8 + (math.nan,) * 2)
    assert (found.improved, found.loss_change, found.loss_change_stderr) == (False, None, None)


def test_too_few_steps_say_nothing() -> None:
    few = trial([1.0] * 3)
    assert few.loss_change is None and few.improved is None
    none = trial([], stopped=Stop(step=0, stage="time", words="the time was up"))
    assert (none.steps, none.spike_rate, none.median_norm, none.improved) == (0, 0.0, None, None)
    assert str(none.stopped) == "step 0: the time was up"


def test_the_way_through_json() -> None:
    place = FirstNonfinite(step=1, batch=0, phase="backward", path="rnn", time=7, operation="lstm")
    found = trial([1.0, math.inf], losses=(math.nan, 2.0), first_nonfinite=place)
    again = Trial.model_validate_json(found.model_dump_json())
    assert math.isnan(again.losses[0]) and again.norms == (1.0, math.inf)
    assert again.first_nonfinite == place
    assert again.spikes == found.spikes


def test_the_loss_is_held_against_that_of_the_same_batch() -> None:
    """Of two batches the second is harder; that is no rise."""
    losses = tuple(float(1 + 4 * (step % 2)) for step in range(10))
    alone = trial([1.0] * 10, losses=losses)
    paired = trial([1.0] * 10, losses=losses, starts=(1.0, 5.0))
    assert (alone.loss_above_start, paired.loss_above_start) == (2.0, 0.0)
