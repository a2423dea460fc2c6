"""Keep gates spread evenly between closed and open, for information on many lags at once.

Gu et al. 2020 (arXiv 1910.09890), uniform gate initialisation: u ~ U(1/H, 1 - 1/H),
b = logit u, the input gate tied; memory then falls off like 1/(k + 1).
"""

from __future__ import annotations

import torch
from torch import nn

from rnnguard.inspection.gates import recurrences, weights_of
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy, seeded, stratified, write_keep_bias_
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    return {"seed": run.seed} if site is not None and site.bias else None


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    generator = seeded(dose)
    for layer, direction in recurrences(module):
        hidden = weights_of(module, layer, direction).hidden_size
        edge = 1 / max(3, hidden)
        keep = torch.logit(edge + (1 - 2 * edge) * stratified(hidden, generator))
        write_keep_bias_(edit, module, layer, direction, keep)


UNIFORM_GATE_BIAS = Remedy(
    name="uniform_gate_bias",
    tier="values",
    summary="Keep gates uniform between closed and open; an LSTM's input bias is tied.",
    apply=_apply,
    aim="health",
    prescription=_prescribe,
    doses={
        "seed": "of the draw; the seed of the run",
    },
    refs=("Gu et al. 2020 (arXiv 1910.09890)",),
)
