"""The tests of all lags at once, against each lag's by itself from its definition."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import erfc
from scipy.stats import rankdata

from rnnguard.probe import lagscan
from rnnguard.probe.history import Sequences, histories, standardised
from rnnguard.probe.lagscan import NEIGHBOURS, ROWS_PER_COLUMN, partial_p_values, scan_lags

Array = NDArray[np.float64]
COUNT, STEPS = 90, 25


def p_value(parts: Array, y: Array) -> float:
    """Of products (clusters, D, K) summed over their second axis where there is one."""
    products = np.einsum("ctd,ctk->cdk", parts, y)
    power = np.outer((parts**2).sum((0, 1)), (y**2).sum((0, 1)))
    squares = np.maximum((products**2).sum(0), power / (parts.shape[0] * parts.shape[1]))
    z = np.abs(products.sum(0)) / np.sqrt(squares)
    chance = float(erfc(z.max() / np.sqrt(2)))
    return min(1.0, chance * int(z.size))


def left_by(near: Array, values: Array) -> Array:
    """Values without what the columns near predict, by least squares on extra rows."""
    if near.shape[1] == 0:
        return values
    slight = np.sqrt(1e-6 * len(near)) * np.eye(near.shape[1])
    rows = np.concatenate([near, slight])
    goal = np.concatenate([values, np.zeros((len(slight), values.shape[1]))])
    found: Array = values - near @ np.linalg.lstsq(rows, goal, rcond=None)[0]
    return found


def inputs(width: int) -> Array:
    rng = np.random.default_rng(width)
    values = rng.standard_normal((COUNT, STEPS, width))
    for t in range(1, STEPS):
        values[:, t] += 0.7 * values[:, t - 1]
    return values


@pytest.mark.parametrize("values_at_once", [1, 3000, 10**9])
@pytest.mark.parametrize("width", [1, 2, 10])
def test_p_values_at_the_end_are_each_lag_s_own(
    width: int, values_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lagscan, "VALUES", values_at_once)
    values, rng = inputs(width), np.random.default_rng(0)
    target = values[:, -4, :1] + rng.standard_normal((COUNT, 2))
    whole = Sequences(values, np.arange(COUNT), np.full(COUNT, STEPS - 1), target, 0)
    x = histories(values, whole, STEPS)
    others = [target - 0.1 * x[:, lag, :1] for lag in range(STEPS)]
    later = min(NEIGHBOURS, COUNT // (ROWS_PER_COLUMN * width))
    assert later == {1: 8, 2: 4, 10: 0}[width]
    expected = np.empty((2, STEPS))
    for lag in range(STEPS):
        near = x[:, max(0, lag - later) : lag].reshape(COUNT, -1)
        part = left_by(near, x[:, lag])[:, None]
        for row, y in enumerate((target, others[lag])):
            ranks = standardised(rankdata(y, axis=0))
            expected[row, lag] = p_value(part, ranks[:, None])
    np.testing.assert_allclose(scan_lags(values, whole, STEPS).p_values, expected[0], rtol=1e-7)
    np.testing.assert_allclose(partial_p_values(x, iter(others), 0), expected[1], rtol=1e-7)


@pytest.mark.parametrize("width", [1, 3, 20])
def test_p_values_at_every_step_are_each_lag_s_own(width: int) -> None:
    values, rng = inputs(width), np.random.default_rng(0)
    rows, times = (index.ravel() for index in np.indices((COUNT, STEPS)))
    target = np.roll(values, 3, axis=1)[:, :, :1] + rng.standard_normal((COUNT, STEPS, 2))
    whole = Sequences(values, rows, times, target.reshape(-1, 2), 0)
    y = standardised(rankdata(whole.target, axis=0)).reshape(COUNT, STEPS, 2)
    y -= y.mean(0)
    centred = values - values.mean(0)
    later = {1: 8, 3: 8, 20: 6}[width]
    ahead = np.zeros((later, *centred.shape))
    for by in range(1, later + 1):
        ahead[by - 1, :, :-by] = centred[:, by:]
    expected = []
    for lag in range(STEPS - 1):
        near = np.concatenate(list(ahead[: min(lag, later)]) or [centred[:, :, :0]], axis=2)
        part = left_by(near.reshape(len(rows), -1), centred.reshape(len(rows), -1))
        part = part.reshape(centred.shape)[:, : STEPS - lag]
        expected.append(p_value(part, y[:, lag:]))
    np.testing.assert_allclose(scan_lags(values, whole, STEPS - 1).p_values, expected, rtol=1e-7)
