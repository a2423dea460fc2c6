"""The cells' steps against torch's kernels, and their Jacobian products against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import first_layer, only_site
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnguard.inspection.gates import parameter_name
from rnnguard.inspection.sites import SiteInput
from rnnguard.probe.exponents import exponents, exponents_of
from rnnguard.probe.retention_curve import log10_retention, log10_retention_of
from rnnguard.probe.trajectory import trajectories

T, B, F, H = 7, 3, 4, 5
CELLS: dict[str, Callable[..., nn.RNNBase]] = {
    "tanh": lambda **options: nn.RNN(F, H, **options),
    "relu": lambda **options: nn.RNN(F, H, nonlinearity="relu", **options),
    "gru": lambda **options: nn.GRU(F, H, **options),
    "lstm": lambda **options: nn.LSTM(F, H, **options),
    "lstm-projected": lambda **options: nn.LSTM(F, H, proj_size=2, **options),
}
every_cell = pytest.mark.parametrize("name", CELLS)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False])


def lively(name: str, **options: bool | int) -> nn.RNNBase:
    """A float64 module with weights of order one, so that no term of the Jacobian is small."""
    module = CELLS[name](dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.7)
    return module


def states_for(module: nn.RNNBase, batch: int = B) -> tuple[Tensor, ...]:
    """Random states (D, B, n), one or two as the cell takes them."""
    depth = module.num_layers * (2 if module.bidirectional else 1)
    hidden = torch.randn(depth, batch, module.proj_size or H, dtype=torch.float64)
    if not isinstance(module, nn.LSTM):
        return (hidden,)
    return hidden, torch.randn(depth, batch, H, dtype=torch.float64)


def as_torch_takes(states: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return states if len(states) > 1 else states[0]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def jacobian(module: nn.RNNBase, x: Tensor, states: tuple[Tensor, ...]) -> Tensor:
    """The full state Jacobian of one step for one sequence, by autograd."""
    sizes = [state.shape[-1] for state in states]

    def step(joint: Tensor) -> Tensor:
        parts = tuple(part[None, None] for part in joint.split(sizes))
        _, new = module(x[None, None], as_torch_takes(parts))
        return torch.cat([part[0, 0] for part in (new if isinstance(new, tuple) else (new,))])

    joint = torch.cat([state[0] for state in states])
    found = torch.autograd.functional.jacobian(step, joint)
    assert isinstance(found, Tensor)
    return found


@every_cell
@with_and_without_bias
def test_steps_are_torchs(name: str, bias: bool) -> None:
    module, x = lively(name, bias=bias), torch.randn(T, B, F, dtype=torch.float64)
    states = states_for(module)
    expected, _ = module(x, as_torch_takes(states))
    found = first_layer(module, x, *(state[0] for state in states))
    assert (found.outputs - expected).abs().max() < 1e-12


@every_cell
@with_and_without_bias
def test_products_are_autograds(name: str, bias: bool) -> None:
    module, x = lively(name, bias=bias), torch.randn(1, B, F, dtype=torch.float64)
    states = states_for(module)
    found = first_layer(module, x, *(state[0] for state in states))
    factors = {key: value[0] for key, value in found.factors.items()}
    vectors = torch.randn(B, 3, found.state_size, dtype=torch.float64)
    pushed, pulled = found.push(vectors, factors), found.pull(vectors, factors)
    for row in range(B):
        exact = jacobian(module, x[0, row], tuple(state[0, row : row + 1] for state in states))
        assert exact.abs().max() > 1e-2
        assert (pushed[row] - vectors[row] @ exact.T).abs().max() < 1e-10
        assert (pulled[row] - vectors[row] @ exact).abs().max() < 1e-10


def by_autograd(
    module: nn.RNNBase, x: Tensor, states: tuple[Tensor, ...]
) -> tuple[list[Tensor], int]:
    """Each step's Jacobian of the joint state, (T, B, n, n), by autograd on torch's own cell."""
    sizes = [state.shape[-1] for state in states]
    jacobians, joint = [], torch.cat([state[0] for state in states], -1)
    for driven in x:
        rows = [
            jacobian(
                module, driven[row], tuple(part[row : row + 1] for part in joint.split(sizes, -1))
            )
            for row in range(len(joint))
        ]
        jacobians.append(torch.stack(rows))
        parts = tuple(part[None].contiguous() for part in joint.split(sizes, -1))
        with torch.no_grad():
            _, new = module(driven[None], as_torch_takes(parts))
        joint = torch.cat([p[0] for p in (new if isinstance(new, tuple) else (new,))], -1)
    return jacobians, sum(sizes)


@every_cell
def test_exponents_and_retention_are_those_of_autograds_jacobians(name: str) -> None:
    """The closed forms along a trajectory, against the same recurrence fed step by step."""
    module, x = lively(name), torch.randn(T, B, F, dtype=torch.float64)
    states, lengths = states_for(module), torch.tensor([T, 5, 3])
    trajectory = first_layer(module, x, *(state[0] for state in states), lengths=lengths.tolist())
    jacobians, size = by_autograd(module, x, states)

    def pull(lag: int, g: Tensor) -> Tensor:
        own = [jacobians[max(0, int(end) - lag)][row] for row, end in enumerate(lengths)]
        return g @ torch.stack(own)

    # Units that are off leave a Jacobian of low rank, whose further exponents are rounding.
    count = 1 if name == "relu" else 3
    shape: dict[str, Any] = {"batch": B, "state_size": size, "steps": T, "lengths": lengths}
    fed = exponents_of(
        lambda step, q: jacobians[step] @ q, count=count, generator=seeded(), warmup=1, **shape
    )
    own = exponents(trajectory, count=count, generator=seeded(), warmup=1)
    for one, other in zip(own, fed, strict=True):
        assert (one.value, one.stderr) == pytest.approx((other.value, other.stderr), abs=1e-10)
    back = log10_retention_of(pull, vectors=4, generator=seeded(), **shape)
    curve = log10_retention(trajectory, vectors=4, generator=seeded())
    assert curve.log10 == pytest.approx(back.log10, abs=1e-10)
    assert curve.stderr == pytest.approx(back.stderr, abs=1e-10)


def test_the_lstms_state_is_the_pair() -> None:
    assert first_layer(nn.LSTM(F, H), torch.randn(T, B, F)).state_size == 2 * H
    projected = first_layer(nn.LSTM(F, H, proj_size=2), torch.randn(T, B, F))
    assert projected.state_size == H + 2
    assert first_layer(nn.GRU(F, H), torch.randn(T, B, F)).state_size == H


@every_cell
def test_lengths_freeze_the_state(name: str) -> None:
    module, x = lively(name), torch.randn(T, B, F, dtype=torch.float64)
    lengths = [T, 4, 1]
    found = first_layer(module, x, lengths=lengths)
    for row, end in enumerate(lengths):
        alone, _ = module(x[:end, row : row + 1])
        assert (found.outputs[:end, row] - alone[:, 0]).abs().max() < 1e-12
        last = found.outputs[end - 1, row]
        assert torch.equal(found.outputs[end:, row], last.expand(T - end, -1))


@every_cell
def test_factors_at_each_sequences_own_time(name: str) -> None:
    found = first_layer(lively(name), torch.randn(T, B, F, dtype=torch.float64))
    times = torch.tensor([0, 3, 6])
    for key, value in found.factors_at(times).items():
        own = [found.factors[key][t, row] for row, t in enumerate(times.tolist())]
        assert torch.equal(value, torch.stack(own))


@every_cell
@pytest.mark.parametrize("bidirectional", [True, False])
def test_layers_and_directions_are_torchs(name: str, bidirectional: bool) -> None:
    module = lively(name, num_layers=2, bidirectional=bidirectional)
    x, states = torch.randn(T, B, F, dtype=torch.float64), states_for(module)
    expected, _ = module(x, as_torch_takes(states))
    given = SiteInput(x, torch.full((B,), T), states[0], states[1] if states[1:] else None)
    runs = trajectories(module, given, sequences=B, longest=T)
    top = [run for run in runs if run.layer == 1]
    outputs = [
        run.trajectory.outputs if run.direction == "forward" else run.trajectory.outputs.flip(0)
        for run in top
    ]
    assert [run.direction for run in top] == ["forward", "reverse"][: len(top)]
    assert (torch.cat(outputs, -1) - expected).abs().max() < 1e-12


@every_cell
def test_each_packed_sequence_is_reversed_within_its_own_length(name: str) -> None:
    module = lively(name, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(T, B, F, dtype=torch.float64), torch.tensor([T, 5, 2])
    found = only_site(module, pack_padded_sequence(x, lengths))
    runs = trajectories(module, found.input, sequences=B, longest=T)
    width = module.proj_size or H
    for row, end in enumerate(lengths.tolist()):
        alone, _ = module(x[:end, row : row + 1])
        forward, reverse = (run.trajectory.outputs[:end, row] for run in runs[2:])
        assert (forward - alone[:, 0, :width]).abs().max() < 1e-12
        assert (reverse.flip(0) - alone[:, 0, width:]).abs().max() < 1e-12


def test_only_the_first_sequences_and_steps_are_run() -> None:
    module = nn.GRU(F, H)
    given = SiteInput(torch.randn(T, B, F), torch.full((B,), T), torch.zeros(1, B, H), None)
    (run,) = trajectories(module, given, sequences=2, longest=4)
    assert run.trajectory.outputs.shape == (4, 2, H)
    assert run.trajectory.lengths.tolist() == [4, 4]


def test_half_precision_is_run_in_single() -> None:
    module = nn.GRU(F, H, dtype=torch.bfloat16)
    x = torch.randn(T, B, F, dtype=torch.bfloat16)
    given = SiteInput(x, torch.full((B,), T), torch.zeros(1, B, H, dtype=x.dtype), None)
    (run,) = trajectories(module, given, sequences=B, longest=T)
    assert run.trajectory.outputs.dtype == torch.float32


def test_an_overflowed_state_has_no_slope() -> None:
    module = nn.RNN(1, 2, nonlinearity="relu")
    with torch.no_grad():
        module.get_parameter(parameter_name(module, "weight_hh", 0, "forward")).fill_(1e30)
    found = first_layer(module, torch.ones(6, 1, 1))
    assert not bool(torch.isfinite(found.outputs).all())
    assert bool(torch.isfinite(found.factors["slope"]).all())
