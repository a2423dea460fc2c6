"""Lyapunov exponents against recurrences whose spectrum is known exactly or from theory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from factories import first_layer, zeroed
from torch import Tensor, nn

from rnnguard.inspection.gates import GATES
from rnnguard.probe.exponents import exponents
from rnnguard.probe.steps import Trajectory

FLOOR = -30.0  # nats; what is zero up to rounding lies below it


def spectrum(trajectory: Trajectory, count: int, warmup: int = 20) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    found = exponents(trajectory, count=count, generator=generator, warmup=warmup)
    return [exponent.value for exponent in found]


def silence(steps: int, batch: int = 1, width: int = 1) -> Tensor:
    return torch.zeros(steps, batch, width, dtype=torch.float64)


def plain_rnn(matrix: Tensor, inputs: Tensor | None = None) -> nn.RNN:
    """A tanh RNN with this recurrent matrix and no bias; at its zero state it is linear."""
    size = len(matrix)
    width = 1 if inputs is None else inputs.shape[1]
    module = nn.RNN(width, size, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.get_parameter("weight_hh_l0").copy_(matrix)
        if inputs is not None:
            module.get_parameter("weight_ih_l0").copy_(inputs)
    return module


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def gaussian(size: int, gain: float) -> Tensor:
    return torch.randn(size, size, dtype=torch.float64) * gain / math.sqrt(size)


def forced(cell: type[nn.RNNBase], gate: str, value: float, hidden: int) -> nn.RNNBase:
    """All weights 0, and one gate's bias such that the gate has this value."""
    module = cell(1, hidden, dtype=torch.float64)
    spec = GATES["lstm" if cell is nn.LSTM else "gru"]
    with torch.no_grad():
        zeroed(module).get_parameter("bias_ih_l0")[spec.block(gate, hidden)] = math.log(
            value / (1 - value)
        )
    return module


@pytest.mark.parametrize("gain", [0.1, 0.9, 1.0, 3.0])
def test_scaled_orthogonal(gain: float) -> None:
    found = spectrum(first_layer(plain_rnn(gain * orthogonal(12)), silence(60)), count=12)
    assert found == pytest.approx([math.log(gain)] * 12, abs=1e-12)


def test_any_linear_recurrence() -> None:
    matrix = gaussian(6, 0.9)
    found = spectrum(first_layer(plain_rnn(matrix), silence(3000)), count=6)
    moduli = torch.linalg.eigvals(matrix).abs().sort(descending=True).values
    assert found == pytest.approx(moduli.log().tolist(), abs=1e-3)
    assert found == sorted(found, reverse=True)


def test_a_contractive_tanh_rnn_without_input_has_its_spectral_radius() -> None:
    matrix = 0.9 * orthogonal(16) + 0.2 * gaussian(16, 1.0)
    radius = float(torch.linalg.eigvals(matrix).abs().max())
    assert radius < 1
    start = 0.1 * torch.randn(4, 16, dtype=torch.float64)
    trajectory = first_layer(plain_rnn(matrix), silence(1500, 4), start)
    (leading,) = spectrum(trajectory, count=1, warmup=300)
    assert leading == pytest.approx(math.log(radius), abs=1e-3)


@pytest.mark.parametrize(("gain", "expected"), [(2.0, 0.152), (3.0, 0.301)])
def test_mean_field_without_input(gain: float, expected: float) -> None:
    start = torch.randn(1, 400, dtype=torch.float64)
    trajectory = first_layer(plain_rnn(gaussian(400, gain)), silence(400), start)
    (leading,) = spectrum(trajectory, count=1, warmup=100)
    assert leading == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("gain", "drive", "expected"), [(1.0, 1.0, -0.4595), (2.0, 0.25, 0.1204)])
def test_mean_field_under_drive(gain: float, drive: float, expected: float) -> None:
    size = 400
    eye = torch.eye(size, dtype=torch.float64)
    x = math.sqrt(drive) * torch.randn(300, 2, size, dtype=torch.float64)
    trajectory = first_layer(plain_rnn(gaussian(size, gain), eye), x)
    (leading,) = spectrum(trajectory, count=1, warmup=100)
    assert leading == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
def test_an_lstm_with_nothing_but_a_forget_gate(keep: float) -> None:
    hidden = 4
    trajectory = first_layer(forced(nn.LSTM, "f", keep, hidden), silence(80))
    found = spectrum(trajectory, count=2 * hidden)
    assert found[:hidden] == pytest.approx([math.log(keep)] * hidden, abs=1e-12)
    assert max(found[hidden:]) < FLOOR
    assert all(math.isfinite(value) for value in found)


