"""Orthogonal recurrent matrix, gate by gate; on the whole stack it would not be orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import GATES, Weights, cell_of
from rnnguard.nn.indrnn import IndRNN
from rnnguard.records import Dose
from rnnguard.remedies.remedy import (
    Remedy,
    each_weights,
    seeded,
    with_seed,
    write_recurrent_,
)
from rnnguard.rewrite.edit import Edit


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    cell = cell_of(module)
    assert cell is not None
    blocks = len(GATES[cell].blocks)
    generator = seeded(dose)
    gain = float(dose.get("gain") or 1.0)
    # Only the diagonal acts between independent units, and an orthogonal matrix's is small.
    if isinstance(module, IndRNN):
        return

    def fresh(weights: Weights) -> Tensor:
        parts = weights.hh.detach().chunk(blocks)
        return torch.cat([_orthogonal(part, gain, generator) for part in parts])

    write_recurrent_(edit, module, fresh)
    for weights in each_weights(module) if blocks == 1 else ():
        # A constant drive makes an orthogonal recurrence wander into saturation.
        for bias in (weights.bias_ih, weights.bias_hh):
            if bias is not None:
                edit.write_(bias, torch.zeros_like(bias))


def _orthogonal(block: Tensor, gain: float, generator: torch.Generator) -> Tensor:
    """Computed in float64 on the CPU: half precision has no QR, and seeds stay comparable."""
    fresh = torch.empty(block.shape, dtype=torch.float64)
    nn.init.orthogonal_(fresh, gain, generator=generator)
    return fresh


ORTHOGONAL = Remedy(
    name="orthogonal",
    tier="values",
    summary="Orthogonal recurrent matrix per gate, zero biases in a plain RNN.",
    apply=_apply,
    aim="health",
    prescription=with_seed,
    doses={
        "gain": "of each block, by default 1",
        "seed": "of the draw; the seed of the run",
    },
    refs=("Saxe et al. 2014 (arXiv 1312.6120)", "Kerg et al. 2019 (nnRNN)"),
)
