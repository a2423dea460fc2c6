"""Where the state enters a hand-written cell's weights, scaled until its exponent comes to zero.

The counterpart of `critical_gain`: strong inputs saturate a cell, so that orthogonal blocks
alone still let the gradient fade (Chen, Pennington and Schoenholz 2018).
"""

from __future__ import annotations

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.critical_gain import CRITICAL_GAIN, gentler
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or not site.entries:
        return None
    dose = CRITICAL_GAIN.prescribe(wanted, site, run)
    return None if dose is None else {**dose, "entries": " ".join(site.entries)}


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    named = dict(model.named_parameters())
    for entry in str(dose["entries"]).split():
        name, axis, start, stop = entry.rsplit(":", 3)
        fresh = named[name].detach().clone()
        columns = fresh if axis == "1" else fresh.T
        columns[:, int(start) : int(stop)] *= float(dose["factor"] or 1.0)
        edit.write_(named[name], fresh)


WRITTEN_CRITICAL_GAIN = Remedy(
    name="written_critical_gain",
    tier="values",
    summary="Recurrent entries of a hand-written cell scaled until the exponent is about zero.",
    apply=_apply,
    aim="health",
    on_model=True,
    gentler=gentler,
    prescription=_prescribe,
    doses={
        "factor": "what the entries are multiplied by; from the measured decay",
        "entries": "where the state enters the weights; as the graph shows it",
    },
    refs=("Chen, Pennington and Schoenholz 2018 (arXiv 1806.05394)",),
)
