"""Without norms and shares a sequence op is torch's own layer, in value and in error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sequence_cases import rung
from torch import Tensor, nn

from rnnguard.nn.sequences.elman import elman_sequence
from rnnguard.nn.sequences.gru import gru_sequence
from rnnguard.nn.sequences.lstm import lstm_sequence
from rnnguard.nn.sequences.parts import GRUWeights, LSTMWeights

SEEDS = 4


def _own(module: nn.RNNBase, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights: list[Any] = list(module._flat_weights)
    if module.mode == "LSTM":
        biases = weights[2:4] if module.bias else [None, None]
        hr = weights[-1] if module.proj_size else None
        return lstm_sequence(x, *states, LSTMWeights(*weights[:2], *biases, hr))
    if module.mode == "GRU":
        return gru_sequence(x, *states, GRUWeights(*weights))
    return elman_sequence(x, *states, GRUWeights(*weights), module.mode[4:].lower())


def _torch(module: nn.RNNBase, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first = tuple(state.unsqueeze(0) for state in states)
    y, last = module(x, first if module.mode == "LSTM" else first[0])
    finals = last if isinstance(last, tuple) else (last,)
    return (y, *(final.squeeze(0) for final in finals))


@dataclass(frozen=True)
class Layer:
    build: Callable[[], nn.RNNBase]
    inputs: float = 1.0
    steps: int = 50
    batch: int = 8

    def run(self, seed: int, dtype: torch.dtype, own: bool) -> list[Tensor]:
        """Outputs and all gradients, from the same float32 numbers in each dtype."""
        torch.manual_seed(seed)
        module = self.build()
        width = module.proj_size or module.hidden_size
        shapes = [(width,), (module.hidden_size,)][: 2 if module.mode == "LSTM" else 1]
        given = [
            torch.randn(self.steps, self.batch, module.input_size),
            *(torch.randn(self.batch, *shape) for shape in shapes),
        ]
        # Numbers that every dtype here holds exactly.
        given = [(tensor * self.inputs).bfloat16().to(dtype).requires_grad_() for tensor in given]
        module = module.bfloat16().to(dtype)
        outputs = (_own if own else _torch)(module, given[0], tuple(given[1:]))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = torch.stack([output.to(wide).square().sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(total, [*given, *module.parameters()])
        return [*(output.detach() for output in outputs), *gradients]


LAYERS = {
    "lstm": Layer(lambda: nn.LSTM(4, 32)),
    "lstm without bias": Layer(lambda: nn.LSTM(4, 32, bias=False)),
    "lstm on weak input": Layer(lambda: nn.LSTM(4, 32, bias=False), inputs=1e-4),
    "lstm projected": Layer(lambda: nn.LSTM(4, 32, proj_size=8)),
    "gru": Layer(lambda: nn.GRU(4, 32)),
    "gru on few": Layer(lambda: nn.GRU(4, 32), steps=20, batch=3),
    "gru without bias": Layer(lambda: nn.GRU(4, 32, bias=False)),
    "rnn": Layer(lambda: nn.RNN(4, 32)),
    "rnn relu": Layer(lambda: nn.RNN(4, 32, nonlinearity="relu")),
}
EVERY = pytest.mark.parametrize("name", LAYERS)
# Torch says so of projected LSTMs, once.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@EVERY
@pytest.mark.parametrize("number", [0, 1])
def test_equals_torch(name: str, number: int) -> None:
    with rung(number):
        found = LAYERS[name].run(0, torch.float64, own=True)
    expected = LAYERS[name].run(0, torch.float64, own=False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _errors(layer: Layer, dtype: torch.dtype, own: bool) -> list[float]:
    """The rms error of each output and gradient over some seeds, relative to float64."""
    wrong: list[float] = []
    for seed in range(SEEDS):
        exact = layer.run(seed, torch.float64, own=False)
        found = layer.run(seed, dtype, own)
        ratios = [
            float((one.double() - other).norm() / other.norm())
            for one, other in zip(found, exact, strict=True)
        ]
        wrong = [a + b**2 for a, b in zip(wrong or [0.0] * len(ratios), ratios, strict=True)]
    return [(total / SEEDS) ** 0.5 for total in wrong]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    with rung(1):
        own = _errors(LAYERS[name], dtype, own=True)
    theirs = _errors(LAYERS[name], dtype, own=False)
    assert [(a, b) for a, b in zip(own, theirs, strict=True) if a > 2 * b] == []
