"""LayerNorm after the recurrence: torch's fused kernel, then a norm over each step's output."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

# Safe for silent input: at zero variance the norm multiplies gradients by 1/sqrt(eps).
EPSILON = 1e-3


class _OutputNorm(nn.Module):
    """Normalises `output`, packed or not; the states h_n and c_n are torch's own."""

    output_norm: nn.LayerNorm

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        output, state = super().forward(input, hx)
        if isinstance(output, PackedSequence):
            return output._replace(data=self.output_norm(output.data)), state
        return self.output_norm(output), state


class OutputNormRNN(_OutputNorm, nn.RNN):
    """nn.RNN whose output is layer-normalised; same weights and keys, plus `output_norm`."""


class OutputNormLSTM(_OutputNorm, nn.LSTM):
    """nn.LSTM whose output is layer-normalised; same weights and keys, plus `output_norm`."""


class OutputNormGRU(_OutputNorm, nn.GRU):
    """nn.GRU whose output is layer-normalised; same weights and keys, plus `output_norm`."""


OUTPUT_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: OutputNormRNN,
    nn.LSTM: OutputNormLSTM,
    nn.GRU: OutputNormGRU,
}


def output_norm(width: int) -> nn.LayerNorm:
    """The child that a morph adds: LayerNorm over `width` features, starting as plain norm."""
    return nn.LayerNorm(width, eps=EPSILON)


def output_width(module: nn.Module) -> int:
    """Features of one step's output: hidden or projected size, times the directions."""
    assert isinstance(module, nn.RNNBase)
    size = module.proj_size or module.hidden_size
    return int(size) * (2 if module.bidirectional else 1)
