"""Recurrent weights as a gain times a direction, row by row; the function stays what it is.

Salimans and Kingma 2016 (arXiv 1602.07868). It holds the norms of rows, not the spectral norm.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.recurrent_weights import WeightNorm
from rnnguard.records import Dose
from rnnguard.remedies.morph import surround_with
from rnnguard.remedies.remedy import Remedy, form_of
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """One norm for each row, or for each gate where the row's `by` says so.

    Raises RulesError (RG914) for a form that does not exist.
    """
    form = form_of("weight_norm", wanted, "over", ("row", "gate"))
    if site is None or site.cell == "custom" or site.remade:
        return None
    return {"over": "row", **form}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    over: Any = dose.get("over") or "row"
    surround_with(edit, module, "recurrent", partial(WeightNorm, over=over))


WEIGHT_NORM = Remedy(
    name="weight_norm",
    tier="structure",
    summary="Recurrent weights by gain and direction, on torch's kernel; adds the gains.",
    apply=_apply,
    aim="growth",
    prescription=_prescribe,
    adds="recurrent",
    on_request=True,
    doses={
        "by": "row or gate: what has a norm of its own",
        "over": "the form that `by` chose",
    },
    refs=("Salimans and Kingma 2016 (arXiv 1602.07868)",),
)
