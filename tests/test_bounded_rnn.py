"""The bounded recurrence: torch's own within the bound, and no growth beyond it."""

from __future__ import annotations

import pytest
import torch
from cell_cases import DEEP, F64, FORMS, HIDDEN, IN, assert_is_torchs, build, close, with_weights_of
from torch import nn

from rnnguard.nn import BoundedRNN
from rnnguard.nn.bounded_rnn import bounded_parts

ACTIVATIONS = ["tanh", "relu", "leaky_relu", "elu"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("bound", [float("inf"), 20.0])
def test_within_its_bound_it_is_torchs(form: str, activation: str, bound: float) -> None:
    module = build("bounded rnn", activation=activation, bound=bound, **FORMS[form])
    assert_is_torchs(module, with_weights_of(module))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_beyond_its_bound_no_gradient_grows(activation: str) -> None:
    module = BoundedRNN(IN, 16, activation=activation, dtype=F64)
    nn.init.normal_(module.weight_hh_l0)  # a gain of about 8
    x = torch.randn(40, 1, IN, dtype=F64)
    h = torch.randn(1, 1, 16, dtype=F64)
    steps = torch.autograd.functional.jacobian(lambda s: module(x, s)[1].flatten(), h)
    gain = float(torch.linalg.matrix_norm(steps.reshape(16, 16), 2))
    assert 0 < gain <= 1 + 1e-12
    loose = BoundedRNN(IN, 16, activation="relu", bound=float("inf"), dtype=F64)
    loose.load_state_dict(module.state_dict())
    assert float(loose(x, h)[1].detach().norm()) > 1e6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_its_activation(activation: str) -> None:
    module = build("bounded rnn", activation=activation)
    nn.init.zeros_(module.weight_hh_l0)
    x = torch.randn(3, 2, IN, dtype=F64)
    bias = module.bias_ih_l0 + module.bias_hh_l0
    phi = getattr(torch.nn.functional, activation)
    close(module(x)[0], phi(x @ module.weight_ih_l0.t() + bias))


def test_the_bound_is_shared_over_steps_and_layers() -> None:
    module = BoundedRNN(IN, HIDDEN, memory=50, **DEEP)
    assert module.recurrence.bound ** (50 * 2) == pytest.approx(2)
    assert BoundedRNN(IN, HIDDEN).recurrence.bound == 1
    assert bounded_parts(nn.RNN(IN, HIDDEN), bound=0.9)["recurrence"].bound == 0.9


@pytest.mark.parametrize(
    ("build_one", "activation", "nonlinearity"),
    [
        (lambda: BoundedRNN(IN, HIDDEN), "relu", "relu"),
        (lambda: BoundedRNN(IN, HIDDEN, activation="elu"), "elu", "relu"),
        (lambda: BoundedRNN(IN, HIDDEN, activation="tanh"), "tanh", "tanh"),
        (lambda: BoundedRNN(IN, HIDDEN, nonlinearity="tanh"), "tanh", "tanh"),
        (lambda: BoundedRNN(IN, HIDDEN, 1, "tanh"), "tanh", "tanh"),
    ],
)
def test_which_activation_it_takes(build_one: object, activation: str, nonlinearity: str) -> None:
    module = build_one()  # type: ignore[operator]
    assert module.recurrence.activation == activation
    assert module.nonlinearity == nonlinearity


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_morph_keeps_the_modules_own_activation(nonlinearity: str) -> None:
    part = bounded_parts(nn.RNN(IN, HIDDEN, nonlinearity=nonlinearity))["recurrence"]
    assert part.activation == nonlinearity
