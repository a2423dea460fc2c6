"""Retention by lag against closed forms, the renormalisation, and the traps around them."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from factories import first_layer, only_site, run_readings, zeroed
from hypothesis import given
from hypothesis import strategies as st
from test_exponents import orthogonal, plain_rnn, silence
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnguard.decision.diagnosis import level_of
from rnnguard.measurements import SiteReadings
from rnnguard.probe.readings import Memory, measure_site
from rnnguard.probe.retention_curve import (
    SILENCE,
    RetentionCurve,
    effective_length,
    log10_retention,
    log10_retention_of,
    upper_envelope,
    weakest_direction,
)
from rnnguard.probe.steps import Trajectory
from rnnguard.records import Level


def curve_of(trajectory: Trajectory, vectors: int = 8, seed: int = 3) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return list(log10_retention(trajectory, vectors=vectors, generator=generator).log10)


def readings(model: nn.Module, x: Tensor, memory: int | None = None) -> SiteReadings:
    found = only_site(model, x)
    needed = Memory(memory or found.record.steps, "declared")
    return measure_site(found, needed, seed=0, trained=False)


def level(site: SiteReadings) -> Level:
    return level_of(site, run_readings())


def test_the_mean_over_vectors_is_the_frobenius_norm() -> None:
    """E |J'v|^2 = |J|_F^2 for v ~ N(0, Id), here of every power of one matrix."""
    matrix = 0.3 * torch.randn(6, 6, dtype=torch.float64)
    found = curve_of(first_layer(plain_rnn(matrix), silence(10)), vectors=4000)
    for lag, value in enumerate(found):
        power = torch.linalg.matrix_power(matrix, lag)
        assert value == pytest.approx(math.log10(power.norm() / math.sqrt(6)), abs=0.03)


