"""Lyapunov exponents: errors and intervals, ends, warm-up; the oracles are in test_oracles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from factories import first_layer, zeroed
from torch import Tensor, nn

from rnnguard.inspection.gates import GATES
from rnnguard.measurements import Exponent
from rnnguard.probe.exponents import exponents, exponents_of
from rnnguard.probe.functions import lyapunov_exponents
from rnnguard.probe.steps import Trajectory


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


def test_a_decaying_cell_state_only_delays_it() -> None:
    state = torch.zeros(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    trajectory = first_layer(forced(nn.LSTM, "f", 0.9, 4), silence(600), *state)
    found = spectrum(trajectory, count=4, warmup=150)
    assert found == pytest.approx([math.log(0.9)] * 4, abs=1e-6)


def scalar(logs: Tensor) -> Exponent:
    """The exponent of a recurrence of one unit that multiplies by exp(logs), (steps, B)."""
    (found,) = exponents_of(
        lambda step, q: logs[step].exp()[:, None, None] * q,
        batch=logs.shape[1], state_size=1, steps=len(logs), count=1,
        generator=torch.Generator(), warmup=0,
    )  # fmt: skip
    return found


def correlated(steps: int, batch: int, along: float) -> Tensor:
    """Noise of mean -0.5 and spread 1 whose neighbours correlate by `along`."""
    x = torch.randn(steps, batch, dtype=torch.float64)
    for step in range(1, steps):
        x[step] = along * x[step - 1] + math.sqrt(1 - along**2) * x[step]
    return x - 0.5


def coverage(draws: list[Exponent], truth: float) -> float:
    return sum(d.interval[0] <= truth <= d.interval[1] for d in draws) / len(draws)


def test_the_interval_covers_the_truth_over_sequences() -> None:
    """Four standard errors of a share of 300 are 0.05."""
    draws = [scalar(correlated(20, 5, 0.9)) for _ in range(300)]
    assert {draw.freedom for draw in draws} == {4}
    assert coverage(draws, -0.5) == pytest.approx(0.95, abs=0.05)


@pytest.mark.parametrize(("along", "least"), [(0.8, 0.86), (0.95, 0.75)])
def test_the_interval_of_one_sequence_knows_of_time(along: float, least: float) -> None:
    """With neighbours that correlate by 0.8, steps taken for independent would cover 0.49."""
    draws = [scalar(correlated(200, 1, along)) for _ in range(100)]
    assert {draw.freedom for draw in draws} == {4}
    assert least <= coverage(draws, -0.5) <= 0.99


def test_the_intervals_of_a_network_cover_its_long_run() -> None:
    """A GRU's leading exponent from 8 sequences, over 40 draws; the errors are no wider than so."""
    module, batch = nn.GRU(3, 12), 320
    (long,) = spectrum(first_layer(module, torch.randn(2000, 4, 3)), count=1)
    logs, trajectory = [], first_layer(module, torch.randn(140, batch, 3))
    for start in range(0, batch, 8):
        part = replace(
            trajectory,
            outputs=trajectory.outputs[:, start : start + 8],
            factors={n: f[:, start : start + 8] for n, f in trajectory.factors.items()},
            lengths=trajectory.lengths[start : start + 8],
        )
        logs += exponents(part, count=1, generator=torch.Generator().manual_seed(0), warmup=40)
    assert coverage(logs, long) >= 0.85
    spread = torch.tensor([draw.value for draw in logs]).std()
    assert sum(draw.stderr for draw in logs) / len(logs) == pytest.approx(float(spread), rel=0.35)


def test_an_interval_is_students() -> None:
    low, high = Exponent(value=1.0, stderr=0.1, freedom=4).interval
    assert (low, high) == pytest.approx((1 - 0.27764, 1 + 0.27764), abs=1e-5)
    assert Exponent(value=0.0, stderr=1.0).interval == pytest.approx((-1.95996, 1.95996), abs=1e-5)
    assert Exponent(value=0.0, stderr=0.0, freedom=0).interval == (-math.inf, math.inf)


def test_one_step_of_one_sequence_leaves_all_open() -> None:
    (found,) = exponents(first_layer(nn.GRU(3, 4), torch.randn(1, 1, 3)), count=1,
                         generator=torch.Generator())  # fmt: skip
    assert (found.stderr, found.freedom) == (0.0, 0)


def test_equal_sequences_have_no_error() -> None:
    found = scalar(torch.full((30, 4), -0.3, dtype=torch.float64))
    assert found.interval == pytest.approx((-0.3, -0.3), abs=1e-12)


def test_a_push_of_autograd_is_detached() -> None:
    """What the caller's grad mode leaves on the product must not hold all steps in memory."""
    weight = nn.Parameter(0.5 * torch.eye(3, dtype=torch.float64))
    seen: list[bool] = []

    def push(step: int, q: Tensor) -> Tensor:
        seen.append(q.requires_grad)
        return weight @ q

    found = exponents_of(push, batch=2, state_size=3, steps=9, count=2, generator=torch.Generator())
    assert [f.value for f in found] == pytest.approx([math.log(0.5)] * 2, abs=1e-12)
    assert seen == [False] * 9


def test_a_stack_is_the_union_of_its_layers() -> None:
    """The joint Jacobian of two layers, by autograd, against each layer on its own."""
    module = nn.GRU(2, 3, num_layers=2, dtype=torch.float64)
    with torch.no_grad():
        module.get_parameter("bias_ih_l1")[3:6] += 2.0
    x = torch.randn(700, 1, 2, dtype=torch.float64)
    state = torch.zeros(6, dtype=torch.float64)

    def push(step: int, q: Tensor) -> Tensor:
        nonlocal state

        def moved(joint: Tensor) -> Tensor:
            return module(x[step : step + 1], joint.view(2, 1, 3))[1].flatten()

        whole = torch.autograd.functional.jacobian(moved, state)
        state = moved(state).detach()
        assert isinstance(whole, Tensor)
        return whole @ q

    joint = exponents_of(
        push, batch=1, state_size=6, steps=700, count=6, generator=torch.Generator(), warmup=200
    )
    alone = lyapunov_exponents(module, x, k=6, warmup=200)
    assert [e.value for e in joint] == pytest.approx(list(alone.values), abs=5e-3)
    assert [entry.layer for entry in alone][:3] == [1, 1, 1]


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
