"""What a step does with a gradient that is not finite: skip it, or pass it on and count.

Either way `budget` such steps in a row, by default 10, end in a warning (RG413).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.schedule import GuardSettings


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """Skipping needs the norm on the host, which on a GPU would make every step wait."""
    budget: Dose = {"budget": wanted["budget"]} if "budget" in wanted else {}
    return {"on_nonfinite": "skip" if run.device == "cpu" else "propagate"} | budget


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    policy: Any = dose["on_nonfinite"]
    budget = int(dose.get("budget") or GuardSettings.budget)
    edit.hook_(GuardSettings(on_nonfinite=policy, budget=budget))


NONFINITE_GUARD = Remedy(
    name="nonfinite_guard",
    tier="step",
    summary="Steps with a non-finite gradient are skipped on the CPU, counted on a GPU.",
    apply=_apply,
    prescription=_prescribe,
    doses={
        "on_nonfinite": "skip or propagate; by the device",
        "budget": "such steps in a row before a warning, by default 10",
    },
    refs=("Pascanu et al. 2013, section 3.2", "pytorch #46849"),
)
