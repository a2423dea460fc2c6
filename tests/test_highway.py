"""The gate's hand-derived backward against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from rnnguard.nn import highway
from rnnguard.nn.highway import HighwayGate

SHAPES = [(3, 2, 4), (5, 4), (1, 1, 1)]


@pytest.fixture(params=[highway._PIECE, 16, 1], ids=["whole", "pieces", "rows"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once with the gate kept, or piece by piece with the gate computed anew."""
    monkeypatch.setattr(highway, "_PIECE", request.param)


def given(shape: tuple[int, ...]) -> list[Tensor]:
    shapes = (shape, shape, shape[-1:], shape[-1:])
    return [torch.randn(*each, dtype=torch.float64, requires_grad=True) for each in shapes]


def run(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gate = HighwayGate(x.shape[-1], -2.0)
    return functional_call(gate, {"weight": weight, "bias": bias}, (x, y))


def by_hand(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gate = 1 / (1 + torch.exp(-(weight * x + bias)))
    return gate * y + (1 - gate) * x


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    inputs = given(shape)
    mine, theirs = run(*inputs), by_hand(*inputs)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(mine)
    for got, expected in zip(
        torch.autograd.grad(mine, inputs, cotangent),
        torch.autograd.grad(theirs, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("shape", SHAPES)
def test_second_derivatives(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(run, given(shape))
    assert torch.autograd.gradgradcheck(run, given(shape))


# torch's own forward mode scripts a part of itself, and warns of that.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_under_vmap_and_forward_mode() -> None:
    x, y, weight, bias = (tensor.detach() for tensor in given((3, 2, 4)))
    mapped = torch.vmap(run, in_dims=(1, 1, None, None))(x, y, weight, bias)
    torch.testing.assert_close(mapped, by_hand(x, y, weight, bias).transpose(0, 1))
    ones = tuple(torch.ones_like(tensor) for tensor in (x, y, weight, bias))
    mine = torch.func.jvp(run, (x, y, weight, bias), ones)
    theirs = torch.func.jvp(by_hand, (x, y, weight, bias), ones)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("pieces")
def test_a_graph_can_be_gone_back_through_twice() -> None:
    inputs = given((3, 2, 4))
    output = run(*inputs).sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    for again, before in zip(torch.autograd.grad(output, inputs), first, strict=True):
        assert torch.equal(again, before)
