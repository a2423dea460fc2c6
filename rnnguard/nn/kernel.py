"""Torch's own kernels with given weights, over all layers of a module or over some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import carries_cell_state, cell_of


def run_layers(
    module: nn.RNNBase,
    weights: Sequence[Tensor],
    layers: slice,
    batch_sizes: Tensor | None,
    rows: Tensor,
    states: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The last output and the last states of the kernel over these layers.

    weights: those of the whole module, in the order of its `_flat_weights`; states: likewise of
    the whole module. batch_sizes: of packed rows.
    """
    ways = 2 if module.bidirectional else 1
    count = layers.stop - layers.start
    per_layer = len(weights) // module.num_layers
    held = list(weights[layers.start * per_layer : layers.stop * per_layer])
    own = tuple(state[layers.start * ways : layers.stop * ways] for state in states)
    dropout = module.dropout if count > 1 else 0.0
    rest = (held, module.bias, count, dropout, module.training, module.bidirectional)
    hidden: Any = own if carries_cell_state(module) else own[0]
    kernel = getattr(torch._VF, str(cell_of(module)))
    if batch_sizes is None:
        output, *last = kernel(rows, hidden, *rest, False)
    else:
        output, *last = kernel(rows, batch_sizes, hidden, *rest)
    return output, tuple(last)
