"""LayerNorm after the recurrence: the cheapest form, which keeps torch's fused kernel."""

from __future__ import annotations

from torch import nn

from rnnguard.nn.output_norm import OUTPUT_NORMS, output_norm, output_width
from rnnguard.records import Dose
from rnnguard.remedies.morph import Parts, morph_with
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit


def _parts(module: nn.RNNBase) -> Parts:
    return {"output_norm": output_norm(output_width(module))}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    morph_with(edit, module, OUTPUT_NORMS, _parts)


LAYER_NORM = Remedy(
    name="layer_norm",
    tier="structure",
    summary="LayerNorm over each step's output, on torch's fused kernel; adds two parameters.",
    apply=_apply,
    aim="output",
    adds="output_norm",
    refs=("Ba et al. 2016 (arXiv 1607.06450)",),
)
