"""Attention over the recurrence's own past added to its output; nothing is added at the start.

Vaswani et al. 2017 (arXiv 1706.03762), causal. Every past step is then one hop away.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.attention_readout import AttentionReadout
from rnnguard.records import Dose
from rnnguard.remedies.morph import surround_with
from rnnguard.remedies.remedy import Remedy, drawn_by, number
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """Nothing where only the last state is read, or the past is seen already."""
    if site is None or site.cell == "custom" or site.readout == "final_state" or site.bypass:
        return None
    return {**wanted, "seed": run.seed}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    width, heads = dose.get("width"), int(number(dose, "heads", 1))
    build = partial(AttentionReadout, width=None if width is None else int(width), heads=heads)
    with drawn_by(dose):
        surround_with(edit, module, "attention", build)


ATTENTION_READOUT = Remedy(
    name="attention_readout",
    tier="structure",
    summary="Causal attention over the recurrence's own outputs, added to them.",
    apply=_apply,
    prescription=_prescribe,
    adds="attention",
    on_request=True,
    doses={
        "width": "features of queries, keys and values; by the output's size",
        "heads": "how many they are split into, by default 1",
        "seed": "of the draw; the seed of the run",
    },
    refs=("Vaswani et al. 2017 (arXiv 1706.03762)",),
)
