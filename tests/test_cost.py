"""The time of a recurrence by itself, and what is told of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import only_site
from test_mending import IN, Chain, mend, noise
from torch import Tensor, nn

import rnnguard
from rnnguard.probe import cost
from rnnguard.probe.cost import seconds_of
from rnnguard.probe.snapshot import fingerprint


class Reader(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Any) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, rnnguard.nn.LayerNormLSTM])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_a_time_and_leaves_no_trace(kind: type[nn.RNNBase], training: bool) -> None:
    model = Reader(kind(3, 4, 2, batch_first=True, dropout=0.5)).train(training)
    found = only_site(model, torch.randn(2, 9, 3))
    model.rnn.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    before = fingerprint(model)
    seconds = seconds_of(model, found)
    assert seconds is not None and 0 < seconds < 10
    assert fingerprint(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_the_first_pass_warms_up_and_the_middle_one_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, taken = Reader(nn.GRU(3, 8)), iter([90.0, 1.0, 50.0, 2.0])
    monkeypatch.setattr(cost, "_pass", lambda *_: next(taken))
    assert seconds_of(model, only_site(model, torch.randn(4, 2, 3))) == 2.0
    assert next(taken, None) is None


def test_what_cannot_run_by_itself_has_no_figure() -> None:
    frozen = Reader(nn.LSTM(3, 4).requires_grad_(False))
    assert seconds_of(frozen, only_site(frozen, torch.randn(9, 2, 3))) is None


def test_a_change_of_structure_says_what_it_costs() -> None:
    torch.manual_seed(0)
    model = Chain(nn.GRU(IN, 32, bias=False, batch_first=True))
    report = mend(model, noise(steps=60))
    (said,) = [note for note in report.notes if "times as long" in note]
    assert said.startswith("`parts.0`: after layer_norm_inside ")
    assert "times as long" not in report.plan.to_json()
