"""Spectral rescale of an expansive recurrence: W <- W * target / radius, per gate and layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import GATES, Weights, cell_of
from rnnguard.nn.indrnn import IndRNN
from rnnguard.probe.readings import spectral_radius
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy, scaled_units, write_recurrent_
from rnnguard.rewrite.edit import Edit


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    cell = cell_of(module)
    assert cell is not None
    target = float(dose.get("target") or 1.0)
    blocks = len(GATES[cell].blocks)

    def fresh(weights: Weights) -> Tensor:
        held = weights.hh.detach()
        if isinstance(module, IndRNN):
            part = module.recurrence
            largest = float(held.diagonal().abs().max().clamp(max=part.bound))
            share = _share(largest, target, held.dtype)
            return held if share is None else scaled_units(held, part, share)
        return torch.cat([_bounded(b, weights.hr, target) for b in held.chunk(blocks)])

    write_recurrent_(edit, module, fresh)


def _bounded(block: Tensor, projection: Tensor | None, target: float) -> Tensor:
    """The block scaled down to the target radius; one that is within it stays as it is."""
    square = block if projection is None else projection.detach() @ block
    share = _share(spectral_radius(square), target, block.dtype)
    return block if share is None else block * share


def _share(radius: float, target: float, dtype: torch.dtype) -> float | None:
    """What brings the radius down to the target; None where it is within it."""
    # What was scaled before comes out at the target only up to rounding, and is within it.
    within = target * (1 + max(1e-6, torch.finfo(dtype).eps))
    return target / radius if radius > within else None


RECURRENT_GAIN = Remedy(
    name="recurrent_gain",
    tier="values",
    summary="Recurrent matrix scaled down to a spectral radius, gate by gate.",
    apply=_apply,
    aim="growth",
    doses={
        "target": "the spectral radius to come down to, by default 1",
    },
    refs=("Pascanu et al. 2013, section 2.1",),
)
