"""Every sequence op in every form, as a function of flat tensors, on either rung."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from rnnguard.nn.sequences import rungs
from rnnguard.nn.sequences.activation import ACTIVATIONS
from rnnguard.nn.sequences.diagonal import diagonal_sequence
from rnnguard.nn.sequences.elman import elman_sequence
from rnnguard.nn.sequences.gate_last import gate_last_sequence
from rnnguard.nn.sequences.gated import gated_sequence
from rnnguard.nn.sequences.gru import gru_sequence
from rnnguard.nn.sequences.lstm import lstm_sequence
from rnnguard.nn.sequences.parts import GateNorms, GRUWeights, Kept, LSTMNorms, LSTMWeights

FEATURES = 2


@dataclass(frozen=True)
class Size:
    steps: int = 3
    batch: int = 2
    hidden: int = 3
    bias: bool = True
    dtype: torch.dtype = torch.float64

    def drawn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale).to(self.dtype).requires_grad_()

    def x(self) -> Tensor:
        return self.drawn(self.steps, self.batch, FEATURES)

    def state(self, width: int | None = None) -> Tensor:
        return self.drawn(self.batch, width or self.hidden, scale=0.5)

    def weights(self, blocks: int, width: int | None = None) -> list[Tensor | None]:
        rows, width = blocks * self.hidden, width or self.hidden
        biases = [self.drawn(rows, scale=0.5) if self.bias else None for _ in range(2)]
        spread = 0.8 / width**0.5
        return [self.drawn(rows, FEATURES), self.drawn(rows, width, scale=spread), *biases]

    def norms(self, blocks: int) -> list[Tensor]:
        return [self.drawn(blocks * self.hidden) for _ in range(3)]

    def over(self) -> Tensor:
        """What packed sequences of lengths T, T - 1, ... keep: all, once they are over."""
        lengths = (self.steps - torch.arange(self.batch)).clamp(min=1).unsqueeze(1)
        return (torch.arange(self.steps).view(-1, 1, 1) >= lengths).to(self.dtype)

    def shares(self) -> Tensor:
        return torch.rand(self.steps, self.batch, self.hidden, dtype=self.dtype)


@dataclass(frozen=True)
class Case:
    """A public function and all its arguments; called with other tensors in their place."""

    function: Callable[..., tuple[Tensor, ...]]
    arguments: tuple[Any, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_flatten(self.arguments)[0] if _asks(leaf)]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves, shape = tree_flatten(self.arguments)
        given = iter(tensors)
        leaves = [next(given) if _asks(leaf) else leaf for leaf in leaves]
        return self.function(*tree_unflatten(leaves, shape))

    def in_dtype(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype, as new leaves."""
        leaves, shape = tree_flatten(self.arguments)
        cast = [
            leaf.detach().to(dtype).requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in leaves
        ]
        return replace(self, arguments=tree_unflatten(cast, shape))


