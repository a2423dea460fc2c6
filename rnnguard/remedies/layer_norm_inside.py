"""LayerNorm inside the recurrence, in the form of Ba et al. 2016 (arXiv 1607.06450).

The last resort among the norms, since torch's kernel goes. The keep gate's offset lies in the
norms' shift: spread by Tallec and Ollivier's dose where the memory needed is known.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from rnnguard.inspection.gates import GATES, cell_of
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.layer_norm_cells import LAYER_NORM_CELLS, layer_norm_parts
from rnnguard.records import Dose
from rnnguard.remedies.morph import morph_with
from rnnguard.remedies.remedy import (
    Remedy,
    each_weights,
    memory_of,
    number,
    number_or_none,
    with_keep,
)
from rnnguard.rewrite.edit import Edit

_FORGET, _GAIN = 1.0, 1.0


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or site.cell not in GATES:
        return None
    gain: Dose = {"gain": wanted["gain"]} if "gain" in wanted else {}
    if not GATES[site.cell].gated:
        return gain
    memory = memory_of(wanted, site, least=3)
    return {**gain, **(memory or {"forget": number(wanted, "forget", _FORGET)})}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    memory, forget = number_or_none(dose, "memory"), number(dose, "forget", _FORGET)
    gain = number(dose, "gain", _GAIN)
    build = partial(layer_norm_parts, memory=memory, forget=forget, gain=gain)
    if morph_with(edit, module, LAYER_NORM_CELLS, build) is not None:
        _free_sums_(edit, module)


def _free_sums_(edit: Edit, module: nn.Module) -> None:
    """Takes the keep gate's offset out of the biases, since the shift has it now.

    A dose for 100 steps in a normalised sum left a GRU a sixteenth of its answer to the input.
    """
    cell = cell_of(module)
    assert cell is not None
    for weights in each_weights(module):
        none = torch.zeros(weights.hidden_size)
        for bias in (weights.bias_ih, weights.bias_hh):
            if bias is not None:
                edit.write_(bias, with_keep(bias.detach(), GATES[cell], none))


LAYER_NORM_INSIDE = Remedy(
    name="layer_norm_inside",
    tier="structure",
    summary="LayerNorm over the gates of each step, the keep gate's offset in its shift.",
    apply=_apply,
    aim="health",
    prescription=_prescribe,
    adds="norm_l0",
    doses={
        "gain": "the norms' gain at the start, by default 1",
        "memory": "longest time scale of the keep gate in steps",
        "forget": "the keep gate's offset where the memory is unknown, by default 1",
    },
    refs=(
        "Ba et al. 2016 (arXiv 1607.06450)",
        "Tallec and Ollivier 2018, eq. 16 (arXiv 1804.11188)",
    ),
)
