"""Bounds that hold in the forward, without a write and with the right gradients."""

from __future__ import annotations

import math

import pytest
import torch

from rnnguard.nn.recurrence_bound import Recurrence, within_entries, within_norm

F64 = torch.float64


def test_entries_are_clipped_and_come_back() -> None:
    u = torch.tensor([0.5, 1.5, 1.5, -1.5, -1.5, 1.0], dtype=F64, requires_grad=True)
    clipped = within_entries(u, 1.0)
    assert clipped.tolist() == [0.5, 1, 1, -1, -1, 1]
    # A descent goes against the gradient: outward where it is negative at 1.5.
    (clipped * torch.tensor([2.0, 3, -3, 3, -3, -2])).sum().backward()
    assert u.grad is not None and u.grad.tolist() == [2, 3, 0, 0, -3, -2]
    assert u[1] == 1.5  # the parameter is not written


def test_a_descent_stops_at_the_bound() -> None:
    u = torch.nn.Parameter(torch.tensor([0.9]))
    optimizer = torch.optim.SGD([u], 0.1)
    for sign, end in ((-1, 1.0), (1, 0.0)):
        for _ in range(15):
            optimizer.zero_grad()
            (sign * within_entries(u, 1.0)).sum().backward()
            optimizer.step()
        # Pushed out for 15 steps, it comes back with the first push inward.
        assert float(u.detach()) == pytest.approx(end, abs=0.55) and float(u.detach()) <= 1.11


# torch's own forward mode, about its own TorchScript.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_entries_under_torchs_transforms() -> None:
    u = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: within_entries(v, 1.0), u, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda v: within_entries(v, 1.0) ** 3, u)
    rows = torch.randn(3, 2)
    found = torch.vmap(lambda v: within_entries(v, 0.5))(rows)
    assert torch.equal(found, rows.clamp(-0.5, 0.5))


@pytest.mark.parametrize("size", [1, 3, 20])
def test_the_norm_is_brought_to_its_bound(size: int) -> None:
    weight = torch.randn(size, size, dtype=F64)
    norm = float(torch.linalg.matrix_norm(weight, 2))
    held = within_norm(weight, norm / 3)
    assert float(torch.linalg.matrix_norm(held, 2)) == pytest.approx(norm / 3, rel=1e-12)
    torch.testing.assert_close(held, weight / 3)


@pytest.mark.parametrize("bound", [1.001, math.inf])
def test_what_lies_within_is_not_touched(bound: float) -> None:
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0]
    for weight in (turn, 0.1 * torch.randn(8, 8, dtype=F64), torch.zeros(8, 8, dtype=F64)):
        weight = weight.clone().requires_grad_()
        held = within_norm(weight, bound)
        assert torch.equal(held, weight)
        held.sum().backward()
        assert torch.equal(weight.grad, torch.ones_like(weight))


def test_the_gradient_of_the_scaled_matrix_is_exact() -> None:
    weight = torch.randn(4, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: within_norm(w, 0.7), weight)
    assert torch.autograd.gradgradcheck(lambda w: within_norm(w, 0.7), weight)


def test_half_precision_is_bounded_too() -> None:
    weight = torch.randn(16, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        held = within_norm(weight, 1.0)
    assert held.dtype == torch.bfloat16
    assert float(torch.linalg.matrix_norm(held.float(), 2)) == pytest.approx(1, abs=0.01)


def test_settings_are_checked_and_told() -> None:
    with pytest.raises(ValueError, match="leaky_relu"):
        Recurrence("selu", 1.0)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="bound"):
            Recurrence("tanh", wrong)
    assert repr(Recurrence("elu", 2**0.01)) == "Recurrence(activation='elu', bound=1.00696)"
