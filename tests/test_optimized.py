"""What an optimizer lacks, and what it holds that is not the model's."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

from rnnguard.inspection.optimized import decay_on_biases, foreign_parameters, missing_parameters


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


def test_the_decay_that_counts_is_that_of_a_recurrences_biases() -> None:
    model = tagger()
    lstm, head = {"params": model["lstm"].parameters()}, {"params": model["head"].parameters()}
    assert decay_on_biases(model, SGD([lstm, head | {"weight_decay": 0.5}], lr=0.1)) == 0
    assert decay_on_biases(model, SGD([lstm | {"weight_decay": 0.25}, head], lr=0.1)) == 0.25
    plain = nn.Linear(3, 3)  # whose recurrence may be written by hand
    assert decay_on_biases(plain, SGD(plain.parameters(), lr=0.1, weight_decay=0.5)) == 0.5


def test_a_decay_that_spares_the_biases() -> None:
    model = nn.LSTM(5, 16)
    named = dict(model.named_parameters())
    biases = [p for name, p in named.items() if "bias" in name]
    weights: Any = {
        "params": [p for name, p in named.items() if "weight" in name],
        "weight_decay": 0.1,
    }
    assert decay_on_biases(model, SGD([weights, {"params": biases}], lr=0.1)) == 0
