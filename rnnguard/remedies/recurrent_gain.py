"""Spectral rescale of an expansive recurrence: W <- W * target / radius, per gate and layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import GATES, cell_of
from rnnguard.probe.readings import spectral_radius
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy, each_weights
from rnnguard.rewrite.edit import Edit


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    cell = cell_of(module)
    assert cell is not None
    target = float(dose.get("target") or 1.0)
    for weights in each_weights(module):
        blocks = weights.hh.detach().chunk(len(GATES[cell].blocks))
        edit.write_(weights.hh, torch.cat([_bounded(b, weights.hr, target) for b in blocks]))


def _bounded(block: Tensor, projection: Tensor | None, target: float) -> Tensor:
    """The block scaled down to the target radius; one that is within it stays as it is."""
    square = block if projection is None else projection.detach() @ block
    radius = spectral_radius(square)
    # What was scaled before comes out at the target only up to rounding, and is within it.
    within = target * (1 + max(1e-6, torch.finfo(block.dtype).eps))
    return block * (target / radius) if radius > within else block


RECURRENT_GAIN = Remedy(
    name="recurrent_gain",
    tier="values",
    summary="Recurrent matrix scaled down to a spectral radius, gate by gate.",
    apply=_apply,
    aim="growth",
)
