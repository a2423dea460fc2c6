"""Keep gates spread evenly between closed and open, for information on many lags at once.

Gu et al. 2020 (arXiv 1910.09890), uniform gate initialisation: u ~ U(1/H, 1 - 1/H),
b = logit u, the input gate tied; memory then falls off like 1/(k + 1).
"""

from __future__ import annotations

import torch
from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy, each_weights, seeded, stratified, write_keep_bias_
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    return {"seed": run.seed} if site is not None and site.bias else None


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    generator = seeded(dose)
    for weights in each_weights(module):
        edge = 1 / max(3, weights.hidden_size)
        spread = stratified(weights.hidden_size, generator)
        write_keep_bias_(edit, module, weights, torch.logit(edge + (1 - 2 * edge) * spread))


UNIFORM_GATE_BIAS = Remedy(
    name="uniform_gate_bias",
    tier="values",
    summary="Keep gates uniform between closed and open; an LSTM's input bias is tied.",
    apply=_apply,
    aim="health",
    prescription=_prescribe,
)
