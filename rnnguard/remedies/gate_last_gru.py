"""A GRU whose reset gate acts on the output, so that its state runs past no matrix."""

from __future__ import annotations

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.gate_last_gru import GateLastGRU
from rnnguard.records import Dose
from rnnguard.remedies.morph import Parts, morph_with
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    return wanted if site is not None and site.cell == "gru" else None


def _nothing(module: nn.RNNBase) -> Parts:
    return {}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    morph_with(edit, module, {nn.GRU: GateLastGRU}, _nothing)


GATE_LAST_GRU = Remedy(
    name="gate_last_gru",
    tier="structure",
    summary="A GRU's reset gate moved to its output; no parameter is added.",
    apply=_apply,
    aim="health",
    prescription=_prescribe,
    on_request=True,
    refs=(
        "Cho et al. 2014 (the GRU, arXiv 1406.1078)",
        "rnnguard.nn.GateLastGRU: the state runs past no matrix",
    ),
)
