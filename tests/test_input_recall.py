"""How much of past inputs a state holds, against states whose memory is known exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from rnnguard.errors import RefusedError
from rnnguard.probe import forward_memory
from rnnguard.probe.input_recall import (
    FEWEST,
    PENALTIES,
    THRESHOLD,
    ForwardMemory,
    folds_of,
)


def white(steps: int, batch: int = 8, channels: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, batch, channels, generator=generator, dtype=torch.float64)


def read(states: Tensor, inputs: Tensor, lags: Sequence[int] | None = None) -> ForwardMemory:
    return forward_memory(states, inputs, torch.full((states.shape[1],), len(states)), lags=lags)


def delay_line(x: Tensor, units: int) -> Tensor:
    """Unit k holds the input of k steps ago."""
    states = torch.zeros(len(x), x.shape[1], units, dtype=x.dtype)
    for k in range(units):
        states[k:, :, k] = x[: len(x) - k, :, 0]
    return states


def driven(matrix: Tensor, entry: Tensor, x: Tensor) -> Tensor:
    """States of s = s A + x B, each after its step's input."""
    state = torch.zeros(x.shape[1], len(matrix), dtype=x.dtype)
    states = []
    for step in x:
        state = state @ matrix + step @ entry
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("units", [1, 5, 30])
def test_a_delay_line_holds_its_length_and_nothing_more(units: int) -> None:
    x = white(200)
    found = read(delay_line(x, units), x)
    held = [r2 for lag, r2 in zip(found.lags, found.r2, strict=True) if lag < units]
    gone = [r2 for lag, r2 in zip(found.lags, found.r2, strict=True) if lag >= units]
    assert held == pytest.approx([1.0] * units, abs=1e-6)
    assert max(gone) < 0.02
    assert found.reach == units - 1
    assert found.capacity == pytest.approx(units, abs=0.05)


def test_a_longer_delay_line_is_read_from_a_ladder_of_lags() -> None:
    x = white(400)
    found = read(delay_line(x, 100), x)
    assert list(found.lags) == sorted(set(found.lags)) and len(found.lags) < 70
    assert found.lags[:48] == tuple(range(48))
    assert found.reach == max(lag for lag in found.lags if lag < 100)
    # Between the last lag held and the first gone the ladder can only guess.
    assert found.capacity == pytest.approx(100, abs=10)


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.95])
def test_a_leaky_integrator_forgets_by_the_closed_form(keep: float) -> None:
    """For white input R^2 of lag k is (1 - a^2) a^(2k), which sums to 1 over all lags."""
    x = white(2000, batch=16)
    lags = [0, 1, 2, 5, 10]
    found = read(driven(torch.tensor([[keep]]).double(), torch.ones(1, 1).double(), x), x, lags)
    expected = [(1 - keep**2) * keep ** (2 * k) for k in lags]
    assert found.r2 == pytest.approx(expected, abs=0.015)
    assert all(error < 0.01 for error in found.stderr)
    every = read(driven(torch.tensor([[keep]]).double(), torch.ones(1, 1).double(), x), x)
    # The sample's own variance of the state scatters by this much.
    scatter = (2 * (1 + keep**2) / (1 - keep**2) / x.numel()) ** 0.5
    assert every.capacity == pytest.approx(1, abs=0.02 + 3 * scatter)
    above = [k for k in every.lags if (1 - keep**2) * keep ** (2 * k) > THRESHOLD]
    assert every.reach == (above[-1] if above else None)


@pytest.mark.parametrize("units", [4, 16])
def test_a_linear_network_holds_at_most_one_input_per_unit(units: int) -> None:
    x = white(400)
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(units, units, dtype=torch.float64))[0]
    entry = torch.randn(1, units, dtype=torch.float64)
    found = read(driven(0.97 * rotation, entry, x), x)
    assert found.capacity <= units * 1.02
    assert found.capacity > units * 0.9


def test_channels_count_by_their_variance_and_each_adds_to_the_capacity() -> None:
    """One channel of variance 9 is held for 3 steps, one of variance 1 not at all."""
    x = torch.cat([3 * white(300), white(300, seed=1)], dim=2)
    found = read(delay_line(x, 3), x, range(6))
    assert found.r2[:3] == pytest.approx([0.9] * 3, abs=0.03)
    assert max(found.r2[3:]) < 0.01
    assert found.capacity == pytest.approx(3, abs=0.02)
    both = read(torch.cat([delay_line(x, 3), delay_line(x[:, :, 1:], 2)], dim=2), x, range(6))
    assert both.capacity == pytest.approx(5, abs=0.02)
    assert both.r2[:3] == pytest.approx([1.0, 1.0, 0.9], abs=0.03)


