"""IndRNN: each unit for itself, its weight bounded, on torch's own parameters."""

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

from rnnguard.nn import IndRNN
from rnnguard.nn.indrnn import indrnn_parts, starting_weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_with_a_diagonal_matrix_it_is_torchs(form: str, activation: str) -> None:
    module = build("indrnn", activation=activation, **FORMS[form])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "weight_hh" in name:
                parameter.mul_(torch.eye(HIDDEN))
    plain = with_weights_of(module)
    # Off the diagonal torch's own has gradients, which a diagonal matrix is not moved by.
    for name, parameter in plain.named_parameters():
        if "weight_hh" in name:
            parameter.register_hook(lambda g: g * torch.eye(HIDDEN))
    assert_is_torchs(module, plain)


@pytest.mark.parametrize("activation", ["tanh", "relu", "leaky_relu", "elu"])
def test_its_equation(activation: str) -> None:
    module = build("indrnn", activation=activation)
    x, h = torch.randn(STEPS, BATCH, IN, dtype=F64), initial(module, BATCH)
    phi = getattr(torch.nn.functional, activation)
    found, last = module(x, h)
    fed = x @ module.weight_ih_l0.t() + module.bias_ih_l0 + module.bias_hh_l0
    for now, mine in zip(fed, found, strict=True):
        h = phi(now + module.weight_hh_l0.diagonal() * h)
        close(mine, h[0])
    close(last, h)


def test_without_a_past_it_is_the_activation_of_the_input() -> None:
    module = build("indrnn", bias=False)
    nn.init.zeros_(module.weight_hh_l0)
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    close(module(x)[0], (x @ module.weight_ih_l0.t()).relu())


def test_beyond_the_bound_u_is_the_bound() -> None:
    module = build("indrnn", memory=20, num_layers=2)
    bound = 2 ** (1 / 40)
    assert module.recurrence.bound == pytest.approx(bound)
    for name in ("weight_hh_l0", "weight_hh_l1"):
        nn.init.constant_(module.get_parameter(name), 7.0)
    held = build("indrnn", bound=float("inf"), num_layers=2)
    held.load_state_dict(module.state_dict())
    for name in ("weight_hh_l0", "weight_hh_l1"):
        nn.init.constant_(held.get_parameter(name), bound)
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    close(module(x), held(x))


def test_two_layers_at_the_bound_double_a_gradient_over_the_memory() -> None:
    """Always active, layers as wires: the gain of all layers' recurrences together is 2."""
    gain = 1.0
    module = IndRNN(1, 1, 2, memory=30, bias=False, dtype=F64)
    for layer in (0, 1):
        nn.init.constant_(module.get_parameter(f"weight_hh_l{layer}"), 9.0)
        nn.init.ones_(module.get_parameter(f"weight_ih_l{layer}"))
    h = torch.ones(2, 1, 1, dtype=F64)
    found = torch.autograd.functional.jacobian(
        lambda s: module(torch.zeros(30, 1, 1).double(), s)[1], h
    )
    for layer in (0, 1):
        gain *= float(found[layer, 0, 0, layer, 0, 0])
    assert gain == pytest.approx(2)


def test_u_starts_between_0_and_1_and_the_rest_at_0() -> None:
    module = IndRNN(IN, 400, **DEEP)
    for name, parameter in module.named_parameters():
        if "weight_hh" in name:
            u = parameter.detach().diagonal()
            assert 0 <= u.min() < 0.02 and 0.98 < u.max() <= 1
            assert float(u.mean()) == pytest.approx(0.5, abs=0.06)
            assert torch.equal(parameter.detach(), torch.diag(u))


def test_a_last_layer_that_is_read_at_the_end_starts_long() -> None:
    module = IndRNN(IN, 50, 2, memory=100, read_last=True)
    last = module.weight_hh_l1.detach().diagonal()
    assert last.min() >= 2 ** (-1 / 100) and last.max() <= module.recurrence.bound
    assert module.weight_hh_l0.detach().diagonal().min() < 0.2


def test_only_the_diagonal_has_a_gradient_and_all_of_it() -> None:
    module = build("indrnn")
    module(torch.randn(STEPS, BATCH, IN, dtype=F64))[0].square().sum().backward()
    gradient = module.weight_hh_l0.grad
    assert gradient is not None and bool(gradient.any())
    assert torch.equal(gradient, torch.diag(gradient.diagonal()))


def test_it_remembers_where_torchs_forgets() -> None:
    """A value at step 1 is read 60 steps on; the starting u of a morph is told by name."""
    plain = nn.RNN(1, 16, nonlinearity="relu", bias=False)
    part = indrnn_parts(plain, memory=60, read_last=True)["recurrence"]
    values = starting_weights(plain, part, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert set(values) == {"weight_hh_l0"}
    morph = IndRNN(1, 16, memory=60, bias=False)
    morph.load_state_dict({**plain.state_dict(), **values})
    reach = []
    for module in (plain, morph):
        x = torch.zeros(60, 1, 1)
        x[0] = 3
        x.requires_grad_()
        module(x)[0][-1].sum().backward()
        reach.append(float(x.grad[0].abs()))  # type: ignore[index]
    assert reach[1] > 0.1 and reach[1] > 1e3 * reach[0]
