"""An optimizer's checkpoint is told from one whose parameters stand in another order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import rnnguard
from rnnguard.records import Change, Plan
from rnnguard.rewrite.checkpoints import order_refusals

NORM = Plan(
    changes=(
        Change(
            remedy="layer_norm", path="0", tier="structure", dose={}, scenario="test", why="A test."
        ),
    )
)
BUILDS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adam": lambda m: Adam(m.parameters(), amsgrad=True),
    "named": lambda m: Adam(m.named_parameters()),
    "sgd": lambda m: SGD(m.parameters(), 0.1, momentum=0.9),
}


def model() -> nn.Module:
    return nn.Sequential(nn.GRU(3, 4), nn.Linear(4, 1))


def stepped(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def adopting(build: Callable[[nn.Module], Optimizer]) -> tuple[nn.Module, Optimizer]:
    rewritten = model()
    optimizer = build(rewritten)
    rnnguard.apply(rewritten, optimizer, NORM)
    return rewritten, optimizer


@pytest.mark.parametrize("name", BUILDS)
def test_the_order_of_an_optimizer_built_later_is_told(name: str) -> None:
    rewritten, optimizer = adopting(BUILDS[name])
    state = stepped(rewritten, optimizer)
    later = BUILDS[name](rewritten)
    (reason,) = order_refusals(later, state)
    assert (reason.code, reason.path) == ("RG915", "optimizer")
    assert "rnnguard.apply(model, optimizer, plan)" in reason.cure
    # torch itself says nothing.
    later.load_state_dict(state)


@pytest.mark.parametrize("name", BUILDS)
def test_a_checkpoint_that_fits_is_in_order(name: str) -> None:
    rewritten, optimizer = adopting(BUILDS[name])
    state = stepped(rewritten, optimizer)
    _, fresh = adopting(BUILDS[name])
    assert list(order_refusals(fresh, state)) == []
    assert list(order_refusals(fresh, fresh.state_dict())) == []


@pytest.mark.parametrize("name", BUILDS)
def test_an_older_checkpoint_is_told_by_its_number(name: str) -> None:
    plain = model()
    state = stepped(plain, BUILDS[name](plain))
    _, optimizer = adopting(BUILDS[name])
    (reason,) = order_refusals(optimizer, state)
    assert reason.fact == "the checkpoint holds 6 parameters, not 8."


def test_state_of_another_shape_by_design_is_in_order() -> None:
    plain = model()
    optimizer = torch.optim.Adafactor(plain.parameters())
    state = stepped(plain, optimizer)
    assert list(order_refusals(torch.optim.Adafactor(plain.parameters()), state)) == []
