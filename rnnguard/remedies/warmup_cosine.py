"""Linear warm-up, then cosine when the number of steps is known; the rate at rest stays.

Ma and Yarats 2019 (arXiv 1910.04209): the untuned linear warm-up of Adam takes 2/(1 - beta2)
steps; at most a tenth of a short run.
"""

from __future__ import annotations

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.schedule import GuardSettings

UNTUNED = 2000  # 2 / (1 - 0.999)


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """A tenth of the planned steps; without a plan `at_least`, where the scenario asks for it."""
    asked = int(wanted.get("at_least") or 0)
    known = run.total_steps or run.batches_per_epoch
    if run.total_steps is None and not asked:
        return None
    warmup = asked if known is None else max(asked, min(UNTUNED, known // 10))
    # Two decays would multiply, so beside a schedule of the user's only the warm-up acts.
    total = None if run.scheduled else run.total_steps
    if warmup < 2 and total is None:
        return None
    return {"warmup": warmup, "total_steps": total}


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    total = dose.get("total_steps")
    steps = None if total is None else int(total)
    edit.hook_(GuardSettings(warmup=int(dose["warmup"] or 0), total_steps=steps))


WARMUP_COSINE = Remedy(
    name="warmup_cosine",
    tier="step",
    summary="Linear warm-up inside the step, cosine after it when total_steps is given.",
    apply=_apply,
    prescription=_prescribe,
    doses={
        "warmup": "steps of linear warm-up: a tenth of those planned, 2000 at most",
        "total_steps": "steps at whose end the cosine ends; those planned",
        "at_least": "the shortest warm-up, also where no steps are planned",
    },
    refs=("Ma and Yarats 2019 (arXiv 1910.04209)",),
)
