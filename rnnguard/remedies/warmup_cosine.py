"""Linear warm-up, then cosine when the number of steps is known; the rate at rest stays.

Only to a peak that a trial has found, or where a row fears for the first steps: from the user's
own rate a decay takes a third to a half of what short trainings learn (characters, GRU and two
LSTM layers: .72 -> .29 and .90 -> .51 of the way to the target in `benchmarks/outcomes`).

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
    """A warm-up to the trial's peak, or of the row's `at_least`; a cosine where steps are planned.

    Nothing without either: a decay from a rate that nobody has tried may end a training early.
    """
    # Beside a schedule of the user's only the warm-up acts: two decays or peaks would multiply.
    total = None if run.scheduled else run.total_steps
    peak = None if run.scheduled else _peak(wanted)
    least = int(wanted.get("at_least") or 0)
    if peak is not None:
        # It comes from a trial, in which a short warm-up has done.
        return {"warmup": max(least, _below(peak)), "total_steps": total, "peak": peak}
    if not least:
        return None
    known = run.total_steps or run.batches_per_epoch or 0
    return {"warmup": max(least, min(UNTUNED, known // 10)), "total_steps": total}


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
    summary="Linear warm-up inside the step, to a trial's peak; then cosine, given total_steps.",
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
