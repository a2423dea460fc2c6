"""Recurrent weights dropped in training, one mask for a whole forward.

Merity et al. 2018 (arXiv 1708.02182): half of them. A regulariser: a trial judges it.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.recurrent_weights import DropConnect
from rnnguard.records import Dose
from rnnguard.remedies.morph import surround_with
from rnnguard.remedies.remedy import Remedy, number
from rnnguard.rewrite.edit import Edit

_SHARE = 0.5


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or site.cell == "custom" or site.remade:
        return None
    return {"p": number(wanted, "p", _SHARE)}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    surround_with(edit, module, "recurrent", partial(DropConnect, p=number(dose, "p", _SHARE)))


WEIGHT_DROP = Remedy(
    name="weight_drop",
    tier="structure",
    summary="DropConnect on the recurrent weights in training, on torch's kernel.",
    apply=_apply,
    prescription=_prescribe,
    adds="recurrent",
    on_request=True,
    doses={
        "p": "share of the weights that is dropped, by default 0.5",
    },
    refs=("Merity et al. 2018 (arXiv 1708.02182)",),
)