def test_it_is_autograds_gradient() -> None:
    """The gradient of v . s_T, taken through torch's own cell step by step."""
    module = nn.LSTM(3, 4, dtype=torch.float64)
    x = torch.randn(12, 1, 3, dtype=torch.float64)
    v = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[0, 0]
    zero = torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True)
    states: list[tuple[Tensor, Tensor]] = [(zero, zero.detach().clone().requires_grad_())]
    for step in x:
        states.append(module(step[None], states[-1])[1])
    aimed = (torch.cat(states[-1], -1).flatten() * v).sum()
    expected = []
    for h, c in reversed(states):
        grads = torch.autograd.grad(aimed, (h, c), retain_graph=True, allow_unused=True)
        norm = torch.cat([g.flatten() for g in grads if g is not None]).norm()
        expected.append(math.log10(norm / v.norm()))
    assert curve_of(first_layer(module, x), vectors=1) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("gain", [0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_under_or_overflows(gain: float, dtype: torch.dtype) -> None:
    trajectory = first_layer(plain_rnn(gain * orthogonal(8)).to(dtype), silence(500).to(dtype))
    found = curve_of(trajectory)
    assert found[500] == pytest.approx(500 * math.log10(gain), rel=1e-5)
    assert all(map(math.isfinite, found))


def test_an_exactly_zero_gradient_is_silence() -> None:
    trajectory = first_layer(zeroed(nn.RNN(1, 4)), torch.ones(5, 2, 1))
    assert curve_of(trajectory) == [0.0] + [SILENCE] * 5


def test_padding_changes_nothing() -> None:
    module, x = nn.LSTM(3, 5, dtype=torch.float64), torch.randn(9, 1, 3, dtype=torch.float64)
    padded = torch.cat([x, torch.full((6, 1, 3), 7.0, dtype=torch.float64)])
    alone = curve_of(first_layer(module, x))
    assert curve_of(first_layer(module, padded, lengths=[9])) == pytest.approx(alone, abs=1e-12)
    assert curve_of(first_layer(module, padded)) != pytest.approx(alone + [0.0] * 6, abs=1e-3)


def test_a_packed_batch_is_the_mean_of_its_sequences() -> None:
    """Each lag averages over the sequences that are long enough for it."""
    module = plain_rnn(0.8 * orthogonal(6))
    x, lengths = silence(9, 3), [9, 5, 2]
    found = only_site(module, pack_padded_sequence(x, torch.tensor(lengths)))
    site = measure_site(found, Memory(9, "declared"), seed=0, trained=False)
    assert site.packed and site.steps == 9
    assert site.retention == pytest.approx([k * math.log10(0.8) for k in range(10)], abs=1e-12)


def test_a_sorted_and_an_unsorted_batch_read_alike() -> None:
    module, x = nn.GRU(3, 6, dtype=torch.float64), torch.randn(8, 3, 3, dtype=torch.float64)
    lengths = torch.tensor([3, 8, 5])
    unsorted = only_site(module, pack_padded_sequence(x, lengths, enforce_sorted=False))
    order = lengths.argsort(descending=True)
    ordered = only_site(module, pack_padded_sequence(x[:, order], lengths[order]))
    first, second = (
        measure_site(f, Memory(8, "declared"), seed=0, trained=False) for f in (unsorted, ordered)
    )
    assert first.retention == second.retention


@pytest.mark.parametrize(
    ("curve", "epsilon", "expected"),
    [
        ([0.0, -1.0, -1.9, -2.1, -3.0], 1e-2, 2),
        ([0.0, -1.0, -2.0], 1e-2, 2),
        ([0.0, -3.0, -1.0], 1e-2, 0),
        ([0.0, 0.5, 1.0], 1e-2, 2),
        ([0.0, -1.0, -1.9], 0.05, 1),
        ([0.0], 1e-2, 0),
    ],
)
def test_effective_length(curve: list[float], epsilon: float, expected: int) -> None:
    assert effective_length(curve, epsilon) == expected


@cache
def multiplied(sequences: int, spread: float) -> list[RetentionCurve]:
    """200 curves of a recurrence that multiplies its whole state by exp(spread z) at each step."""
    found = []
    for seed in range(200):
        logs = spread * torch.randn(9, sequences, dtype=torch.float64)

        def pull(lag: int, g: Tensor, logs: Tensor = logs) -> Tensor:
            return g * logs[lag].exp()[:, None, None]

        found.append(
            log10_retention_of(
                pull, batch=sequences, state_size=4, steps=8, vectors=8,
                generator=torch.Generator().manual_seed(seed),
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("sequences", "spread", "least"), [(4, 0.08, 0.9), (8, 0.08, 0.9), (8, 0.4, 0.75)]
)
def test_the_interval_covers_the_truth(sequences: int, spread: float, least: float) -> None:
    """At lag 8 the sequences' R differ by 0.1 decades, or by 0.5; rms: log10 R = k spread^2."""
    curves = multiplied(sequences, spread)
    truth = 8 * spread**2 / math.log(10)
    bounds = [curve.interval[8] for curve in curves]
    assert least <= sum(low <= truth <= high for low, high in bounds) / 200 <= 0.99
    assert {curve.freedom[8] for curve in curves} == {sequences - 1}


def test_the_errors_are_the_spread_of_the_estimates() -> None:
    curves = multiplied(8, 0.08)
    for lag in (1, 4, 8):
        actual = float(torch.tensor([curve.log10[lag] for curve in curves]).std())
        claimed = sum(curve.stderr[lag] for curve in curves) / 200
        assert claimed == pytest.approx(actual, rel=0.15)


def test_over_vectors_where_there_is_one_sequence() -> None:
    """The Frobenius norm of one matrix, from 12 random directions."""
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64))
    truth, covered = math.log10(float(matrix.norm()) / 2), 0
    for seed in range(200):
        found = log10_retention_of(
            lambda lag, g: g @ matrix, batch=1, state_size=4, steps=1, vectors=12,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        assert found.freedom == (0, 11)
        covered += found.interval[1][0] <= truth <= found.interval[1][1]
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("own", "jackknife_is_larger"), [((9.0, 1, 1, 1, 1), True),
                                                        ((0.1, 1, 1, 1, 1), False)])  # fmt: skip
def test_the_error_written_out(own: tuple[float, ...], jackknife_is_larger: bool) -> None:
    """Five sequences that keep so much each; every one left out of the ratio of sums in turn."""
    factors = torch.tensor(own, dtype=torch.float64)
    options: dict[str, Any] = {"batch": 5, "state_size": 6, "steps": 1, "vectors": 3}
    found = log10_retention_of(
        lambda lag, g: g * factors[:, None, None],
        generator=torch.Generator().manual_seed(2), **options,
    )  # fmt: skip
    start = torch.randn(
        5, 3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ).square().sum((1, 2))  # fmt: skip
    kept = factors**2 * start
    leave = [(kept.sum() - kept[i]) / (start.sum() - start[i]) for i in range(5)]
    each = torch.stack(leave).log10() / 2
    jackknife = float(((each - each.mean()).square().sum() * 4 / 5).sqrt())
    apart = float(factors.log10().std() / math.sqrt(5))
    assert (jackknife > apart) is jackknife_is_larger
    assert found.stderr[1] == pytest.approx(max(jackknife, apart), rel=1e-12)
    assert found.log10[1] == pytest.approx(float((kept.sum() / start.sum()).log10() / 2), rel=1e-12)


def test_silence_has_no_error_and_one_loud_sequence_says_nothing() -> None:
    def pull(lag: int, g: Tensor) -> Tensor:
        return g * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[:, None, None] ** (lag - 1)

    generator = torch.Generator().manual_seed(0)
    found = log10_retention_of(pull, batch=3, state_size=2, steps=3, vectors=4, generator=generator)
    assert found.stderr[1] == pytest.approx(0.0, abs=1e-12)
    low, high = found.interval[3]
    assert low == SILENCE < found.log10[3] < high
    zero = curve_of(first_layer(zeroed(nn.RNN(1, 4)), torch.ones(5, 2, 1)))
    assert zero == [0.0] + [SILENCE] * 5


def straight(slope: float, error: float, freedom: int = 7, steps: int = 40) -> RetentionCurve:
    """A curve that loses `slope` decades per step, with an error that grows with the lag."""
    lags = range(steps + 1)
    return RetentionCurve(
        tuple(-slope * lag for lag in lags),
        tuple(error * lag for lag in lags),
        (freedom,) * len(lags),
    )


def test_bounds_of_the_effective_length() -> None:
    """t = 2.3646 at 7 degrees of freedom: the bounds lose 0.1 +- 0.0236 decades per step."""
    found = straight(0.1, 0.01)
    assert found.effective_length() == 20
    assert found.effective_length_interval() == (int(2 / 0.123646), int(2 / 0.076354))
    assert found.effective_length_interval(1e-9) == (40, 40)
    assert straight(0.1, 0.0).effective_length_interval() == (20, 20)


def test_the_curve_and_its_bounds_go_on_behind_their_end() -> None:
    found = straight(0.1, 0.01)
    assert found.at(30) == pytest.approx(-3.0)
    assert found.at(100) == pytest.approx(-10.0)
    assert found.interval_at(100) == pytest.approx((-12.3646, -7.6354), abs=1e-3)
    assert straight(500.0, 0.0).at(41) == SILENCE


def test_one_vector_of_one_sequence_leaves_all_open() -> None:
    found = straight(0.1, 0.0, freedom=0)
    assert found.interval[0] == (0.0, 0.0)
    assert found.interval[1] == (SILENCE, math.inf)


def test_the_envelope_takes_value_and_error_together() -> None:
    early, late = straight(0.1, 0.01), straight(0.2, 0.02, freedom=3)
    assert upper_envelope([late, early]) == early
    steep = RetentionCurve((0.0, -1.0, -3.0), (0.0, 0.1, 0.2), (4, 4, 4))
    flat = RetentionCurve((0.0, -2.0, -2.0), (0.0, 0.3, 0.4), (2, 2, 2))
    joint = upper_envelope([steep, flat])
    assert joint.log10 == (0.0, -1.0, -2.0)
    assert joint.stderr[1:] == (0.1, 0.4)
    assert joint.freedom[1:] == (4, 2)


def test_the_weakest_direction_is_judged_by_its_best_layer() -> None:
    bad, good, fair = straight(0.5, 0.0), straight(0.01, 0.0), straight(0.1, 0.0)
    curves = [("forward", bad), ("reverse", fair), ("forward", good), ("reverse", bad)]
    assert weakest_direction(curves, 40) == ("reverse", fair)


@given(st.lists(st.floats(-4, 1), max_size=12), st.sampled_from([1e-3, 1e-2, 0.5]))
def test_effective_length_is_its_definition(tail: list[float], epsilon: float) -> None:
    curve = [0.0, *tail]
    kept = [10**value >= epsilon * (1 - 1e-12) for value in curve]
    expected = max(k for k in range(len(curve)) if all(kept[: k + 1]))
    assert effective_length(curve, epsilon) == expected


class Tagger(nn.Module):
    """An LSTM with long memory whose last step is read; keeps the fused output for a hook."""

    def __init__(self, forget_bias: float = 3.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 16, batch_first=True)
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            self.lstm.get_parameter("bias_ih_l0")[16:32] = forget_bias
            self.lstm.get_parameter("bias_ih_l0")[:16] = -forget_bias

    def forward(self, x: Tensor) -> Tensor:
        self.seen, _ = self.lstm(x)
        if self.seen.requires_grad:
            self.seen.retain_grad()
        return self.head(self.seen[:, -1])


def test_zeros_at_a_fused_output_are_no_verdict() -> None:
    model, x = Tagger(), torch.randn(4, 30, 3)
    model(x).sum().backward()
    assert model.seen.grad is not None
    assert float(model.seen.grad[:, :-1].abs().max()) == 0.0
    assert level(readings(model, x)) == "healthy"
    assert level(readings(Tagger(forget_bias=-3.0), x)) == "vanishing"


class Chunked(nn.Module):
    """A sequence in chunks of 10 steps, with or without a detach between them."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.lstm, self.detach = Tagger().lstm, detach

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for chunk in x.split(10, 1):
            out, state = self.lstm(chunk, state)
            if self.detach:
                state = tuple(s.detach() for s in state)
        return out[:, -1]


def test_a_detach_truncates_and_does_not_vanish() -> None:
    x = torch.randn(4, 30, 3, requires_grad=True)
    cut = readings(Chunked(detach=True), x)
    assert (cut.steps, cut.window) == (30, 10)
    assert level(cut) == "truncated"
    whole = readings(Chunked(detach=False), x)
    assert (whole.steps, whole.window) == (30, 30)
    assert level(whole) == "healthy"
    (gradient,) = torch.autograd.grad(Chunked(detach=True)(x).sum(), x)
    assert float(gradient[:, :20].abs().max()) == 0.0
    assert float(gradient[:, 20:].abs().max()) > 0.0


def test_a_window_that_suffices_is_not_truncated() -> None:
    assert level(readings(Chunked(detach=True), torch.randn(4, 30, 3), memory=8)) == "healthy"


def test_the_last_step_does_not_shorten_the_reverse_direction() -> None:
    """Read at the last step, its gradient has lag one; its own memory is that of the module."""
    module = nn.GRU(3, 8, bidirectional=True, dtype=torch.float64)
    x = torch.randn(20, 4, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[0][-1, :, 8:].sum(), x)
    assert float(gradient[:-1].abs().max()) == 0.0
    site = readings(module, x.detach())
    reverse = next(layer for layer in site.layer_readings if layer.direction == "reverse")
    alone = nn.GRU(3, 8, dtype=torch.float64)
    for name, parameter in alone.named_parameters():
        parameter.data = module.get_parameter(f"{name}_reverse").detach()
    flipped = readings(alone, x.detach().flip(0)).layer_readings[0]
    assert reverse.retention == pytest.approx(flipped.retention, abs=1e-12)


def test_the_worse_direction_is_the_sites() -> None:
    module = nn.LSTM(3, 16, bidirectional=True)
    with torch.no_grad():
        for suffix, bias in (("", 4.0), ("_reverse", -4.0)):
            module.get_parameter(f"bias_ih_l0{suffix}")[16:32] = bias
            module.get_parameter(f"bias_ih_l0{suffix}")[:16] = -bias
    site = readings(module, torch.randn(40, 4, 3))
    forward, reverse = site.layer_readings
    assert forward.retention[40] > -0.5 > -10 > reverse.retention[40]
    assert site.retention == reverse.retention


def test_of_stacked_layers_the_longest_memory_carries() -> None:
    module = nn.LSTM(3, 16, num_layers=2)
    with torch.no_grad():
        module.get_parameter("bias_ih_l1")[16:32] = 4.0
        module.get_parameter("bias_ih_l1")[:16] = -4.0
    site = readings(module, torch.randn(40, 4, 3))
    lower, upper = site.layer_readings
    assert lower.retention[40] < -3
    assert upper.retention[40] > -0.5
    assert site.retention[40] == upper.retention[40]
