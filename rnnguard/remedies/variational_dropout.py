"""Dropout between the layers with one mask for all steps of a sequence.

Gal and Ghahramani 2016 (arXiv 1512.05287); the share between the layers is that of Merity et
al. 2018 (arXiv 1708.02182) on Penn Treebank, rounded down. A regulariser: a trial judges it.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.between_layers import BetweenLayers
from rnnguard.records import Dose
from rnnguard.remedies.morph import surround_with
from rnnguard.remedies.remedy import Remedy, number
from rnnguard.rewrite.edit import Edit

_BETWEEN, _INPUT = 0.25, 0.0


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or site.cell == "custom":
        return None
    between = number(wanted, "dropout", _BETWEEN) if site.layers > 1 else 0.0
    on_input = number(wanted, "input_dropout", _INPUT)
    return {"dropout": between, "input_dropout": on_input} if between or on_input else None


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    between, on_input = number(dose, "dropout", _BETWEEN), number(dose, "input_dropout", _INPUT)
    build = partial(BetweenLayers, dropout=between, input_dropout=on_input)

    def acting(module: nn.RNNBase) -> nn.Module | None:
        return build(module) if on_input or (between and module.num_layers > 1) else None

    surround_with(edit, module, "between", acting)


VARIATIONAL_DROPOUT = Remedy(
    name="variational_dropout",
    tier="structure",
    summary="Dropout on the layers' inputs, one mask per sequence, on torch's kernel.",
    apply=_apply,
    prescription=_prescribe,
    adds="between",
    on_request=True,
    doses={
        "dropout": "share that is dropped between the layers, by default 0.25",
        "input_dropout": "share that is dropped of the input, by default 0",
    },
    refs=("Gal and Ghahramani 2016 (arXiv 1512.05287)", "Merity et al. 2018 (arXiv 1708.02182)"),
)
