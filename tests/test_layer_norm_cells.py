"""LayerNorm inside the recurrence: against a plain loop in float64, off, and on silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cell_cases import (
    BATCH,
    CELLS,
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
    plain_of,
    with_weights_of,
)
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from rnnguard.nn import LayerNormGRU, LayerNormLSTM, LayerNormRNN
from rnnguard.nn.layer_norm_cells import (
    LAYER_NORM_CELLS,
    GateAndCellNorm,
    GateNorm,
    layer_norm_parts,
)
from rnnguard.nn.output_norm import EPSILON

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

every_cell = pytest.mark.parametrize("name", [name for name in CELLS if "norm" in name])


def switched_off(module: nn.RNNBase) -> nn.RNNBase:
    for child in module.children():
        assert isinstance(child, GateNorm)
        child.active = False
    return module


@every_cell
@pytest.mark.parametrize("form", FORMS)
def test_without_its_norms_it_is_torchs(name: str, form: str) -> None:
    module = switched_off(build(name, **FORMS[form]))
    assert_is_torchs(module, with_weights_of(module))


def test_without_its_norms_a_projected_one_is_torchs() -> None:
    module = switched_off(build("layer norm lstm", proj_size=2, **DEEP))
    assert_is_torchs(module, with_weights_of(module))


def test_without_its_norms_a_relu_is_torchs() -> None:
    module = switched_off(build("layer norm rnn", nonlinearity="relu"))
    assert_is_torchs(module, with_weights_of(module))


def sums(module: nn.RNNBase, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The two normalised sums of one step, the shift in the first."""
    part = module.norm_l0
    fed = x @ module.weight_ih_l0.t() + module.bias_ih_l0
    back = h @ module.weight_hh_l0.t() + module.bias_hh_l0
    width = fed.shape[-1:]
    return (
        layer_norm(fed, width, part.gain_ih, part.shift, EPSILON),
        layer_norm(back, width, part.gain_hh, None, EPSILON),
    )


