"""Retention by lag against closed forms, the renormalisation, and the traps around them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from factories import first_layer, only_site, run_readings, zeroed
from hypothesis import given
from hypothesis import strategies as st
from test_exponents import forced, orthogonal, plain_rnn, silence
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnguard.decision.diagnosis import level_of
from rnnguard.probe.readings import Memory, measure_site
from rnnguard.probe.retention_curve import SILENCE, effective_length, log10_retention
from rnnguard.probe.steps import Trajectory
from rnnguard.records import Level, SiteReadings
from rnnguard.remedies.chrono_bias import CHRONO_BIAS
from rnnguard.rewrite.edit import Edit


def curve_of(trajectory: Trajectory, vectors: int = 8, seed: int = 3) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return log10_retention(trajectory, vectors=vectors, generator=generator)


def readings(model: nn.Module, x: Tensor, memory: int | None = None) -> SiteReadings:
    found = only_site(model, x)
    needed = Memory(memory or found.record.steps, "declared")
    return measure_site(found, needed, seed=0, trained=False)


def level(site: SiteReadings) -> Level:
    return level_of(site, run_readings())


@pytest.mark.parametrize("gain", [0.1, 0.9, 1.0, 3.0])
def test_scaled_orthogonal_for_every_vector(gain: float) -> None:
    trajectory = first_layer(plain_rnn(gain * orthogonal(12)), silence(50))
    expected = [k * math.log10(gain) for k in range(51)]
    assert curve_of(trajectory, vectors=1) == pytest.approx(expected, abs=1e-12)
    assert curve_of(trajectory, vectors=8) == pytest.approx(expected, abs=1e-12)


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


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_an_lstm_with_nothing_but_a_forget_gate(keep: float) -> None:
    """One step back the gradient lies in c alone; from there each lag costs the factor f."""
    found = curve_of(first_layer(forced(nn.LSTM, "f", keep, 6), silence(40)))
    lost = [later - earlier for earlier, later in pairwise(found[1:])]
    assert lost == pytest.approx([math.log10(keep)] * 39, abs=1e-12)


@pytest.mark.parametrize("keep", [0.3, 0.95])
def test_a_gru_keeps_with_z(keep: float) -> None:
    found = curve_of(first_layer(forced(nn.GRU, "z", keep, 6), silence(40)))
    assert found == pytest.approx([k * math.log10(keep) for k in range(41)], abs=1e-12)


@pytest.mark.parametrize(("memory", "expected"), [(50, 0.1505), (784, 0.1483)])
def test_chrono_keeps_a_seventh_on_average(memory: int, expected: float) -> None:
    """E[f^T] at lag T_max is E2(1) = 0.1485 in the limit; weights are zero, so f is its bias."""
    kept = []
    for seed in range(24):
        module = zeroed(nn.LSTM(1, 256))
        CHRONO_BIAS.apply(Edit(module, None), module, {"t_max": memory, "seed": seed})
        with torch.no_grad():
            gate = module.get_parameter("bias_ih_l0")[256:512].double().sigmoid()
        trajectory = first_layer(module, torch.zeros(2, 1, 1))
        assert trajectory.factors["keep"][0, 0].double() == pytest.approx(gate, abs=1e-6)
        kept.append(float((gate**memory).mean()))
    assert sum(kept) / len(kept) == pytest.approx(expected, abs=0.005)


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
