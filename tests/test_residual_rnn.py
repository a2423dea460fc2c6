"""The residual recurrence: its equation, torch's own without it, and where it starts."""

from __future__ import annotations

import pytest
import torch
from cell_cases import (
    BATCH,
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

from rnnguard.nn import ResidualRNN
from rnnguard.nn.residual_rnn import residual_parts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_with_carry_0_and_scale_1_it_is_torchs(form: str, nonlinearity: str) -> None:
    module = build("residual rnn", nonlinearity=nonlinearity, **FORMS[form])
    for part in module.children():
        nn.init.zeros_(part.carry)
        nn.init.ones_(part.scale)
    assert_is_torchs(module, with_weights_of(module))


def test_a_step_is_the_papers() -> None:
    module = build("residual rnn")
    plain, part = with_weights_of(module), module.residual_l0
    x, state = torch.randn(STEPS, BATCH, IN, dtype=F64), initial(module, BATCH)
    found, last = module(x, state)
    for now, mine in zip(x, found, strict=True):
        state = part.carry * state + part.scale * plain(now[None], state)[1]
        close(mine, state[0])
    close(last, state)


def test_it_starts_as_leaks_of_one_step_to_the_memory() -> None:
    part = residual_parts(nn.RNN(IN, 9), memory=64)["residual_l0"]
    torch.testing.assert_close(part.carry + part.scale, torch.ones(9))
    scale = part.scale.detach()
    assert float(scale[0]) == 1  # torch's own
    assert float(1 / scale[-1]) == pytest.approx(64)
    with pytest.raises(ValueError, match="memory"):
        ResidualRNN(IN, HIDDEN, memory=0.0)


def test_at_its_start_no_gradient_grows_and_long_ones_last() -> None:
    """With an orthogonal matrix; torch's own cell, driven like this, loses them."""
    torch.manual_seed(0)
    module = ResidualRNN(IN, 32, memory=100, dtype=F64)
    plain = nn.RNN(IN, 32, dtype=F64)
    nn.init.orthogonal_(module.weight_hh_l0)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "." not in k})
    x, norms = 2 * torch.randn(100, 1, IN, dtype=F64), []
    for cell in (module, plain):
        h = torch.zeros(1, 1, 32, dtype=F64, requires_grad=True)
        (gradient,) = torch.autograd.grad(cell(x, h)[1].square().sum(), h)
        output = cell(x, h)[1].detach()
        norms.append(float(gradient.norm() / (2 * output).norm()))
    assert 1e-3 < norms[0] <= 1
    assert norms[1] < 1e-3 * norms[0]
