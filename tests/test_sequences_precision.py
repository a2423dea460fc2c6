"""Half precision: products in it, all else in float32; double precision is left alone."""

from __future__ import annotations

import pytest
import torch
from sequence_cases import CASES, Case, Size, rung
from torch import Tensor

BF16 = torch.bfloat16
EVERY = pytest.mark.parametrize("name", CASES)
# Recurrences without a bound grow what bfloat16 rounds.
BOUNDED = [name for name in CASES if not name.startswith(("rnn", "diagonal"))]


def _results(case: Case) -> list[Tensor]:
    outputs = case(*case.tensors)
    total = torch.stack([output.double().sum() for output in outputs]).sum()
    gradients = torch.autograd.grad(total, case.tensors)
    return [*(output.detach() for output in outputs), *gradients]


def _wrong(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3))
        for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("name", BOUNDED)
def test_autocast_equals_the_plain_rung(name: str) -> None:
    size = Size(steps=12, batch=4, hidden=16, dtype=torch.float32)
    case = CASES[name](size)
    exact = _results(case.in_dtype(torch.float64))
    with torch.autocast("cpu", BF16):
        with rung(1):
            fast = _results(case)
        with rung(0):
            plain = _results(case)
    assert [tensor.dtype for tensor in fast] == [tensor.dtype for tensor in plain]
    assert fast[0].dtype == BF16 and fast[-1].dtype == torch.float32
    for one, other in zip(_wrong(fast, exact), _wrong(plain, exact), strict=True):
        assert one < max(1.5 * other, 4e-3)


@EVERY
def test_autocast_leaves_double_alone(name: str) -> None:
    case = CASES[name](Size())
    with rung(1):
        expected = _results(case)
        with torch.autocast("cpu", BF16):
            found = _results(case)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_backward_within_autocast_is_the_forward_s() -> None:
    case = CASES["lstm normed"](Size(steps=6, hidden=8, dtype=torch.float32))
    with rung(1):
        outside = _results(case)
        outputs = case(*case.tensors)
    with torch.autocast("cpu", BF16):
        total = torch.stack([output.double().sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(total, case.tensors)
    for one, other in zip(gradients, outside[3:], strict=True):
        assert torch.equal(one, other)


def test_the_cell_state_runs_in_float32() -> None:
    """A sum of 1000 steps of 1/256 that bfloat16 could not hold: it would stop at 1."""
    from rnnguard.nn.sequences.lstm import lstm_sequence
    from rnnguard.nn.sequences.parts import LSTMWeights

    ih = torch.zeros(4, 1, dtype=BF16)
    # i = 1, f = 1, g = tanh(1/256).
    bias = torch.tensor([50.0, 50.0, 1 / 256, 0.0], dtype=BF16)
    weights = LSTMWeights(ih, ih.clone(), bias, torch.zeros_like(bias))
    state = torch.zeros(1, 1, dtype=BF16)
    with rung(1):
        _, _, c = lstm_sequence(torch.zeros(1000, 1, 1, dtype=BF16), state, state, weights)
    assert c.dtype == BF16
    assert float(c) == pytest.approx(1000 / 256, rel=5e-3)


def test_mixed_dtypes_without_autocast_are_an_error() -> None:
    case = CASES["gru"](Size(dtype=torch.float32))
    x, *others = case.tensors
    with pytest.raises(RuntimeError, match="same dtype"):
        case(x.bfloat16(), *others)