def test_the_lstm_of_ba_et_al() -> None:
    module = build("layer norm lstm")
    x, hx = torch.randn(STEPS, BATCH, IN, dtype=F64), initial(module, BATCH)
    (h, c), part, outputs = (state[0] for state in hx), module.norm_l0, []
    for now in x:
        i, f, g, o = torch.add(*sums(module, now, h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()  # raw: not what the norm gives
        read = layer_norm(c, (HIDDEN,), part.gain_cell, part.shift_cell, EPSILON)
        h = o.sigmoid() * read.tanh()
        outputs.append(h)
    close(module(x, hx), (torch.stack(outputs), (h[None], c[None])))


def test_the_gru() -> None:
    module = build("layer norm gru")
    x, hx = torch.randn(STEPS, BATCH, IN, dtype=F64), initial(module, BATCH)
    h, outputs = hx[0], []
    for now in x:
        fed, back = sums(module, now, h)
        (ur, uz, un), (qr, qz, qn) = fed.chunk(3, -1), back.chunk(3, -1)
        z = (uz + qz).sigmoid()
        h = z * h + (1 - z) * (un + (ur + qr).sigmoid() * qn).tanh()
        outputs.append(h)
    close(module(x, hx), (torch.stack(outputs), h[None]))


def test_the_plain_recurrence() -> None:
    module = build("layer norm rnn", nonlinearity="relu")
    x, hx = torch.randn(STEPS, BATCH, IN, dtype=F64), initial(module, BATCH)
    h, outputs = hx[0], []
    for now in x:
        h = torch.add(*sums(module, now, h)).relu()
        outputs.append(h)
    close(module(x, hx), (torch.stack(outputs), h[None]))


def test_training_through_silence_stays_finite() -> None:
    """30 silent steps before 370 of input, with biases and without."""
    torch.manual_seed(1)
    for cls in (LayerNormLSTM, LayerNormGRU, LayerNormRNN):
        for bias in (True, False):
            module = cls(2, 8, bias=bias)
            optimizer = torch.optim.Adam(module.parameters(), 3e-3)
            x = torch.randn(400, 4, 2)
            x[:30] = 0
            x.requires_grad_()
            losses = []
            for _ in range(4):
                loss = (module(x)[0][-1] - 0.5).square().mean()
                optimizer.zero_grad()
                loss.backward()
                found = [x.grad, *(parameter.grad for parameter in module.parameters())]
                assert all(g is not None and bool(g.isfinite().all()) for g in found)
                optimizer.step()
                losses.append(float(loss.detach()))
            assert min(losses[1:]) < losses[0], cls


@every_cell
@pytest.mark.parametrize("bias", [False, True])
def test_silence_multiplies_a_gradient_by_a_bounded_factor(name: str, bias: bool) -> None:
    """Biases of 0 as many set them, or none: a state of 0 would stay 0, and overflow backwards."""
    module = CELLS[name](IN, 32, bias=bias)
    for key, parameter in module.named_parameters():
        if key.startswith("bias"):
            nn.init.zeros_(parameter)
    largest = []
    for stays in (False, True):
        if stays:
            nn.init.zeros_(module.norm_l0.shift)
        x = torch.zeros(100, 1, IN, requires_grad=True)
        (module(x)[0][-1] * torch.randn(32)).sum().backward()
        assert x.grad is not None
        largest.append(float(x.grad.abs().max()))
    assert largest[0] < 1e6
    assert not largest[1] < 1e15  # what the shift is for


@pytest.mark.parametrize(("cls", "keep", "write"), [(LayerNormLSTM, 1, 0), (LayerNormGRU, 1, None)])
def test_the_keep_gates_offset_lies_in_the_shift(
    cls: type[nn.RNNBase], keep: int, write: int | None
) -> None:
    gates = cls(IN, HIDDEN).norm_l0.shift.view(-1, HIDDEN)
    assert bool((gates[keep] == 1).all())
    gates = cls(IN, HIDDEN, forget=2.5).norm_l0.shift.view(-1, HIDDEN)
    assert bool((gates[keep] == 2.5).all())
    gates = cls(IN, HIDDEN, memory=60).norm_l0.shift.view(-1, HIDDEN)
    steps = gates[keep].detach().exp()
    assert float(steps.min()) > 1 and 40 < float(steps.max()) < 59
    candidate = 2
    others = [row for row in range(len(gates)) if row not in (keep, write, candidate)]
    assert not gates[others].any()
    assert 0 < float(gates[candidate].detach().abs().max()) <= HIDDEN**-0.5 * 1.001
    if write is not None:
        assert torch.equal(gates[write], -gates[keep])


@pytest.mark.parametrize("plain", list(LAYER_NORM_CELLS))
def test_parts_fit_a_module_of_torchs(plain: type[nn.Module]) -> None:
    module = plain(IN, HIDDEN, **DEEP)
    parts = layer_norm_parts(module, gain=0.5, eps=1e-2)  # type: ignore[arg-type]
    assert list(parts) == ["norm_l0", "norm_l0_reverse", "norm_l1", "norm_l1_reverse"]
    rows = module.weight_hh_l1.shape[0]
    for part in parts.values():
        assert isinstance(part, GateNorm) and part.eps == 1e-2
        assert part.gain_hh.shape == (rows,) and bool((part.gain_hh == 0.5).all())
        assert isinstance(part, GateAndCellNorm) == (plain is nn.LSTM)
    module.__class__ = LAYER_NORM_CELLS[plain]
    for name, part in parts.items():
        module.add_module(name, part)
    assert plain_of(module) is plain
    assert module(torch.randn(STEPS, BATCH, IN))[0].shape == (STEPS, BATCH, 2 * HIDDEN)


def test_options_that_make_no_sense_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"eps": 0.0}, {"gain": float("nan")}, {"memory": 1}]
    for options in wrong:
        with pytest.raises(ValueError):
            LayerNormLSTM(IN, HIDDEN, **options)
    with pytest.raises(TypeError, match="forget"):  # no gate to shift
        LayerNormRNN(IN, HIDDEN, forget=1.0)
