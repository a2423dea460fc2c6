"""Norms, shortcuts and masks between layers, against torch's one-layer modules by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from fused_cases import BATCH, HIDDEN, IN, KINDS, LENGTHS, STEPS, fused, plain_of
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnguard.nn.between_layers import BetweenLayers
from rnnguard.nn.fused import FusedLSTM
from rnnguard.nn.output_norm import EPSILON

every_kind = pytest.mark.parametrize("kind", KINDS)


def single_layers(module: nn.RNNBase) -> list[nn.RNNBase]:
    """torch's own one-layer modules with the weights of each layer."""
    plain, made = plain_of(module), []
    ways = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        width = module.input_size if layer == 0 else ways * module.hidden_size
        single = type(plain)(width, module.hidden_size, bidirectional=module.bidirectional)
        values = {
            name.replace(f"_l{layer}", "_l0"): value
            for name, value in plain.state_dict().items()
            if f"_l{layer}" in name
        }
        single.load_state_dict(values)
        made.append(single)
    return made


def normed(norms: nn.ModuleDict, layer: int, y: Tensor) -> Tensor:
    if str(layer) not in norms:
        return y
    norm = norms[str(layer)]
    return layer_norm(y, (y.shape[-1],), norm.weight, norm.bias, EPSILON)


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("shortcut", ["none", "residual", "highway"])
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"norm": True, "norm_last": True}])
@pytest.mark.parametrize("width", [IN, None])
def test_is_what_it_says(
    kind: str, bidirectional: bool, shortcut: str, options: dict[str, Any], width: int | None
) -> None:
    make = partial(BetweenLayers, shortcut=shortcut, **options)
    inputs = width or (2 * HIDDEN if bidirectional else HIDDEN)
    sizes = (inputs, HIDDEN, 3)
    module = fused(kind, {"between": make}, *sizes, bidirectional=bidirectional)
    x = torch.randn(STEPS, BATCH, inputs)
    rows, last = x, []
    for layer, single in enumerate(single_layers(module)):
        y, state = single(rows)
        last.append(state[0] if kind == "lstm" else state)
        y = normed(module.between.norms, layer, y)
        if rows.shape == y.shape and shortcut == "residual":
            y = y + rows
        elif rows.shape == y.shape and shortcut == "highway":
            gate = module.between.gates[str(layer)]
            share = torch.sigmoid(rows * gate.weight + gate.bias)
            y = share * y + (1 - share) * rows
        rows = y
    output, state = module(x)
    torch.testing.assert_close(output, rows)
    torch.testing.assert_close(state[0] if kind == "lstm" else state, torch.cat(last))


def test_a_shortcut_needs_equal_widths() -> None:
    wide = FusedLSTM(IN, HIDDEN, 2, between=partial(BetweenLayers, shortcut="highway"))
    assert list(wide.between.gates) == ["1"]
    equal = FusedLSTM(HIDDEN, HIDDEN, 2, between=partial(BetweenLayers, shortcut="highway"))
    assert list(equal.between.gates) == ["0", "1"]


@pytest.mark.parametrize("bias", [-1.0, -4.0])
def test_a_highway_first_lets_its_input_pass(bias: float) -> None:
    make = partial(BetweenLayers, shortcut="highway", gate_bias=bias)
    module = FusedLSTM(HIDDEN, HIDDEN, between=make)
    x = torch.randn(STEPS, BATCH, HIDDEN)
    share = torch.sigmoid(torch.tensor(bias))
    expected = x + share * (plain_of(module)(x)[0] - x)
    torch.testing.assert_close(module(x)[0], expected)


@every_kind
def test_keys_only_grow(kind: str) -> None:
    make = partial(BetweenLayers, norm=True, shortcut="highway")
    module = fused(kind, {"between": make}, num_layers=2)
    added = set(module.state_dict()) - set(plain_of(module).state_dict())
    assert added == {f"between.{part}.{name}" for part, name in [
        ("norms.0", "weight"), ("norms.0", "bias"), ("gates.1", "weight"), ("gates.1", "bias")
    ]}  # fmt: skip


