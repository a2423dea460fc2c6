"""LayerNorm after the recurrence: the cheapest form, which keeps torch's fused kernel."""

from __future__ import annotations

from torch import nn

from rnnguard.inspection.gates import is_plain, is_single_step
from rnnguard.nn.output_norm import OUTPUT_NORMS, output_norm, output_width
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    if not is_plain(module) or is_single_step(module):
        return
    parameters = list(module.parameters())
    like = next((p for p in parameters if p.requires_grad), parameters[0])
    # A frozen recurrence stays frozen; a norm that no optimizer holds would never train.
    norm = output_norm(output_width(module)).requires_grad_(like.requires_grad)
    edit.morph_(module, OUTPUT_NORMS[type(module)], output_norm=norm)
    path = edit.path_of(module)
    prefix = f"{path}.output_norm" if path else "output_norm"
    edit.adopt_({f"{prefix}.{n}": p for n, p in norm.named_parameters()}, like=like)


LAYER_NORM = Remedy(
    name="layer_norm",
    tier="structure",
    summary="LayerNorm over each step's output, on torch's fused kernel; adds two parameters.",
    apply=_apply,
    aim="output",
    adds="output_norm",
)
