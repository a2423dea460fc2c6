"""A plain RNN with a weighted residual per unit, leaks of one step up to the memory needed.

Kusupati et al. 2018, FastRNN (arXiv 1901.02358), equation 1.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from rnnguard.inspection.gates import GATES
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.residual_rnn import ResidualRNN, residual_parts
from rnnguard.records import Dose
from rnnguard.remedies.morph import morph_with
from rnnguard.remedies.remedy import Remedy, memory_of, number
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """Nothing where the memory is unknown, which is all that a residual is dosed by."""
    if site is None or site.cell not in GATES or GATES[site.cell].gated:
        return None
    dose: Dose = {**memory_of(wanted, site, least=2)}
    return dose or None


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    build = partial(residual_parts, memory=number(dose, "memory", 20.0))
    morph_with(edit, module, {nn.RNN: ResidualRNN}, build)


RESIDUAL_RNN = Remedy(
    name="residual_rnn",
    tier="structure",
    summary="A plain RNN's state carried on in part, per unit, over up to the memory needed.",
    apply=_apply,
    aim="health",
    prescription=_prescribe,
    adds="residual_l0",
    doses={
        "memory": "longest leak in steps, from 2 on",
    },
    refs=("Kusupati et al. 2018 (FastRNN, arXiv 1901.02358), eq. 1",),
)
