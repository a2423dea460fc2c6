"""LayerNorm after the recurrence: torch's fused kernel, then a norm over each step's output."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnguard.nn.contract import redraw_own, refuse_script, warn_of_older_checkpoint

# Safe for silent input: at zero variance the norm multiplies gradients by 1/sqrt(eps).
EPSILON = 1e-3


class _OutputNorm(nn.Module):
    """Normalises `output`, packed or not; the states h_n and c_n are torch's own."""

    output_norm: nn.LayerNorm

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        weight = next(self.parameters())
        norm = output_norm(output_width(self))
        self.output_norm = norm.to(device=weight.device, dtype=weight.dtype)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        output, state = super().forward(input, hx)
        if not isinstance(output, PackedSequence):
            return self.output_norm(output), state
        if torch.onnx.is_in_onnx_export():
            return self._norm_padded(output), state
        normed = self.output_norm(output.data)
        # Not by `_replace`: torch.compile would warn of a `.grad` that it looks at.
        order = (output.sorted_indices, output.unsorted_indices)
        return PackedSequence(normed, output.batch_sizes, *order), state

    def _norm_padded(self, packed: PackedSequence) -> PackedSequence:
        """The same through padding: ONNX has no packed form, only packing undone by padding."""
        plain = PackedSequence(packed.data, packed.batch_sizes)
        padded, lengths = pad_packed_sequence(plain)
        steps = torch.arange(padded.shape[0], device=padded.device).unsqueeze(1)
        # In floats, since ONNX gives the lengths as int32 where torch has int64. The padding
        # must be 0 again: the exporter takes this packing and the user's padding as one.
        ended = steps.float() >= lengths.to(padded.device).float()
        normed = self.output_norm(padded).masked_fill(ended.unsqueeze(2), 0.0)
        again = pack_padded_sequence(normed, lengths)
        return packed._replace(data=again.data, batch_sizes=again.batch_sizes)

    def reset_parameters(self) -> None:
        """torch's own draw for torch's own parameters, and the norm as a plain norm."""
        redraw_own(cast(nn.RNNBase, self))
        if "output_norm" in self._modules:  # not while still being built
            self.output_norm.reset_parameters()

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks first."""
        refuse_script(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """As torch does; tells why keys are missing where the checkpoint is an older one."""
        super()._load_from_state_dict(state_dict, prefix, *more)
        here = {key for key in state_dict if key.startswith(prefix)}
        if here and not any(key.startswith(f"{prefix}output_norm.") for key in here):
            warn_of_older_checkpoint(prefix, ["output_norm"])


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
