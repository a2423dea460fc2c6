"""Fused modules with children, and the calls that they are tested with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rnnguard.nn.attention_readout import AttentionReadout
from rnnguard.nn.between_layers import BetweenLayers
from rnnguard.nn.fused import FUSED
from rnnguard.nn.recurrent_weights import DropConnect, Orthogonal, SpectralBound, WeightNorm

IN, HIDDEN, STEPS, BATCH = 5, 6, 9, 4
LENGTHS = [3, STEPS, 1, 5]

KINDS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 3},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "without bias": {"num_layers": 2, "bias": False},
    "batch first": {"num_layers": 2, "batch_first": True},
    "dropout": {"num_layers": 3, "dropout": 0.4},
}

# What each child is when it changes nothing, and when it does.
IDLE: dict[str, dict[str, Any]] = {
    "between": {"between": BetweenLayers},
    "drop connect": {"recurrent": partial(DropConnect, p=0.0)},
    "spectral bound": {"recurrent": partial(SpectralBound, bound=100.0)},
    "attention": {"attention": AttentionReadout},
}
AT_WORK: dict[str, dict[str, Any]] = {
    "norm": {"between": partial(BetweenLayers, norm=True, norm_last=True)},
    "residual": {"between": partial(BetweenLayers, shortcut="residual")},
    "highway": {"between": partial(BetweenLayers, shortcut="highway")},
    "weight norm": {"recurrent": WeightNorm},
    "orthogonal": {"recurrent": Orthogonal},
    "spectral bound": {"recurrent": partial(SpectralBound, bound=0.3)},
    "attention": {"attention": AttentionReadout},
    "all": {
        "between": partial(BetweenLayers, norm=True, shortcut="residual"),
        "recurrent": partial(DropConnect, p=0.5),
        "attention": partial(AttentionReadout, heads=2),
    },
}


def fused(kind: str, children: dict[str, Any], *sizes: int, **options: Any) -> nn.RNNBase:
    """A module with what it adds drawn so that it matters: nothing zero, nothing one."""
    module = FUSED[KINDS[kind]](*(sizes or (IN, HIDDEN)), **children, **options)
    assert isinstance(module, nn.RNNBase)
    with torch.no_grad():
        for child in module.children():
            for parameter in child.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def plain_of(module: nn.RNNBase) -> nn.RNNBase:
    """torch's own module with the same parameters, as an independent object."""
    kind = KINDS[next(kind for kind, cls in KINDS.items() if isinstance(module, cls))]
    names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    options = {name: getattr(module, name) for name in names if getattr(module, name)}
    options["bias"] = module.bias
    dtype = next(module.parameters()).dtype
    plain = kind(module.input_size, module.hidden_size, dtype=dtype, **options)
    plain.load_state_dict({key: module.state_dict()[key] for key in plain.state_dict()})
    return plain.train(module.training)


def states(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def initial_state(module: nn.RNNBase, *batch: int) -> Any:
    dtype = next(module.parameters()).dtype
    count = module.num_layers * (2 if module.bidirectional else 1)
    hidden = torch.randn(count, *batch, module.proj_size or module.hidden_size, dtype=dtype)
    if not isinstance(module, nn.LSTM):
        return hidden
    return hidden, torch.randn(count, *batch, module.hidden_size, dtype=dtype)


def assert_same(got: Any, expected: Any, **tolerance: float) -> None:
    """Outputs (or packed ones) and states equal, bit for bit without a tolerance."""
    for mine, theirs in zip(_flat(got), _flat(expected), strict=True):
        if tolerance:
            torch.testing.assert_close(mine, theirs, **tolerance)
        else:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def _flat(result: Any) -> list[Tensor]:
    output, state = result
    rows = [output] if isinstance(output, Tensor) else [output.data, output.batch_sizes]
    return [*rows, *states(state)]
