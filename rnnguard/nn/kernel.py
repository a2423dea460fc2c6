"""Torch's own kernels with given weights, over all layers of a module or over some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import carries_cell_state, cell_of


@dataclass(frozen=True)
class Kernel:
    """The kernel of a module; weights: of the whole module, in the order of its `_flat_weights`.

    batch_sizes: of packed rows.
    """

    module: nn.RNNBase
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None

    def __call__(
        self, rows: Tensor, states: tuple[Tensor, ...], layers: slice
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The last output and the last states of these layers; states: of the whole module."""
        module = self.module
        ways = 2 if module.bidirectional else 1
        count = layers.stop - layers.start
        per_layer = len(self.weights) // module.num_layers
        held = list(self.weights[layers.start * per_layer : layers.stop * per_layer])
        own = tuple(state[layers.start * ways : layers.stop * ways] for state in states)
        dropout = module.dropout if count > 1 else 0.0
        rest = (held, module.bias, count, dropout, module.training, module.bidirectional)
        hidden: Any = own if carries_cell_state(module) else own[0]
        kernel = getattr(torch._VF, str(cell_of(module)))
        if self.batch_sizes is None:
            output, *last = kernel(rows, hidden, *rest, False)
        else:
            output, *last = kernel(rows, self.batch_sizes, hidden, *rest)
        return output, tuple(last)
