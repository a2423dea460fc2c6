"""Weights that training changes in vain, and the many sound ways to make a weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import recorded, subject
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations, parametrize

import rnnguard
from rnnguard.inspection.sites import find_sites
from rnnguard.probe.bypassed import bypassed_weights
from rnnguard.probe.gradients import gradient_norms
from rnnguard.probe.snapshot import fingerprint, untouched

B, T, F, H = 6, 11, 5, 8
DATA = [(torch.randn(B, T, F), torch.randint(3, (B,)))] * 2
HH = "weight_hh_l0"


class Net(nn.Module):
    """A recurrence whose recurrent weight is made from `raw`, where there is one."""

    raw: Any

    def __init__(self, how: str = "", rnn: nn.Module | None = None) -> None:
        super().__init__()
        self.rnn: Any = rnn or nn.LSTM(F, H, batch_first=True)
        self.head, self.how = nn.Linear(H, 3), how
        if how not in ("", "detached", "clamped"):
            self.raw = nn.Parameter(getattr(self.rnn, HH).detach().clone())
        if how == "set":
            del self.rnn.weight_hh_l0

    def forward(self, x: Tensor) -> Any:
        made: Any = dropout(self.raw, 0.3, self.training) if hasattr(self, "raw") else None
        with torch.no_grad():
            if self.how == "data":
                self.rnn.weight_hh_l0.data = made
            elif self.how == "copy":
                self.rnn.weight_hh_l0.copy_(made)
            elif self.how == "clamped":
                self.rnn.weight_hh_l0.clamp_(-0.2, 0.2)
        if self.how == "set":
            self.rnn.weight_hh_l0 = made
        elif self.how == "kernel":
            self.rnn._flat_weights[1] = made
        if self.how == "called":
            out = torch.func.functional_call(self.rnn, {HH: made}, (x,))[0]
        else:
            out = self.rnn(x)[0]
        return self.head(out[:, -1].detach() if self.how == "detached" else out[:, -1])


def bypassed(model: nn.Module) -> dict[str, tuple[str, ...]]:
    asked = subject(model, DATA, loss=nn.CrossEntropyLoss())
    before = fingerprint(model)
    with untouched(model):
        sites = find_sites(model, recorded(model, DATA[0][0]))
        found = bypassed_weights(asked, sites, gradient_norms(model, asked.batches, 0))
    assert fingerprint(model) == before
    return found


@pytest.mark.parametrize("how", ["data", "copy"])
def test_a_weight_that_each_forward_overwrites(how: str) -> None:
    assert bypassed(Net(how)) == {"rnn": ("raw", "rnn.weight_hh_l0")}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_list_of_weights_from_before(kind: Any) -> None:
    rnn: Any = kind(F, H, 2, batch_first=True)
    rnn._flat_weights = [weight.detach().clone() for weight in rnn._flat_weights]
    names = tuple(f"rnn.{name}" for name, _ in rnn.named_parameters())
    assert bypassed(Net(rnn=rnn)) == {"rnn": names}


def test_one_old_weight_in_the_list() -> None:
    rnn = nn.GRU(F, H, batch_first=True)
    rnn._flat_weights[1] = nn.Parameter(getattr(rnn, HH).detach().clone())
    assert bypassed(Net(rnn=rnn)) == {"rnn": ("rnn.weight_hh_l0",)}


def old_style(norm: Callable[..., Any]) -> Callable[[nn.Module], None]:
    def apply(rnn: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            norm(rnn, HH)

    return apply


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda rnn: None,
    "orthogonal": lambda rnn: parametrizations.orthogonal(rnn, HH),
    "weight norm": lambda rnn: parametrizations.weight_norm(rnn, HH),
    "spectral norm": lambda rnn: parametrizations.spectral_norm(rnn, HH),
    "weight drop": lambda rnn: parametrize.register_parametrization(rnn, HH, nn.Dropout(0.3)),
    "old weight norm": old_style(torch.nn.utils.weight_norm),
    "old spectral norm": old_style(torch.nn.utils.spectral_norm),
    "frozen": lambda rnn: rnn.requires_grad_(False),
    "a new parameter": lambda rnn: rnn.register_parameter(HH, nn.Parameter(torch.rand(4 * H, H))),
}


@pytest.mark.parametrize("way", WAYS)
def test_sound_ways_to_make_a_weight(way: str) -> None:
    model = Net()
    WAYS[way](model.rnn)
    assert bypassed(model) == {}


@pytest.mark.parametrize("how", ["set", "kernel", "called", "clamped", "detached"])
def test_what_trains_all_the_same_or_fails_elsewhere(how: str) -> None:
    assert bypassed(Net(how)) == {}


@pytest.mark.parametrize(
    "rnn",
    [
        lambda: nn.LSTM(F, H, 2, batch_first=True, dropout=0.5),
        lambda: nn.RNN(F, H, batch_first=True, bias=False),
        lambda: nn.GRU(F, H, 2, batch_first=True).eval(),
        lambda: rnnguard.nn.LayerNormLSTM(F, H, batch_first=True),
    ],
)
def test_sound_recurrences(rnn: Callable[[], nn.Module]) -> None:
    assert bypassed(Net(rnn=rnn())) == {}


def test_both_ways_of_which_one_step_is_read() -> None:
    model = Net(rnn=nn.LSTM(F, H, batch_first=True, bidirectional=True))
    model.head = nn.Linear(2 * H, 3)
    assert bypassed(model) == {}


def test_cells_in_a_loop() -> None:
    class Loop(nn.Module):
        def __init__(self, copied: bool) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(F, H), nn.Linear(H, 3)
            self.raw, self.copied = nn.Parameter(torch.rand(3 * H, H)), copied

        def forward(self, x: Tensor) -> Any:
            h = x.new_zeros(len(x), H)
            if self.copied:
                self.cell.weight_hh.data.copy_(self.raw)
            for x_t in x.unbind(1):
                h = self.cell(x_t, h)
            return self.head(h + self.raw.mean())

    assert bypassed(Loop(True)) == {"cell": ("cell.weight_hh",)}
    assert bypassed(Loop(False)) == {}
