"""Keep bias spread over the time scales that the task needs.

Tallec and Ollivier, ICLR 2018, eq. 16: b_f ~ log U(1, T_max - 1), b_i = -b_f. PyTorch's
GRU keeps with z, so there b_z = +log U(1, T_max - 1).
"""

from __future__ import annotations

from torch import nn

from rnnguard.inspection.gates import recurrences, weights_of
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy, seeded, stratified, write_keep_bias_
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    t_max = wanted.get("t_max")
    if site is None or not site.bias or t_max is None or float(t_max) < 3:
        return None
    return {"t_max": int(t_max), "seed": run.seed}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    generator = seeded(dose)
    t_max = float(dose["t_max"] or 0)
    for layer, direction in recurrences(module):
        spread = stratified(weights_of(module, layer, direction).hidden_size, generator)
        write_keep_bias_(edit, module, layer, direction, (1 + (t_max - 2) * spread).log())


CHRONO_BIAS = Remedy(
    name="chrono_bias",
    tier="values",
    summary="Keep bias ~ log U(1, T - 1) for the memory needed T; an LSTM's input bias is tied.",
    apply=_apply,
    aim="health",
    prescription=_prescribe,
    doses={
        "t_max": "longest time scale in steps, from 3 on",
        "seed": "of the draw; the seed of the run",
    },
    refs=("Tallec and Ollivier 2018, eq. 16 (arXiv 1804.11188)",),
)
