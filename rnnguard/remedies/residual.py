"""A shortcut round each layer of a stack: its input added to its output, or blended by a gate.

Residual: He et al. 2016 (arXiv 1512.03385). Highway: Srivastava et al. 2015 (arXiv 1505.00387),
between recurrent layers Zhang et al. 2016 (arXiv 1510.08983); its gate starts low.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.between_layers import BetweenLayers
from rnnguard.records import Dose
from rnnguard.remedies.morph import surround_with
from rnnguard.remedies.remedy import Remedy, form_of, number
from rnnguard.rewrite.edit import Edit

_GATE_BIAS = -2.0


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """ "residual", or what the row's `by` names; nothing where the user's code has one already.

    Raises RulesError (RG914) for a form that does not exist.
    """
    form = form_of("residual", wanted, "shortcut", ("residual", "highway"))
    if site is None or site.cell == "custom" or site.layers < 2 or site.residual:
        return None
    if form.get("shortcut") != "highway":
        return {"shortcut": "residual"}
    return {**form, "gate_bias": number(wanted, "gate_bias", _GATE_BIAS)}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    shortcut: Any = dose.get("shortcut") or "residual"
    gate_bias = number(dose, "gate_bias", _GATE_BIAS)

    def build(module: nn.RNNBase) -> nn.Module | None:
        between = BetweenLayers(module, shortcut=shortcut, gate_bias=gate_bias)
        return between if between.joined_layers else None

    surround_with(edit, module, "between", build)


RESIDUAL = Remedy(
    name="residual",
    tier="structure",
    summary="A residual or highway round each layer as wide as its input, on torch's kernel.",
    apply=_apply,
    aim="depth",
    prescription=_prescribe,
    adds="between",
    doses={
        "by": "residual or highway",
        "shortcut": "the form that `by` chose",
        "gate_bias": "of a highway's gate, by default -2",
    },
    refs=(
        "He et al. 2016 (arXiv 1512.03385)",
        "Srivastava et al. 2015 (arXiv 1505.00387)",
        "Zhang et al. 2016 (arXiv 1510.08983)",
    ),
)
