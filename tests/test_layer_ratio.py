"""How far the gradients of stacked layers lie apart."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import pytest
import torch
from factories import only_site
from torch import Tensor, nn

import rnnguard
from rnnguard.probe.layer_ratio import layer_ratio


class Tagger(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


def ratio(rnn: nn.RNNBase, norms: Mapping[str, float]) -> float | None:
    return layer_ratio(only_site(Tagger(rnn), torch.randn(4, 2, 3)), norms)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ((1.0, 8.0, 2.0), 8.0),
        ((5.0, 5.0, 5.0), 1.0),
        ((0.0, 0.0, 0.0), None),
        ((math.inf, 1.0, 1.0), None),
        ((1e-30, 1e30, 1.0), 1e60),
        ((1e-300, 1e300, 1.0), sys.float_info.max),
        ((0.0, 1e10, 1.0), sys.float_info.max),
        ((3.0, 0.0, 1.0), 3.0 / sys.float_info.min),
        ((3.0, 0.0, 0.0), None),
        ((3.0, 6.0, 0.0), 2.0),
    ],
)
def test_the_ratio_of_three_layers(norms: tuple[float, ...], expected: float | None) -> None:
    named = {f"rnn.weight_hh_l{layer}": norm for layer, norm in enumerate(norms)}
    assert ratio(nn.GRU(3, 4, 3), named) == (expected and pytest.approx(expected))


def test_directions_belong_to_one_layer() -> None:
    norms = {"l0": 3.0, "l0_reverse": 4.0, "l1": 6.0, "l1_reverse": 8.0}
    named = {f"rnn.weight_hh_{suffix}": norm for suffix, norm in norms.items()}
    assert ratio(nn.LSTM(3, 4, 2, bidirectional=True), named) == pytest.approx(2.0)


def test_a_single_layer_has_nothing_to_compare_with() -> None:
    assert ratio(nn.LSTM(3, 4), {"rnn.weight_hh_l0": 1.0}) is None


def test_an_audit_reads_the_gradients_of_the_loss() -> None:
    torch.manual_seed(0)
    model, x = Tagger(nn.LSTM(3, 4, 3)), torch.randn(6, 2, 3)
    y = torch.randn(6, 2, 4)
    report = rnnguard.audit(model, data=(x, y), loss=nn.MSELoss())
    nn.MSELoss()(model(x), y).backward()
    norms = [float(getattr(model.rnn, f"weight_hh_l{layer}").grad.norm()) for layer in range(3)]
    assert report["rnn"].layer_ratio == pytest.approx(max(norms) / min(norms), rel=1e-5)
    assert all(p.grad is not None for p in model.parameters())  # this test's own
    (alone,) = rnnguard.audit(model.rnn, inputs=x).before.sites
    assert alone.path == "" and alone.layer_ratio is not None


def test_deep_lstms_are_found() -> None:
    torch.manual_seed(0)
    found = {}
    for layers in (2, 8):
        report = rnnguard.audit(Tagger(nn.LSTM(3, 16, layers)), inputs=torch.randn(20, 4, 3))
        found[layers] = "RG404" in {finding.code for finding in report.findings}
    assert found == {2: False, 8: True}
