"""What an optimizer lacks, and what it holds that is not the model's."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

from rnnguard.inspection.optimized import foreign_parameters, missing_parameters


def tagger() -> Any:
    return nn.ModuleDict({"lstm": nn.LSTM(5, 16), "head": nn.Linear(16, 3)})


def test_all_of_the_model_and_nothing_else() -> None:
    model = tagger()
    model["head"].bias.requires_grad_(False)
    groups = [{"params": model["lstm"].parameters()}, {"params": [model["head"].weight]}]
    optimizer = SGD(groups, lr=0.1)
    assert missing_parameters(model, optimizer) == []
    assert foreign_parameters(model, optimizer) == []


def test_a_head_that_was_forgotten() -> None:
    model = tagger()
    optimizer = SGD(model["lstm"].parameters(), lr=0.1)
    assert missing_parameters(model, optimizer) == ["head.weight", "head.bias"]
    assert foreign_parameters(model, optimizer) == []


def test_the_parameters_of_another_instance() -> None:
    model, other = tagger(), tagger()
    optimizer = SGD(other.parameters(), lr=0.1)
    assert len(missing_parameters(model, optimizer)) == len(list(model.parameters()))
    assert all(a is b for a, b in zip(
        foreign_parameters(model, optimizer), other.parameters(), strict=True))  # fmt: skip


@pytest.mark.parametrize("given", [True, False])
def test_a_loss_with_weights_of_its_own(given: bool) -> None:
    model, loss = tagger(), nn.Linear(3, 1)
    optimizer = SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    found = foreign_parameters(model, optimizer, loss if given else None)
    assert len(found) == (0 if given else 2)
