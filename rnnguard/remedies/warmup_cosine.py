"""Linear warm-up, then cosine when the number of steps is known; the rate at rest stays.

Ma and Yarats 2019 (arXiv 1910.04209): the untuned linear warm-up of Adam takes 2/(1 - beta2)
steps; at most a tenth of a short run.
"""

from __future__ import annotations

import math

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy, number, number_or_none
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.schedule import GuardSettings

UNTUNED = 2000  # 2 / (1 - 0.999)
SHORTEST = 10
"""Steps of warm-up below a peak: by then Adam's first moment, of decay 0.9, is mostly formed."""


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """A tenth of the planned steps, or what a peak needs; without a plan the row's `at_least`."""
    # Beside a schedule of the user's only the warm-up acts: two decays or peaks would multiply.
    total = None if run.scheduled else run.total_steps
    peak = None if run.scheduled else _peak(wanted)
    asked = max(int(wanted.get("at_least") or 0), 0 if peak is None else _below(peak))
    known = run.total_steps or run.batches_per_epoch
    if run.total_steps is None and not asked and peak is None:
        return None
    # A peak comes from a trial, in which a short warm-up has done.
    tenth = 0 if known is None or peak is not None else min(UNTUNED, known // 10)
    warmup = max(asked, tenth)
    if warmup < 2 and total is None and peak is None:
        return None
    dose: Dose = {"warmup": warmup, "total_steps": total}
    return dose if peak is None else {**dose, "peak": peak}


def _peak(wanted: Dose) -> float | None:
    """The peak where it differs from the user's own rate."""
    peak = number_or_none(wanted, "peak")
    return None if peak == 1.0 else peak


def _below(peak: float) -> int:
    """The shortest warm-up to a peak: its first step is no longer than one at the user's rate."""
    return max(SHORTEST, math.ceil(peak)) if peak > 1 else 0


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    total = dose.get("total_steps")
    steps, peak = None if total is None else int(total), number(dose, "peak", 1.0)
    edit.hook_(GuardSettings(warmup=int(dose["warmup"] or 0), total_steps=steps, peak=peak))


WARMUP_COSINE = Remedy(
    name="warmup_cosine",
    tier="step",
    summary="Linear warm-up inside the step, cosine after it when total_steps is given.",
    apply=_apply,
    prescription=_prescribe,
    doses={
        "warmup": "steps of linear warm-up: a tenth of those planned, 2000 at most; 10 to a peak",
        "total_steps": "steps at whose end the cosine ends; those planned",
        "at_least": "the shortest warm-up, also where no steps are planned",
        "peak": "factor on the learning rate at the top, from a range test; 1 without one",
    },
    refs=("Ma and Yarats 2019 (arXiv 1910.04209)",),
)
