"""AMSGrad: Adam that remembers its largest second moment (Reddi et al. 2018)."""

from __future__ import annotations

from torch import nn

from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    edit.tune_("amsgrad", True)


AMSGRAD = Remedy(
    name="amsgrad",
    tier="step",
    summary="Adam's amsgrad option, switched on in place.",
    apply=_apply,
    refs=("Reddi et al. 2018 (arXiv 1904.09237)",),
)
