"""Recurrent weights scaled down at each forward where a gate's spectral norm passes a bound.

Miyato et al. 2018 (arXiv 1802.05957), as a bound and no normalisation: what is within it stays.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.recurrent_weights import SpectralBound
from rnnguard.records import Dose
from rnnguard.remedies.morph import surround_with
from rnnguard.remedies.remedy import Remedy, number
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or site.cell == "custom" or site.remade:
        return None
    return {"bound": number(wanted, "bound", 1.0)}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    bound = number(dose, "bound", 1.0)
    surround_with(edit, module, "recurrent", partial(SpectralBound, bound=bound))


SPECTRAL_BOUND = Remedy(
    name="spectral_bound",
    tier="structure",
    summary="A bound on the spectral norm of each gate's recurrent weights, on torch's kernel.",
    apply=_apply,
    aim="growth",
    prescription=_prescribe,
    adds="recurrent",
    doses={
        "bound": "the largest spectral norm of a gate's weights, by default 1",
    },
    refs=("Miyato et al. 2018 (arXiv 1802.05957)",),
)
