"""Both rungs of every sequence op: derivatives against finite differences and each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from sequence_cases import CASES, Case, Size, rung
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from rnnguard.nn.sequences import rungs

EVERY = pytest.mark.parametrize("name", CASES)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SIZES = [
    Size(steps, batch, hidden, bias)
    for steps, batch, hidden, bias in itertools.product(
        (1, 2, 7), (1, 3), (1, 3, 16), (True, False)
    )
]


def derivatives(case: Case, on: int) -> list[Tensor]:
    """Outputs, and the gradients for cotangents on all outputs jointly and on each alone."""
    with rung(on):
        outputs = case(*case.tensors)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    found = list(outputs)
    for asked in (range(len(outputs)), *([place] for place in range(len(outputs)))):
        gradients = torch.autograd.grad(
            [outputs[place] for place in asked],
            case.tensors,
            [cotangents[place] for place in asked],
            retain_graph=True,
            allow_unused=True,
        )
        found += [torch.zeros(()) if g is None else g for g in gradients]
    return found


def equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        # A tensor that an output does not reach: one rung says None, the other zero.
        one, other = torch.broadcast_tensors(one.double(), other.double())
        torch.testing.assert_close(one, other, **EXACT)


@EVERY
def test_fast_rung_equals_plain_rung(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rungs, "CHUNK", 3)  # so that 7 steps make three chunks
    for size in SIZES:
        case = CASES[name](size)
        equal(derivatives(case, 1), derivatives(case, 0))


def test_long_sequences_cross_chunks() -> None:
    for name in ("lstm normed", "gru normed", "rnn residual", "gated", "gate last"):
        case = CASES[name](Size(steps=2 * rungs.CHUNK + 1, batch=1, hidden=2))
        equal(derivatives(case, 1), derivatives(case, 0))


@EVERY
def test_plain_rung_has_first_and_second_derivatives(name: str) -> None:
    case = CASES[name](Size(steps=2))
    with rung(0):
        assert gradcheck(case, case.tensors, fast_mode=True)
        assert gradgradcheck(case, case.tensors, fast_mode=True)


@EVERY
def test_fast_rung_has_first_and_second_derivatives(name: str) -> None:
    case = CASES[name](Size())
    with rung(1):
        assert gradcheck(case, case.tensors)
        # The second order goes to rung 0 by itself.
        assert gradgradcheck(case, case.tensors, fast_mode=True)


@EVERY
def test_only_what_is_wanted_is_computed(name: str) -> None:
    case = CASES[name](Size(steps=4))
    with rung(1):
        outputs = case(*case.tensors)
    every = torch.autograd.grad(
        outputs[0].sum(), case.tensors, retain_graph=True, allow_unused=True
    )
    for place in range(len(case.tensors)):
        alone = [t.detach().requires_grad_(i == place) for i, t in enumerate(case.tensors)]
        with rung(1):
            y = case(*alone)[0]
        (found,) = torch.autograd.grad(y.sum(), alone[place], allow_unused=True)
        expected = every[place]
        assert found is not None and expected is not None
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_share_that_asks_for_a_gradient_gets_it() -> None:
    size = Size()
    case = CASES["gru packed"](size)
    share = torch.rand(size.steps, size.batch, 1, dtype=size.dtype, requires_grad=True)
    x, h0, weights, _, _ = case.arguments

    def run(share: Tensor) -> tuple[Tensor, ...]:
        return case.function(x, h0, weights, None, share)

    assert gradcheck(run, (share,))