def masked_features(module: BetweenLayers, layer: int, ones: Tensor) -> Tensor:
    return module.fed(layer, ones, None, True) == 0


def test_one_mask_for_all_steps_of_a_sequence() -> None:
    module = nn.LSTM(IN, HIDDEN, 2)
    between = BetweenLayers(module, dropout=0.5, input_dropout=0.25)
    ones = torch.ones(STEPS, 400, IN)
    for layer, share in ((0, 0.25), (1, 0.5)):
        fed = between.fed(layer, ones, None, True)
        assert torch.equal(fed, fed[:1].expand_as(fed))
        assert {round(float(v), 5) for v in fed.unique()} == {0.0, round(1 / (1 - share), 5)}
        assert float((fed[0] == 0).float().mean()) == pytest.approx(share, abs=0.05)
        # Sequences and forwards draw their own.
        assert not torch.equal(fed[:, 0], fed[:, 1]) or not torch.equal(fed[:, 0], fed[:, 2])
        assert not torch.equal(fed, between.fed(layer, ones, None, True))
        assert between.fed(layer, ones, None, False) is ones


def test_packed_sequences_have_one_mask_each() -> None:
    between = BetweenLayers(nn.LSTM(IN, HIDDEN, 2), dropout=0.5)
    ones = torch.ones(STEPS, BATCH, HIDDEN)
    packed = pack_padded_sequence(ones, LENGTHS, enforce_sorted=False)
    fed = between.fed(1, packed.data, packed.batch_sizes, True)
    rows, lengths = pad_packed_sequence(packed._replace(data=fed))
    firsts = rows[0]
    assert len({tuple(row.tolist()) for row in firsts}) > 1
    for index, length in enumerate(lengths.tolist()):
        assert torch.equal(rows[:length, index], firsts[index].expand(length, -1))


@every_kind
def test_masks_fall_on_the_kernels_input_and_not_on_the_shortcut(kind: str) -> None:
    """With all weights zero only the shortcut is left, and it comes through whole."""
    make = partial(BetweenLayers, shortcut="residual", dropout=0.9, input_dropout=0.9)
    module = fused(kind, {"between": make}, HIDDEN, HIDDEN, 2)
    nn.utils.vector_to_parameters(
        torch.zeros(sum(p.numel() for p in module.parameters())), module.parameters()
    )
    x = torch.randn(STEPS, BATCH, HIDDEN)
    torch.testing.assert_close(module(x)[0], x)


@every_kind
def test_training_mask_is_used_and_evaluation_has_none(kind: str) -> None:
    make = partial(BetweenLayers, dropout=0.5)
    module = fused(kind, {"between": make}, num_layers=2)
    x = torch.randn(STEPS, BATCH, IN)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], plain_of(module)(x)[0])


def test_torchs_own_dropout_spares_the_shortcut() -> None:
    make = partial(BetweenLayers, shortcut="residual")
    module = FusedLSTM(HIDDEN, HIDDEN, 2, dropout=1.0, between=make)
    x = torch.randn(STEPS, BATCH, HIDDEN)
    second = single_layers(module)[1](x)[0]
    torch.testing.assert_close(module(x)[0], x + second)


def test_the_mean_over_masks_is_right() -> None:
    between = BetweenLayers(nn.LSTM(IN, HIDDEN, 2), dropout=0.3)
    x = torch.randn(1, 1, HIDDEN, dtype=torch.float64)
    mean = torch.stack([between.fed(1, x, None, True) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, x, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "options", [{"shortcut": "dense"}, {"dropout": 1.0}, {"input_dropout": -0.1}]
)
def test_wrong_options_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        BetweenLayers(nn.GRU(IN, HIDDEN), **options)
