"""Every cell that is measured, what it may cost, and where and how exactly it is run."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

import rnnguard
from rnnguard.nn import attention_readout, between_layers, fused, recurrent_weights

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where and how exactly everything is run."""

    device: str = "cpu"
    precision: str = "fp32"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, products are as exact as asked for."""
        exact = "high" if self.precision == "tf32" else "highest"
        before, half = torch.get_float32_matmul_precision(), PRECISIONS[self.precision]
        torch.set_float32_matmul_precision(exact)
        try:
            with (
                torch.backends.cudnn.flags(allow_tf32=self.precision == "tf32"),
                torch.autocast(self.device, half, enabled=half is not None),
            ):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @property
    def machine(self) -> str:
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        return f"{platform.machine()} CPU"


HERE = Place()


@dataclass(frozen=True)
class Case:
    """A cell, torch's module that it is measured against, and the most that it may cost."""

    build: Callable[..., nn.RNNBase]
    against: type[nn.RNNBase]
    limit: Callable[[int], float]
    layers: int = 1
    loop: bool = False
    """Whether the cell's rung 0 is measured too."""


def _class_a(hidden: int) -> float:
    return 1.10


def _free(hidden: int) -> float:
    return float("inf")


def _fused(kind: type[nn.RNNBase], **parts: Any) -> Callable[..., nn.RNNBase]:
    return cast(Callable[..., nn.RNNBase], partial(fused.FUSED[kind], **parts))


def cases() -> dict[str, Case]:
    """Every cell by its name."""
    between = partial(partial, between_layers.BetweenLayers)
    weights = recurrent_weights
    own = rnnguard.nn
    lstm = partial(_fused, nn.LSTM)
    return {
        "LSTM": Case(nn.LSTM, nn.LSTM, _free),
        "OutputNormLSTM": Case(own.OutputNormLSTM, nn.LSTM, _class_a),
        "LSTM, LayerNorm between layers": Case(
            lstm(between=between(norm=True)), nn.LSTM, _class_a, layers=2
        ),
        "LSTM, residual between layers": Case(
            lstm(between=between(shortcut="residual")), nn.LSTM, _class_a, layers=2
        ),
        "LSTM, highway between layers": Case(
            lstm(between=between(shortcut="highway")), nn.LSTM, _class_a, layers=2
        ),
        "LSTM, variational dropout": Case(
            lstm(between=between(dropout=0.3)), nn.LSTM, _class_a, layers=2
        ),
        "LSTM, DropConnect": Case(lstm(recurrent=weights.DropConnect), nn.LSTM, _class_a),
        "LSTM, weight norm": Case(lstm(recurrent=weights.WeightNorm), nn.LSTM, _class_a),
        "LSTM, orthogonal": Case(lstm(recurrent=weights.Orthogonal), nn.LSTM, _class_a),
        "LSTM, spectral bound": Case(lstm(recurrent=weights.SpectralBound), nn.LSTM, _class_a),
        "LSTM, attention read-out": Case(
            lstm(attention=attention_readout.AttentionReadout), nn.LSTM, _class_a
        ),
        "IndRNN": Case(own.IndRNN, nn.LSTM, lambda hidden: 0.7, loop=True),
        "LayerNormLSTM": Case(
            own.LayerNormLSTM, nn.LSTM, lambda hidden: 1.5 if hidden >= 256 else 3.0, loop=True
        ),
        "ZoneoutLSTM": Case(own.ZoneoutLSTM, nn.LSTM, _free, loop=True),
        "LayerNormGRU": Case(own.LayerNormGRU, nn.GRU, lambda hidden: 1.2, loop=True),
        "ZoneoutGRU": Case(own.ZoneoutGRU, nn.GRU, lambda hidden: 1.2, loop=True),
        "GateLastGRU": Case(own.GateLastGRU, nn.GRU, _free),
        "LayerNormRNN": Case(own.LayerNormRNN, nn.RNN, _free),
        "ResidualRNN": Case(own.ResidualRNN, nn.RNN, _free),
        "BoundedRNN": Case(own.BoundedRNN, nn.RNN, _free),
        "GatedRNN": Case(own.GatedRNN, nn.RNN, _free),
    }