def test_the_read_out_is_ridge_regression() -> None:
    x, states = white(40, batch=10), white(40, batch=10, channels=3, seed=1)
    states[2:, :, :1] += x[:-2]
    found = forward_memory(states, x, torch.full((10,), 40), lags=[2])
    flat, past = states[2:].numpy(), x[:-2].numpy()
    scale = states.reshape(-1, 3).numpy().std(0)
    fold_of = folds_of(np.ones((40, 10), dtype=bool), seed=0)[0]
    scores = {}
    for penalty in PENALTIES:
        rest, total = np.empty(5), np.empty(5)
        for fold in range(5):
            train, test = fold_of != fold, fold_of == fold
            rows, goal = (flat[:, train] / scale).reshape(-1, 3), past[:, train].reshape(-1)
            ridge = Ridge(alpha=penalty * len(rows)).fit(rows, goal)
            seen, truth = (flat[:, test] / scale).reshape(-1, 3), past[:, test].reshape(-1)
            rest[fold] = ((truth - ridge.predict(seen)) ** 2).sum()
            total[fold] = ((truth - goal.mean()) ** 2).sum()
        scores[rest.sum()] = 1 - rest / total
    shares = scores[min(scores)]
    assert found.r2[0] == pytest.approx(shares.mean(), rel=1e-6)
    assert found.stderr[0] == pytest.approx(shares.std(ddof=1) / 5**0.5, rel=1e-6)


def test_states_that_owe_nothing_to_the_inputs_hold_nothing() -> None:
    reached = []
    for seed in range(10):
        found = read(white(200, channels=32, seed=seed), white(200, channels=2, seed=100 + seed))
        reached.append(found.reach)
        assert max(found.r2) < 0.05
        assert found.capacity < 0.2
    assert reached == [None] * 10


def test_the_past_of_padded_steps_is_not_looked_at() -> None:
    x = white(200)
    states = delay_line(x, 4)
    lengths = torch.tensor([200, 150, 120, 100, 100, 90, 80, 60])
    behind = torch.arange(200)[:, None] >= lengths
    states[behind], x[behind] = torch.nan, torch.nan
    found = forward_memory(states, x, lengths)
    assert found.reach == 3
    assert found.r2[:4] == pytest.approx([1.0] * 4, abs=1e-6)


def test_one_sequence_is_split_by_time() -> None:
    x = white(600, batch=1)
    found = read(delay_line(x, 6), x)
    assert found.reach == 5
    assert found.r2[:6] == pytest.approx([1.0] * 6, abs=1e-6)


def test_units_and_channels_that_never_move_change_nothing() -> None:
    x = white(100)
    states = delay_line(x, 3)
    still = torch.cat([states, torch.full_like(states, 2.0)], dim=2)
    lags = range(5)
    wider = torch.cat([x, torch.ones_like(x)], dim=2)
    assert read(still, wider, lags).r2 == pytest.approx(read(states, x, lags).r2, abs=1e-6)
    silent = read(states, torch.ones_like(x), lags)
    assert (max(silent.r2), silent.reach, silent.capacity) == (0, None, 0)


def test_errors_are_those_of_the_mean_over_folds() -> None:
    """Over repeated draws the value scatters about as much as one draw says."""
    values, errors = [], []
    for seed in range(30):
        x = white(100, batch=10, seed=seed)
        states = driven(torch.tensor([[0.8]]).double(), torch.ones(1, 1).double(), x)
        found = read(states, x, [1])
        values.append(found.r2[0])
        errors.append(found.stderr[0])
    assert np.std(values) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.6)


def test_half_precision_is_read_as_well() -> None:
    x = white(200)
    found = read(delay_line(x, 4).bfloat16(), x.float(), range(8))
    assert found.reach == 3 and min(found.r2[:4]) > 0.99


def test_the_same_seed_reads_the_same_and_no_random_state_moves() -> None:
    x = white(100)
    states = driven(torch.tensor([[0.8]]).double(), torch.ones(1, 1).double(), x)
    before = torch.get_rng_state()
    first = read(states, x)
    assert torch.equal(before, torch.get_rng_state())
    assert read(states, x) == first


def test_a_usual_size_takes_about_a_second() -> None:
    x, states = white(200, channels=4), white(200, channels=64, seed=1)
    started = time.process_time()
    read(states, x)
    assert time.process_time() - started < 3


X, S, L = white(60), white(60, channels=3, seed=1), torch.full((8,), 60)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "other steps": (lambda: forward_memory(S[1:], X, L), "states"),
    "no channels": (lambda: forward_memory(S[:, :, 0], X, L), "states"),
    "too few lengths": (lambda: forward_memory(S, X, L[1:]), "lengths"),
    "a length of nothing": (lambda: forward_memory(S, X, 0 * L), "lengths"),
    "a length beyond the end": (lambda: forward_memory(S, X, L + 1), "lengths"),
    "too few steps": (lambda: forward_memory(S, X, L // 60 * (FEWEST // 8 - 1)), "lengths"),
    "infinite states": (lambda: forward_memory(S / 0, X, L), "states"),
    "inputs that are no number": (lambda: forward_memory(S, X * torch.nan, L), "inputs"),
    "a negative lag": (lambda: forward_memory(S, X, L, lags=[-1]), "lags"),
    "a lag beyond the end": (lambda: forward_memory(S, X, L, lags=[59]), "lags"),
    "no lag": (lambda: forward_memory(S, X, L, lags=[]), "lags"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_its_place(name: str) -> None:
    call, place = REFUSED[name]
    with pytest.raises(RefusedError) as caught:
        call()
    assert (caught.value.code, caught.value.path) == ("RG912", place)
    assert caught.value.fact and caught.value.cure.endswith(".")
