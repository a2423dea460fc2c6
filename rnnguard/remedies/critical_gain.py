"""Recurrent matrix scaled so that the measured leading exponent comes to zero.

The critical gain depends on the drive (mean-field theory of random networks: Chen,
Pennington and Schoenholz 2018), so it is read off the data-driven trajectory.
"""

from __future__ import annotations

from torch import Tensor, nn

from rnnguard.inspection.gates import Weights
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.indrnn import IndRNN
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy, scaled_units, write_recurrent_
from rnnguard.rewrite.edit import Edit

CAUTION = 0.7


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """Most of the way to one over the measured decay, since active units grow with the gain."""
    if site is None or not site.decay_per_step > 0:
        return None
    factor = min(2.0, max(0.5, site.decay_per_step**-CAUTION))
    return {"factor": float(f"{factor:.4g}")}


def gentler(dose: Dose) -> Dose:
    """Half of the way, in logarithms."""
    return {**dose, "factor": float(f"{float(dose['factor'] or 1.0) ** 0.5:.4g}")}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    factor = float(dose["factor"] or 1.0)

    def fresh(weights: Weights) -> Tensor:
        held = weights.hh.detach()
        if isinstance(module, IndRNN):
            return scaled_units(held, module.recurrence, factor)
        return held * factor

    write_recurrent_(edit, module, fresh)


CRITICAL_GAIN = Remedy(
    name="critical_gain",
    tier="values",
    summary="Recurrent matrix scaled until the measured leading exponent is about zero.",
    apply=_apply,
    aim="health",
    gentler=gentler,
    prescription=_prescribe,
    doses={
        "factor": "what the matrix is multiplied by; from the measured decay",
    },
    refs=("Chen, Pennington and Schoenholz 2018 (arXiv 1806.05394)",),
)
