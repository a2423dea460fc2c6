"""Orthogonal recurrent blocks in a hand-written cell, where the state enters its weights.

Blocks of as many rows as the state has numbers are gates, whatever their order, so each of
them is made orthogonal by itself (Saxe et al. 2014). Other shapes stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy, seeded
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or not site.entries:
        return None
    return {**wanted, "entries": " ".join(site.entries), "seed": run.seed}


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    named, generator = dict(model.named_parameters()), seeded(dose)
    gain = float(dose.get("gain") or 1.0)
    for entry in str(dose["entries"]).split():
        name, axis, start, stop = entry.rsplit(":", 3)
        width = int(stop) - int(start)
        fresh = named[name].detach().double().clone()
        rows = fresh if axis == "1" else fresh.T
        if len(rows) % width:
            continue
        blocks = [_orthogonal(width, gain, generator) for _ in range(len(rows) // width)]
        rows[:, int(start) : int(stop)] = torch.cat(blocks)
        edit.write_(named[name], fresh)


def _orthogonal(width: int, gain: float, generator: torch.Generator) -> Tensor:
    fresh = torch.empty(width, width, dtype=torch.float64)
    nn.init.orthogonal_(fresh, gain, generator=generator)
    return fresh


WRITTEN_ORTHOGONAL = Remedy(
    name="written_orthogonal",
    tier="values",
    summary="Orthogonal recurrent blocks in a hand-written cell.",
    apply=_apply,
    aim="health",
    on_model=True,
    prescription=_prescribe,
    doses={
        "gain": "of each block, by default 1",
        "entries": "where the state enters the weights; as the graph shows it",
        "seed": "of the draw; the seed of the run",
    },
    refs=("Saxe et al. 2014 (arXiv 1312.6120)",),
)
