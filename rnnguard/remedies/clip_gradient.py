"""Clip by global norm inside the optimizer's step, at a threshold measured on real batches.

Pascanu et al. 2013, section 3.2: half to ten times the average norm.
"""

from __future__ import annotations

import math

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.schedule import GuardSettings


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """`factor` times the median norm, and never below `least`, which a healthy step may need."""
    least = float(wanted.get("least") or 1.0)
    threshold = float(wanted.get("factor") or 1.0) * run.grad_norm
    if run.nonfinite or not math.isfinite(threshold):
        threshold = least
    return {"max_norm": float(f"{max(least, threshold):.3g}")}


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    edit.hook_(GuardSettings(max_norm=float(dose["max_norm"] or 1.0)))


CLIP_GRADIENT = Remedy(
    name="clip_gradient",
    tier="step",
    summary="Global-norm clip in the optimizer's step, aware of GradScaler and closures.",
    apply=_apply,
    prescription=_prescribe,
)
