"""What a rewrite has added, told from what it has only changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam

import rnnguard
from rnnguard.records import Plan
from rnnguard.replay import REMEDY
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.growth import Growth, growth_of


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, **options)


GROWS: dict[str, Growth] = {
    "layer_norm": Growth(("gru",), ("gru",), ()),
    "layer_norm_inside": Growth(("gru",), ("gru",), ()),
    "attention_readout": Growth(("gru",), ("gru",), ()),
    "spectral_bound": Growth((), ("gru",), ()),
    "zoneout": Growth((), (), ("gru",)),
    "weight_drop": Growth((), (), ("gru",)),
    "gate_last_gru": Growth((), (), ("gru",)),
}


@pytest.mark.parametrize("name", GROWS)
def test_what_each_remedy_adds(name: str) -> None:
    model = Net()
    edit = Edit(model, None)
    assert growth_of(edit) == Growth((), (), ())
    mark = edit.mark()
    REMEDY[name].apply(edit, model.gru, {})
    assert growth_of(edit) == GROWS[name]
    edit.rollback_(mark)
    assert growth_of(edit) == Growth((), (), ())


def test_two_remedies_at_one_place_are_counted_together() -> None:
    model = Net(num_layers=2)
    edit = Edit(model, None)
    REMEDY["weight_drop"].apply(edit, model.gru, {})
    assert growth_of(edit).neither == ("gru",)
    REMEDY["layer_norm_between"].apply(edit, model.gru, {})
    assert growth_of(edit) == Growth(("gru",), ("gru",), ())


@pytest.mark.parametrize(
    ("name", "said", "unsaid"),
    [
        (
            "layer_norm_inside",
            ["Parameters were added at `gru`", "hold new keys at `gru`"],
            "a word",
        ),
        ("spectral_bound", ["hold new keys at `gru`"], "Parameters were added"),
        ("zoneout", ["`gru` computes something else without any new key"], "Parameters were added"),
    ],
)
def test_the_notes_say_what_follows(name: str, said: list[str], unsaid: str) -> None:
    model = Net()
    asked = {"remedy": name, "path": "gru", "tier": "structure"}
    plan = Plan.from_dict({"changes": [asked]})
    notes = "\n".join(rnnguard.apply(model, Adam(model.parameters()), plan).notes)
    assert all(words in notes for words in said) and unsaid not in notes


def test_a_plan_tells_what_it_would_add_and_adds_nothing() -> None:
    torch.manual_seed(0)

    class Reader(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.gru(x)[0][-1]
            return out

    model = Reader(bias=False)
    made = rnnguard.plan(model, Adam(model.parameters()), inputs=torch.randn(60, 4, 3), memory=60)
    assert "layer_norm_inside" in [change.remedy for change in made]
    assert type(model.gru) is nn.GRU and "gru.norm_l0.shift" not in model.state_dict()