def test_a_decaying_cell_state_only_delays_it() -> None:
    state = torch.zeros(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    trajectory = first_layer(forced(nn.LSTM, "f", 0.9, 4), silence(600), *state)
    found = spectrum(trajectory, count=4, warmup=150)
    assert found == pytest.approx([math.log(0.9)] * 4, abs=1e-6)


@pytest.mark.parametrize("keep", [0.3, 0.95])
def test_a_gru_keeps_with_z(keep: float) -> None:
    found = spectrum(first_layer(forced(nn.GRU, "z", keep, 5), silence(60)), count=5)
    assert found == pytest.approx([math.log(keep)] * 5, abs=1e-12)


@pytest.mark.parametrize(
    ("build", "forget_bias", "expected", "within"),
    [
        (nn.RNN, 0.0, -0.549, 0.04),
        (nn.GRU, 0.0, -0.4395, 0.01),
        (nn.LSTM, 0.0, -0.4395, 0.01),
        (nn.LSTM, 1.0, -0.133, 0.01),
    ],
)
def test_default_weights(
    build: Callable[..., nn.RNNBase], forget_bias: float, expected: float, within: float
) -> None:
    hidden = 512
    module = build(4, hidden)
    if forget_bias:
        with torch.no_grad():
            module.get_parameter("bias_ih_l0")[hidden : 2 * hidden] += forget_bias
    trajectory = first_layer(module, 0.1 * torch.randn(150, 2, 4))
    (leading,) = spectrum(trajectory, count=1, warmup=50)
    assert leading == pytest.approx(expected, abs=within)


@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU])
def test_default_weights_over_seeds(build: Callable[..., nn.RNNBase]) -> None:
    """One matrix of 512 rows may miss the limit of wide layers by 0.012; their mean does not."""
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        trajectory = first_layer(build(4, 512), 0.01 * torch.randn(256, 2, 4))
        found += spectrum(trajectory, count=1)
    assert sum(found) / 4 == pytest.approx(-0.4395, abs=0.01)


def test_a_chaotic_lstm_of_two_units() -> None:
    """Laurent and von Brecht, ICLR 2017; block order i, f, g, o."""
    rows = [[-10, -10], [10, 10], [-10, -10], [10, 10], [10, -80], [80, -10], [10, -10], [10, -10]]
    module = nn.LSTM(1, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.get_parameter("weight_hh_l0").copy_(torch.tensor(rows))
    start = 0.1 * torch.randn(8, 2, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    found = spectrum(first_layer(module, silence(2000, 8), *start), count=4, warmup=200)
    assert found[:2] == pytest.approx([0.220, -0.437], abs=0.02)
    assert found[2] == pytest.approx(-3.11, abs=0.1)
    assert found[3] < -20


def test_the_error_covers_the_truth() -> None:
    """The default GRU's exponent from short sequences, against the long-run one."""
    module = nn.GRU(3, 32)
    (long,) = spectrum(first_layer(module, torch.randn(1500, 4, 3)), count=1)
    (short,) = exponents(
        first_layer(module, torch.randn(200, 16, 3)),
        count=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert 0 < short.stderr < 0.02
    assert abs(short.value - long) < 4 * short.stderr + 0.005


def test_one_sequence_still_has_an_error() -> None:
    trajectory = first_layer(nn.GRU(3, 16), torch.randn(100, 1, 3))
    (found,) = exponents(trajectory, count=1, generator=torch.Generator().manual_seed(0))
    assert 0 < found.stderr < 0.1


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_something_is_left_of_short_sequences(steps: int) -> None:
    trajectory = first_layer(plain_rnn(0.5 * orthogonal(4)), silence(steps))
    assert spectrum(trajectory, count=1, warmup=20) == pytest.approx([math.log(0.5)], abs=1e-12)


def test_half_of_the_steps_are_warm_up() -> None:
    """A keep gate that the input opens for the second half."""
    module = zeroed(nn.GRU(1, 4, dtype=torch.float64))
    with torch.no_grad():
        module.get_parameter("weight_ih_l0")[GATES["gru"].block("z", 4)] = math.log(0.9 / 0.1)
    x = torch.cat([silence(30), silence(30) + 1])
    (found,) = exponents(first_layer(module, x), count=1, generator=torch.Generator())
    assert found.value == pytest.approx(math.log(0.9), abs=1e-12)


def test_steps_behind_an_end_do_not_count() -> None:
    """A frozen state behind the end would otherwise be taken for a decay of its own."""
    module, x = nn.GRU(3, 8, dtype=torch.float64), torch.randn(60, 1, 3, dtype=torch.float64)
    padded = torch.cat([x, torch.zeros(140, 1, 3, dtype=torch.float64)])
    alone = spectrum(first_layer(module, x), count=2, warmup=15)
    behind = spectrum(first_layer(module, padded, lengths=[60]), count=2, warmup=15)
    assert behind == pytest.approx(alone, abs=1e-12)
    assert spectrum(first_layer(module, padded), count=2, warmup=15) != pytest.approx(
        alone, abs=1e-3
    )


def test_the_seed_decides() -> None:
    trajectory = first_layer(nn.GRU(3, 8), torch.randn(40, 2, 3))
    assert spectrum(trajectory, count=3) == spectrum(trajectory, count=3)


def test_no_more_exponents_than_dimensions() -> None:
    assert len(spectrum(first_layer(nn.GRU(3, 2), torch.randn(30, 1, 3)), count=8)) == 2
