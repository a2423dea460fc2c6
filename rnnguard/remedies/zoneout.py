"""Zoneout: in training some units keep their old state at a step.

Krueger et al. 2017 (arXiv 1606.01305), with their probabilities on characters. A regulariser: a
trial judges it.
"""

from __future__ import annotations

from torch import nn

from rnnguard.inspection.gates import GATES, cell_of
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.zoneout import ZONEOUT_CELLS, Zoneout
from rnnguard.records import Dose
from rnnguard.remedies.morph import Parts, morph_with
from rnnguard.remedies.remedy import Remedy, number
from rnnguard.rewrite.edit import Edit

_HIDDEN, _CELL = 0.05, 0.5


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or site.cell not in GATES or not GATES[site.cell].gated:
        return None
    hidden: Dose = {"hidden": number(wanted, "hidden", _HIDDEN)}
    if not GATES[site.cell].carries_cell_state:
        return hidden
    return {**hidden, "cell": number(wanted, "cell", _CELL)}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    hidden, cell = number(dose, "hidden", _HIDDEN), number(dose, "cell", _CELL)

    def build(module: nn.RNNBase) -> Parts:
        kind = cell_of(module)
        carries = kind is not None and GATES[kind].carries_cell_state
        return {"zoneout": Zoneout(hidden, cell if carries else 0.0)}

    morph_with(edit, module, ZONEOUT_CELLS, build)


ZONEOUT = Remedy(
    name="zoneout",
    tier="structure",
    summary="Units of an LSTM or GRU keep their old state at random steps of training.",
    apply=_apply,
    prescription=_prescribe,
    adds="zoneout",
    on_request=True,
    doses={
        "hidden": "share of units whose output stays, by default 0.05",
        "cell": "share whose cell state stays, in an LSTM, by default 0.5",
    },
    refs=("Krueger et al. 2017 (arXiv 1606.01305)",),
)
