"""LayerNorm between the layers of a stack, each of which keeps torch's fused kernel.

Ba et al. 2016 (arXiv 1607.06450), on the layers' outputs; the last layer's stays as it is.
"""

from __future__ import annotations

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.between_layers import BetweenLayers
from rnnguard.records import Dose
from rnnguard.remedies.morph import surround_with
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or site.cell == "custom" or site.layers < 2:
        return None
    return wanted


def _between(module: nn.RNNBase) -> nn.Module | None:
    return BetweenLayers(module, norm=True) if module.num_layers > 1 else None


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    surround_with(edit, module, "between", _between)


LAYER_NORM_BETWEEN = Remedy(
    name="layer_norm_between",
    tier="structure",
    summary="LayerNorm over each layer's output but the last; torch's kernel runs layer by layer.",
    apply=_apply,
    aim="depth",
    prescription=_prescribe,
    adds="between",
    refs=("Ba et al. 2016 (arXiv 1607.06450)",),
)
