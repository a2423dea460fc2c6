"""An edit that changes nothing: it tells beforehand whether a replay would go through."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.errors import refuse
from rnnguard.probe.snapshot import same_bits
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.requirements import (
    adoption_refusals,
    check_names,
    check_shape,
    group_of,
    retyping_refusals,
)
from rnnguard.rewrite.schedule import GuardSettings
from rnnguard.rewrite.stepguard import StepGuard, guard_of


class Rehearsal(Edit):
    """Takes the verbs of one change, checks what each asks for, and counts.

    Each change is rehearsed on what is there now, not on what the changes before it will leave.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        super().__init__(model, optimizer)
        self.verbs = 0
        """Verbs that found something to act on."""
        self.changes = 0
        """Verbs that would change it."""

    def write_(self, param: Tensor, value: Tensor) -> None:
        check_shape(param, value)
        fresh = value.to(param)
        if not bool(torch.isfinite(fresh).all()):
            raise ValueError("it gives values that are not finite")
        self._count(not same_bits(param, fresh))

    def morph_(self, module: nn.Module, cls: type[nn.Module], **children: nn.Module) -> None:
        check_names(module, children)
        self._count(True)

    def adopt_(self, params: Mapping[str, nn.Parameter], like: nn.Parameter) -> None:
        if self._optimizer is not None and group_of(self._optimizer, like) is not None:
            refuse(adoption_refusals(self._optimizer))

    def hook_(self, settings: GuardSettings) -> StepGuard:
        for name, value in vars(settings).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} cannot be {value}")
        present = guard_of(self._present_optimizer())
        guard = StepGuard(settings) if present is None else present
        self._count(present is None or present.settings.merged(settings) != present.settings)
        return guard

    def tune_(self, key: str, value: object) -> None:
        groups = [g for g in self._present_optimizer().param_groups if key in g]
        if groups:
            self._count(any(group[key] != value for group in groups))

    def retype_(self, cls: type[Optimizer]) -> None:
        optimizer = self._present_optimizer()
        refuse(retyping_refusals(optimizer, cls))
        self._count(type(optimizer) is not cls)

    def _count(self, changes: bool) -> None:
        self.verbs += 1
        self.changes += changes
