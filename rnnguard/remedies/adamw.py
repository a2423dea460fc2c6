"""Adam's weight decay taken out of the gradient, in place (Loshchilov and Hutter 2019)."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    edit.retype_(AdamW)


ADAMW = Remedy(
    name="adamw",
    tier="step",
    summary="Adam becomes AdamW on the same object; options and moments stay.",
    apply=_apply,
    refs=("Loshchilov and Hutter 2019 (arXiv 1711.05101)",),
)
