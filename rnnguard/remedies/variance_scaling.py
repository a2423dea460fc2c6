"""Input weights whose scale fits the activation: Xavier for tanh and gates, He for ReLU.

Glorot and Bengio 2010, eq. 16; He et al. 2015, eq. 14; per gate, and divided by the rms of
the inputs where these are not standardised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import GATES, cell_of
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Cell, Dose
from rnnguard.remedies.remedy import Remedy, each_weights, seeded
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None:
        return None
    return {"input_rms": max(1.0, site.input_rms or 0.0), "seed": run.seed}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    cell = cell_of(module)
    assert cell is not None
    generator = seeded(dose)
    for index, weights in enumerate(each_weights(module)):
        first = index < (2 if getattr(module, "bidirectional", False) else 1)
        scale = float(dose.get("input_rms") or 1.0) if first else 1.0
        blocks = weights.ih.detach().chunk(len(GATES[cell].blocks))
        edit.write_(weights.ih, torch.cat([_scaled(b, cell, generator) for b in blocks]) / scale)


def _scaled(block: Tensor, cell: Cell, generator: torch.Generator) -> Tensor:
    fan_out, fan_in = block.shape
    fan = fan_in / 2 if cell == "rnn_relu" else (fan_in + fan_out) / 2
    bound = math.sqrt(3 / fan)
    uniform = torch.rand(block.shape, generator=generator, dtype=torch.float64)
    return (2 * uniform - 1) * bound


VARIANCE_SCALING = Remedy(
    name="variance_scaling",
    tier="values",
    summary="Input weights by Xavier (tanh, gates) or He (ReLU), per gate, for the inputs' rms.",
    apply=_apply,
    aim="input",
    prescription=_prescribe,
    doses={
        "input_rms": "what the weights are divided by; the measured rms of the inputs, at least 1",
        "seed": "of the draw; the seed of the run",
    },
    refs=("Glorot and Bengio 2010, eq. 16", "He et al. 2015, eq. 14 (arXiv 1502.01852)"),
)