def _asks(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _lstm(norms: bool = False, proj: int = 0, kept: str = "") -> Callable[[Size], Case]:
    def build(size: Size) -> Case:
        width = proj or size.hidden
        hr = size.drawn(proj, size.hidden) if proj else None
        weights = LSTMWeights(*size.weights(4, width), hr)
        cell = [size.drawn(size.hidden), size.drawn(size.hidden)]
        given = LSTMNorms(*size.norms(4), *cell, 1e-3) if norms else None
        stay = Kept()
        if kept:
            hidden = size.shares()[..., :width] if kept == "zoneout" else size.over()
            stay = Kept(hidden, size.shares() if kept == "zoneout" else size.over())
        arguments = size.x(), size.state(width), size.state(), weights, given, stay
        return Case(lstm_sequence, arguments)

    return build


def _gru(norms: bool = False, kept: str = "") -> Callable[[Size], Case]:
    def build(size: Size) -> Case:
        given = GateNorms(*size.norms(3), 1e-3) if norms else None
        weights = GRUWeights(*size.weights(3))
        return Case(gru_sequence, (size.x(), size.state(), weights, given, _stay(size, kept)))

    return build


def _elman(
    activation: str, norms: bool = False, residual: bool = False, kept: str = ""
) -> Callable[[Size], Case]:
    def build(size: Size) -> Case:
        given = GateNorms(*size.norms(1), 1e-3) if norms else None
        carry = size.drawn(size.hidden, scale=0.5) if residual else None
        scale = size.drawn(scale=0.5) if residual else None
        weights = GRUWeights(*size.weights(1))
        arguments = size.x(), size.state(), weights, activation, given, carry, scale
        return Case(elman_sequence, (*arguments, _stay(size, kept)))

    return build


def _diagonal(activation: str, kept: str = "") -> Callable[[Size], Case]:
    def build(size: Size) -> Case:
        ih, _, bias, _ = size.weights(1)
        u = size.drawn(size.hidden, scale=0.5)
        arguments = size.x(), size.state(), ih, u, bias, activation, _stay(size, kept)
        return Case(diagonal_sequence, arguments)

    return build


def _gated(activation: str, kept: str = "") -> Callable[[Size], Case]:
    def build(size: Size) -> Case:
        weights, gate = GRUWeights(*size.weights(1)), GRUWeights(*size.weights(1))
        arguments = size.x(), size.state(), weights, gate, activation, _stay(size, kept)
        return Case(gated_sequence, arguments)

    return build


def _gate_last(kept: str = "") -> Callable[[Size], Case]:
    def build(size: Size) -> Case:
        stay = Kept(_stay(size, kept), _stay(size, kept))
        arguments = size.x(), size.state(), size.state(), GRUWeights(*size.weights(3)), stay
        return Case(gate_last_sequence, arguments)

    return build


def _stay(size: Size, kept: str) -> Tensor | None:
    return None if not kept else size.shares() if kept == "zoneout" else size.over()


CASES: dict[str, Callable[[Size], Case]] = {
    "lstm": _lstm(),
    "lstm packed": _lstm(kept="packed"),
    "lstm zoneout": _lstm(kept="zoneout"),
    "lstm projected": _lstm(proj=2),
    "lstm projected packed": _lstm(proj=2, kept="packed"),
    "lstm normed": _lstm(norms=True),
    "lstm normed projected zoneout": _lstm(norms=True, proj=2, kept="zoneout"),
    "gru": _gru(),
    "gru packed": _gru(kept="packed"),
    "gru normed": _gru(norms=True),
    "gru normed zoneout": _gru(norms=True, kept="zoneout"),
    **{f"rnn {activation}": _elman(activation) for activation in ACTIVATIONS},
    "rnn packed": _elman("tanh", kept="packed"),
    "rnn residual": _elman("elu", residual=True),
    "rnn normed": _elman("tanh", norms=True),
    "rnn normed residual zoneout": _elman("tanh", norms=True, residual=True, kept="zoneout"),
    **{f"diagonal {activation}": _diagonal(activation) for activation in ACTIVATIONS},
    "diagonal packed": _diagonal("tanh", kept="packed"),
    "diagonal zoneout": _diagonal("elu", kept="zoneout"),
    "gated": _gated("tanh"),
    "gated elu zoneout": _gated("elu", kept="zoneout"),
    "gate last": _gate_last(),
    "gate last zoneout": _gate_last(kept="zoneout"),
}


@contextmanager
def rung(number: int) -> Iterator[None]:
    """Every call inside runs on this rung; one that cannot is an error."""
    fits = rungs._fit
    seen: list[bool] = []

    def told(tensors: Sequence[Tensor]) -> bool:
        seen.append(fits(tensors))
        return seen[-1] and number == 1

    with mock.patch.object(rungs, "_fit", told):
        yield
    assert seen and all(seen), "no call here was fit for the fast rung"
