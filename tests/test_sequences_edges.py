"""Sequence ops at the edges of shapes and numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sequence_cases import CASES, Case, Size, rung
from torch import Tensor, nn

EVERY = pytest.mark.parametrize("name", CASES)
NORMED = [name for name in CASES if "normed" in name]


def _both(case: Case, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients on the fast rung and on the plain one."""
    found = []
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    for number in (1, 0):
        with rung(number):
            outputs = case(*leaves)
        total = torch.stack([output.sum() for output in outputs]).sum()
        found.append([*outputs, *torch.autograd.grad(total, leaves)])
    return found[0], found[1]


def _alike(case: Case, tensors: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(*_both(case, tensors), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, **tolerance)


@EVERY
def test_no_step_is_torch_s_own_error(name: str) -> None:
    case = CASES[name](Size())
    with pytest.raises(RuntimeError) as theirs:
        nn.RNN(2, 3)(torch.zeros(0, 2, 2))
    x, *others = case.tensors
    with pytest.raises(RuntimeError) as own:
        case(x[:0], *others)
    assert str(own.value) == str(theirs.value)


@EVERY
def test_no_sequence_gives_no_outputs_and_zero_gradients(name: str) -> None:
    case = CASES[name](Size(batch=0))
    with rung(1):
        y, h, *_ = case(*case.tensors)
    assert y.shape[:2] == (3, 0) and h.shape[0] == 0
    found = torch.autograd.grad(y.sum(), case.tensors, allow_unused=True)
    assert all(g is None or not g.any() for g in found)


@EVERY
def test_strides_do_not_matter(name: str) -> None:
    """A batch-first x seen step by step, and one initial state for all sequences."""
    size = Size(steps=5, batch=3)
    case = CASES[name](size)
    x, h0, *others = case.tensors
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    shared = h0.detach()[:1].requires_grad_()
    expanded = shared.expand_as(h0)
    assert not turned.is_contiguous() and not expanded.is_contiguous()
    with rung(1):
        y = case(turned, expanded, *others)[0]
        z = case(turned.contiguous(), expanded.contiguous(), *others)[0]
    found = torch.autograd.grad(y.square().sum(), (turned, shared))
    expected = torch.autograd.grad(z.square().sum(), (turned, shared))
    for one, other in zip((y, *found), (z, *expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@EVERY
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e-310, 0.0])
def test_large_tiny_and_silent_inputs(name: str, scale: float) -> None:
    case = CASES[name](Size())
    x, *others = case.tensors
    _alike(case, [x * scale, *others], rtol=1e-9, atol=1e-9)


@EVERY
def test_nan_reaches_what_follows_it_and_nothing_before(name: str) -> None:
    case = CASES[name](Size(steps=4))
    x, *others = case.tensors
    mask = torch.zeros_like(x)
    mask[2, 0] = float("nan")
    _alike(case, [x + mask, *others], rtol=1e-9, atol=1e-9)
    with rung(1):
        y = case(x + mask, *others)[0]
    assert not y[:2].isnan().any() and not y[:, 1].isnan().any()
    if "packed" not in name:
        assert y[2:, 0].isnan().all()


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 1.0])
def test_norms_at_any_epsilon_and_without_variance(name: str, eps: float) -> None:
    case = CASES[name](Size(steps=2, hidden=4))
    changed = [part._replace(eps=eps) if hasattr(part, "eps") else part for part in case.arguments]
    case = replace(case, arguments=tuple(changed))
    _alike(case, case.tensors, rtol=1e-7, atol=1e-7)
    # Weights and biases of 0: every normalised sum is constant.
    with torch.no_grad():
        silent = [t if t.dim() == 0 or i < 2 else t * 0 for i, t in enumerate(case.tensors)]
    silent = [tensor.requires_grad_() for tensor in silent]
    with rung(1):
        y = case(*silent)[0]
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), silent, allow_unused=True))


def test_no_share_and_every_share() -> None:
    """Zoneout of 0 changes nothing; zoneout of 1 keeps the first state, to the last bit."""
    size = Size(steps=6)
    for name in ("lstm", "gru", "rnn tanh", "diagonal tanh", "gated", "gate last"):
        case = CASES[f"{name} zoneout" if name in ("lstm", "gate last") else name](size)
        *first, stay = case.arguments
        for share in (0.0, 1.0):
            kept = torch.full((size.steps, 1, 1), share, dtype=size.dtype)
            given = type(stay)(kept, kept) if isinstance(stay, tuple) else kept
            nothing = type(stay)() if isinstance(stay, tuple) else None
            for number in (0, 1):
                with rung(number):
                    plain = case.function(*first, nothing)
                    found = case.function(*first, given)
                initial = first[1 : len(found)]
                expected = plain[1:] if share == 0 else initial
                assert all(torch.equal(a, b) for a, b in zip(found[1:], expected, strict=True))
