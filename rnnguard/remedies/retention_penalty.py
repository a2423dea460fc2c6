"""Pascanu's penalty on what each step of a plain RNN keeps of the gradient, in its backward.

Pascanu, Mikolov and Bengio 2013 (arXiv 1211.5063), section 3.3, with the weight of their synthetic
tasks; it needs a clip beside it. A regulariser: a trial judges it. Nothing in fp16, where a
GradScaler would divide it by the scale of the loss.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.retention_penalty import WEIGHT, PenalizedRNN, RetentionPenalty
from rnnguard.records import Dose
from rnnguard.remedies.morph import Parts, morph_with
from rnnguard.remedies.remedy import Remedy, number
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """Nothing for stacked layers, whose inner gradients torch's kernel does not show."""
    if site is None or site.cell not in ("rnn_tanh", "rnn_relu") or site.layers > 1:
        return None
    if site.remade or run.precision == "fp16":
        return None
    return {"weight": number(wanted, "weight", WEIGHT)}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    weight = number(dose, "weight", WEIGHT)
    if getattr(module, "num_layers", 1) == 1:
        morph_with(edit, module, {nn.RNN: PenalizedRNN}, partial(_part, weight=weight))


def _part(module: nn.RNNBase, weight: float) -> Parts:
    return {"penalty": RetentionPenalty(weight)}


RETENTION_PENALTY = Remedy(
    name="retention_penalty",
    tier="structure",
    summary="A penalty in a plain RNN's backward on gradients that grow or fade per step.",
    apply=_apply,
    prescription=_prescribe,
    adds="penalty",
    doses={
        "weight": "of the penalty's gradient beside that of the loss, by default 2",
    },
    refs=("Pascanu et al. 2013, section 3.3 (arXiv 1211.5063)",),
)
