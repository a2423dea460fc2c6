"""Clip inside the optimizer's step, at a threshold from real batches or from training's own norms.

By norm: Pascanu et al. 2013, section 3.2: half to ten times the average norm. By percentile:
Seetharaman et al. 2020 (AutoClip). By z-score: Kumar et al. 2025 (ZClip).
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rnnguard.errors import RulesError
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose, near_miss
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.schedule import CLIPS, GuardSettings

# The numbers of each form; all but max_norm come from the scenario row as they stand.
_NUMBERS: dict[str, tuple[str, ...]] = {
    "norm": ("max_norm",),
    "group": ("max_norm",),
    "value": ("max_value",),
    "percentile": ("percentile", "window", "max_norm"),
    "z_score": ("z_score", "window", "max_norm"),
}


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """The dose of the form that the row's `by` names, by default "norm".

    `max_norm` is `factor` times the median norm, and never below `least`, which a healthy step
    may need; the adaptive forms get it, until they know training's own norms, where the row
    asks for a `factor` and a norm was measured. "value" needs the row's `max_value`.
    Raises RulesError (RG914) for a form that does not exist or lacks its number.
    """
    by = str(wanted.get("by") or "norm")
    if by not in CLIPS:
        fact = f"the dose of clip_gradient asks for the form {by!r};"
        raise RulesError.of("RG914", "", fact, near_miss(by, list(CLIPS)))
    if by == "value" and not wanted.get("max_value"):
        fact = "the dose of clip_gradient by value names no `max_value`."
        raise RulesError.of("RG914", "", fact, "Give the largest entry of a gradient.")
    dose: Dose = {} if by == "norm" else {"by": by}
    dose |= {key: wanted[key] for key in _NUMBERS[by] if key in wanted}
    measured = math.isfinite(run.grad_norm) and run.grad_norm > 0
    if by in ("norm", "group") or (by != "value" and "factor" in wanted and measured):
        dose["max_norm"] = _max_norm(wanted, run)
    return dose


def _max_norm(wanted: Dose, run: RunReadings) -> float:
    least = float(wanted.get("least") or 1.0)
    threshold = float(wanted.get("factor") or 1.0) * run.grad_norm
    if run.nonfinite or not math.isfinite(threshold):
        threshold = least
    return float(f"{max(least, threshold):.3g}")


def clip_settings(dose: Dose) -> GuardSettings:
    """What a dose asks of the guard; RefusedError (RG914) when it cannot be meant."""
    by: Any = dose.get("by") or "norm"
    asked = {key: dose.get(key) for key in _NUMBERS.get(by, ())}
    numbers: dict[str, Any] = {
        key: int(value) if key == "window" else float(value)
        for key, value in asked.items()
        if value is not None
    }
    return GuardSettings(clip=by, **numbers)


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    edit.hook_(clip_settings(dose))


CLIP_GRADIENT = Remedy(
    name="clip_gradient",
    tier="step",
    summary="Clip in the optimizer's step, by norm, value or past norms; aware of GradScaler.",
    apply=_apply,
    prescription=_prescribe,
    doses={
        "by": "norm, group, value, percentile or z_score",
        "factor": "threshold in median norms of the batches",
        "least": "the lowest threshold, by default 1",
        "max_norm": "the threshold; from `factor` and `least`",
        "max_value": "largest entry, for the clip by value",
        "percentile": "of the last norms, for the clip by percentile",
        "z_score": "deviations above the mean norm, for the clip by z_score",
        "window": "norms that the last two forms remember",
    },
    refs=(
        "Pascanu et al. 2013, section 3.2",
        "Seetharaman et al. 2020 (AutoClip, arXiv 2007.14469)",
        "Kumar et al. 2025 (ZClip)",
    ),
)
