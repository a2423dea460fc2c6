"""Recurrent weights that stay orthogonal, gate by gate, through all of training.

Lezcano-Casado and Martinez-Rubio 2019 (arXiv 1901.08428) with another map: by QR, which leaves
a block that is orthogonal already as it is.
"""

from __future__ import annotations

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.recurrent_weights import Orthogonal
from rnnguard.records import Dose
from rnnguard.remedies.morph import surround_with
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or site.cell == "custom" or site.remade:
        return None
    return wanted


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    surround_with(edit, module, "recurrent", Orthogonal)


ORTHOGONAL_PARAMETRIZATION = Remedy(
    name="orthogonal_parametrization",
    tier="structure",
    summary="Recurrent weights by their orthogonal factor at each forward, on torch's kernel.",
    apply=_apply,
    aim="health",
    prescription=_prescribe,
    adds="recurrent",
    on_request=True,
    refs=("Lezcano-Casado and Martinez-Rubio 2019 (arXiv 1901.08428)",),
)
