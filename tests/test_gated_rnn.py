"""nn.RNN with an update gate: its equation, torch's own with the gate open, its start."""

from __future__ import annotations

import pytest
import torch
from cell_cases import (
    BATCH,
    DEEP,
    F64,
    FORMS,
    HIDDEN,
    IN,
    STEPS,
    assert_is_torchs,
    build,
    close,
    initial,
    with_weights_of,
)
from torch import nn

from rnnguard.nn import GatedRNN
from rnnguard.nn.gated_rnn import gated_parts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_with_its_gate_open_it_is_torchs(form: str, nonlinearity: str) -> None:
    module = build("gated rnn", nonlinearity=nonlinearity, **FORMS[form])
    for gate in module.children():
        nn.init.zeros_(gate.weight_ih)
        nn.init.zeros_(gate.weight_hh)
        nn.init.constant_(gate.bias, 40.0)  # sigma of it is 1 in float64
    assert_is_torchs(module, with_weights_of(module))


@pytest.mark.parametrize("bias", [True, False])
def test_its_equation(bias: bool) -> None:
    module = build("gated rnn", bias=bias)
    plain, gate = with_weights_of(module), module.gate_l0
    x, h = torch.randn(STEPS, BATCH, IN, dtype=F64), initial(module, BATCH)
    found, last = module(x, h)
    for now, mine in zip(x, found, strict=True):
        z = (now @ gate.weight_ih.t() + h @ gate.weight_hh.t() + gate.bias).sigmoid()
        h = h + z * (plain(now[None], h)[1] - h)
        close(mine, h[0])
    close(last, h)


def test_a_closed_gate_keeps_the_state() -> None:
    module = build("gated rnn", **DEEP)
    for gate in module.children():
        nn.init.constant_(gate.bias, -1e4)
    h = initial(module, BATCH)
    assert torch.equal(module(torch.randn(STEPS, BATCH, IN, dtype=F64), h)[1], h)


def test_the_gates_bias_starts_so_that_it_remembers() -> None:
    known = gated_parts(nn.RNN(IN, HIDDEN, **DEEP), memory=60)
    assert list(known) == ["gate_l0", "gate_l0_reverse", "gate_l1", "gate_l1_reverse"]
    assert known["gate_l1"].weight_ih.shape == (HIDDEN, 2 * HIDDEN)
    for gate in known.values():
        steps = (-gate.bias).detach().exp()
        assert float(steps.min()) > 1 and 40 < float(steps.max()) < 59
    unknown = GatedRNN(IN, HIDDEN, gate_bias=-2.0)
    assert bool((unknown.gate_l0.bias == -2).all())
    assert bool((GatedRNN(IN, HIDDEN).gate_l0.bias == -1).all())


def test_gate_weights_are_drawn_as_torchs_are() -> None:
    gate = gated_parts(nn.RNN(IN, 100))["gate_l0"]
    for weight in (gate.weight_ih, gate.weight_hh):
        assert 0.09 < float(weight.detach().abs().max()) <= 0.1
        assert float(weight.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.1)
