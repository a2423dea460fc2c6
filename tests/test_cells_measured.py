"""A cell of rnnguard.nn is a site like torch's own, measured along every step of its graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.errors import RefusedError
from rnnguard.measurements import SiteReadings
from rnnguard.nn import BetweenLayers

STEPS, IN, HIDDEN = 12, 3, 6


class Net(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][-1])
        return out


def readings(rnn: nn.RNNBase) -> SiteReadings:
    torch.manual_seed(1)
    report = rnnguard.audit(Net(rnn), inputs=torch.randn(STEPS, 4, IN), memory=STEPS)
    (site,) = report.sites
    assert site.path == "rnn"
    return report["rnn"]


def no_norm() -> nn.RNNBase:
    module = rnnguard.nn.LayerNormLSTM(IN, HIDDEN)
    module.norm_l0.active = False
    return module


OFF: dict[str, tuple[type[nn.RNNBase], Callable[[], nn.RNNBase]]] = {
    "LayerNormLSTM": (nn.LSTM, no_norm),
    "ZoneoutLSTM": (
        nn.LSTM,
        lambda: rnnguard.nn.ZoneoutLSTM(IN, HIDDEN, zoneout_hidden=0.0, zoneout_cell=0.0),
    ),
    "ZoneoutGRU": (nn.GRU, lambda: rnnguard.nn.ZoneoutGRU(IN, HIDDEN, zoneout_hidden=0.0)),
}


@pytest.mark.parametrize("name", OFF)
def test_switched_off_it_reads_like_torchs_own(name: str) -> None:
    plain, make = OFF[name]
    cell, same = make(), plain(IN, HIDDEN)
    same.load_state_dict({n: p for n, p in cell.state_dict().items() if n in same.state_dict()})
    found, expected = readings(cell), readings(same)
    lags = min(len(found.retention), len(expected.retention))
    assert found.retention[:lags] == pytest.approx(expected.retention[:lags], abs=0.05)


@pytest.mark.parametrize("u", [0.5, 0.9])
def test_a_diagonal_recurrence_loses_its_factor_per_step(u: float) -> None:
    cell = rnnguard.nn.IndRNN(IN, HIDDEN, activation="relu")
    with torch.no_grad():
        cell.weight_hh_l0.copy_(u * torch.eye(HIDDEN))
        cell.bias_ih_l0.fill_(20.0)  # every unit stays on
    lags = torch.arange(STEPS - 1)
    expected = (lags * torch.log10(torch.tensor(u))).tolist()
    assert readings(cell).retention[: STEPS - 1] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "LayerNormLSTM", "LayerNormGRU", "LayerNormRNN", "ZoneoutLSTM", "ZoneoutGRU", "ResidualRNN",
        "BoundedRNN", "IndRNN", "GatedRNN", "GateLastGRU",
    ],
)  # fmt: skip
def test_every_cell_is_a_site(name: str) -> None:
    found = readings(getattr(rnnguard.nn, name)(IN, HIDDEN))
    assert found.retention[0] == 0 and len(found.retention) >= STEPS - 1


def test_layers_that_are_called_one_by_one_are_refused_in_words() -> None:
    between = partial(BetweenLayers, norm=True)
    with pytest.raises(RefusedError, match="FusedLSTM that calls the kernel layer by layer"):
        readings(rnnguard.nn.FusedLSTM(IN, HIDDEN, num_layers=2, between=between))
