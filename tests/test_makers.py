"""Which line makes a module or a parameter."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.inspection.makers import made_at


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 16, batch_first=True)
        self.heads = nn.ModuleDict({"a": nn.Linear(16, 3), "b": nn.Linear(16, 3)})
        self.part = Part()
        self.deep = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.heads["a"](self.rnn(x)[0][:, -1])
        return self.deep(self.part.scale * logits)


def line_with(text: str) -> int:
    lines = inspect.getsource(inspect.getmodule(line_with) or Path).splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("rnn", "self.rnn = nn.GRU"),
        ("rnn.weight_hh_l0", "self.rnn = nn.GRU"),
        ("heads.b.weight", "self.heads = "),
        ("part.scale", "self.scale = "),
        ("deep.1.0.bias", "self.deep = "),
    ],
)
def test_the_statement_that_makes_it(path: str, text: str) -> None:
    assert made_at(Whole(), path) == f"{__file__}:{line_with(text)}"


def test_torchs_own_modules_are_made_by_nobody_known() -> None:
    assert made_at(nn.Sequential(nn.LSTM(3, 4)), "0") is None
    assert made_at(nn.LSTM(3, 4), "weight_hh_l0") is None
    assert made_at(Whole(), "nowhere.at.all") is None


def test_findings_about_parameters_stand_where_these_are_made() -> None:
    model = Whole()
    optimizer = torch.optim.Adam(model.rnn.parameters())
    x, y = torch.randn(6, 20, 5), torch.randint(3, (6,))
    given = {"data": [(x, y)], "loss": nn.CrossEntropyLoss(), "memory": 4}
    idle = rnnguard.audit(model, **given).findings
    missing = rnnguard.audit(model, optimizer, **given).findings
    places = {finding.code: str(finding.location) for finding in (*idle, *missing)}
    assert places["RG207"] == f"tests/test_makers.py:{line_with('self.heads = ')}"
    assert places["RG506"] == f"tests/test_makers.py:{line_with('self.heads = ')}"
