"""A plain RNN given an update gate, which still returns what a plain RNN returns.

The minimal gated unit without its reset: Zhou et al. 2016 (arXiv 1603.09420), Ravanelli et al.
2018 (arXiv 1803.10225). The gate's bias starts at the dose of Tallec and Ollivier 2018.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from rnnguard.inspection.gates import GATES
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.gated_rnn import GatedRNN, gated_parts
from rnnguard.records import Dose
from rnnguard.remedies.morph import morph_with
from rnnguard.remedies.remedy import Remedy, drawn_by, memory_of, number, number_or_none
from rnnguard.rewrite.edit import Edit

_BIAS = -1.0


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or site.cell not in GATES or GATES[site.cell].gated:
        return None
    memory = memory_of(wanted, site, least=3)
    return {**(memory or {"bias": number(wanted, "bias", _BIAS)}), "seed": run.seed}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    memory, bias = number_or_none(dose, "memory"), number(dose, "bias", _BIAS)
    with drawn_by(dose):
        build = partial(gated_parts, memory=memory, bias=bias)
        morph_with(edit, module, {nn.RNN: GatedRNN}, build)


GATED_RNN = Remedy(
    name="gated_rnn",
    tier="structure",
    summary="An update gate for a plain RNN, which keeps its weights as the candidate's.",
    apply=_apply,
    aim="health",
    prescription=_prescribe,
    adds="gate_l0",
    doses={
        "memory": "longest time scale of the gate in steps",
        "bias": "of the gate where the memory is unknown, by default -1",
        "seed": "of the draw; the seed of the run",
    },
    refs=(
        "Zhou et al. 2016 (arXiv 1603.09420)",
        "Ravanelli et al. 2018 (arXiv 1803.10225)",
        "Tallec and Ollivier 2018, eq. 16 (arXiv 1804.11188)",
    ),
)
