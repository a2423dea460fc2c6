"""What stands between the layers of a recurrent module: norms, shortcuts, one mask per sequence."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop

from rnnguard.nn.highway import HighwayGate
from rnnguard.nn.output_norm import output_norm, output_width

Shortcut = Literal["none", "residual", "highway"]


class BetweenLayers(nn.Module):
    """The `between` child of FusedRNN, FusedLSTM and FusedGRU; with no option it changes nothing.

    norm: LayerNorm over the output of each layer but the last; norm_last: over the last's too
        (Ba et al. 2016, on the layers' outputs; epsilon safe for silent input).
    shortcut: "residual" adds a layer's input to its (normed) output, "highway" blends the two by
        a gate whose bias starts at `gate_bias` (-1 to -4: the deeper the lower). Only round
        layers whose input is as wide as their output: all but the first, as a rule.
    dropout, input_dropout: share of the features of a layer's input that is masked in training,
        the same ones at every step of a sequence (Gal and Ghahramani 2016), above the first
        layer and on the module's input. The shortcut is not masked. The module's own `dropout`,
        which draws anew at each step, stays as torch has it, before the shortcut.
    """

    def __init__(
        self,
        module: nn.RNNBase,
        *,
        norm: bool = False,
        norm_last: bool = False,
        shortcut: Shortcut = "none",
        gate_bias: float = -2.0,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if shortcut not in ("none", "residual", "highway"):
            raise ValueError(f"shortcut is none, residual or highway, not {shortcut!r}")
        for name, share in (("dropout", dropout), ("input_dropout", input_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} is a share of at least 0 and below 1, not {share}")
        width, layers = output_width(module), module.num_layers
        self.shortcut: Shortcut = shortcut
        self.dropout, self.input_dropout = float(dropout), float(input_dropout)
        self.joined_layers = tuple(range(0 if module.input_size == width else 1, layers))
        normed = [*(range(layers - 1) if norm else ()), *([layers - 1] if norm_last else ())]
        gated = self.joined_layers if shortcut == "highway" else ()
        self.norms = nn.ModuleDict({str(layer): output_norm(width) for layer in normed})
        self.gates = nn.ModuleDict({str(layer): HighwayGate(width, gate_bias) for layer in gated})
        like = next(module.parameters())
        self.to(device=like.device, dtype=like.dtype)

    def reset_parameters(self) -> None:
        """The norms as plain norms, the gates with their first bias."""
        for part in (*self.norms.values(), *self.gates.values()):
            cast(nn.LayerNorm | HighwayGate, part).reset_parameters()

    def fed(self, layer: int, rows: Tensor, batch_sizes: Tensor | None, training: bool) -> Tensor:
        """What the kernel of a layer is fed: rows (T, B, F) or packed (N, F), masked or not."""
        share = self.dropout if layer else self.input_dropout
        if not training or not share:
            return rows
        batch = rows.shape[1] if batch_sizes is None else int(batch_sizes[0])
        mask = drop(rows.new_ones(batch, rows.shape[-1]), share, True)
        if batch_sizes is None:
            return rows * mask
        running = torch.arange(batch) < batch_sizes.unsqueeze(1)
        return rows * mask[running.nonzero()[:, 1].to(rows.device)]

    def joined(self, layer: int, rows: Tensor, output: Tensor, dropout: float) -> Tensor:
        """A layer's input and its kernel's output as the input of what follows."""
        key = str(layer)
        if key in self.norms:
            output = self.norms[key](output)
        if dropout:
            output = drop(output, dropout, True)
        if self.shortcut == "none" or layer not in self.joined_layers:
            return output
        if self.shortcut == "residual":
            return rows + output
        return cast(Tensor, self.gates[key](rows, output))

    def extra_repr(self) -> str:
        return f"{self.shortcut}, dropout={self.dropout}, input_dropout={self.input_dropout}"
