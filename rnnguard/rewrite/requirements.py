"""What must hold before a verb may act and when all have acted; nothing is changed here."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from rnnguard.errors import Refusal
from rnnguard.rewrite.schedule import GuardSettings


def check_shape(param: Tensor, value: Tensor) -> None:
    """Raises ValueError where the value would be broadcast."""
    if value.shape != param.shape:
        raise ValueError(f"a value of shape {tuple(value.shape)} for {tuple(param.shape)}")


def check_names(module: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError where a new child would take an attribute's place."""
    for name in names:
        if hasattr(module, name):
            raise ValueError(f"{type(module).__name__} has an attribute {name!r} already")


def group_of(optimizer: Optimizer | None, like: nn.Parameter) -> dict[str, Any] | None:
    """The parameter group that holds `like`, if one does."""
    groups = [] if optimizer is None else optimizer.param_groups
    return next((g for g in groups if any(p is like for p in g["params"])), None)


def adoption_refusals(optimizer: Optimizer) -> list[Refusal]:
    """Why the optimizer cannot take up parameters any more, nor lose them."""
    if not (isinstance(optimizer, LBFGS) and optimizer.state):
        return []
    fact = "LBFGS has taken a step and cannot take up parameters any more."
    return [Refusal("RG906", "", fact, "Stabilize before the first step.")]


def retyping_refusals(optimizer: Optimizer, cls: type[Optimizer]) -> list[Refusal]:
    """Why the optimizer cannot become a `cls`: schedulers bind the step function they find."""
    before = type(optimizer)
    if "step" not in vars(optimizer) or inspect.unwrap(cls.step) == inspect.unwrap(before.step):
        return []
    fact = f"a schedule has bound {before.__name__}.step to the optimizer."
    return [Refusal("RG906", "", fact, "Build the schedule after stabilizing.")]


def adoption_faults(
    optimizer: Optimizer, module: nn.Module, added: Collection[nn.Module]
) -> Iterator[Refusal]:
    """Parameters of the `added` children that the optimizer misses, or holds more than once.

    It must train them where it trains any of the module's others.
    """
    held = [id(param) for group in optimizer.param_groups for param in group["params"]]
    new = [p for child in added for p in child.parameters() if p.requires_grad]
    known = {id(p) for child in added for p in child.parameters()}
    siblings = [p for p in module.parameters() if id(p) not in known and p.requires_grad]
    wanted = 1 if any(id(p) in held for p in siblings) else 0
    for param in new:
        times = held.count(id(param))
        if times != wanted:
            fact = f"the optimizer holds a new parameter {times} times and not {wanted}."
            yield Refusal("RG916", "", fact, "The model and optimizer were restored.")
    for group in optimizer.param_groups:
        if "param_names" in group and len(group["param_names"]) != len(group["params"]):
            fact = "a parameter group has not one name for each parameter."
            yield Refusal("RG916", "", fact, "The model and optimizer were restored.")


def given_back(now: GuardSettings, asked: GuardSettings, earlier: GuardSettings) -> GuardSettings:
    """The settings with `earlier` wherever they still are as they were `asked` for."""
    names = [field.name for field in fields(now)]
    same = [name for name in names if getattr(now, name) == getattr(asked, name)]
    return replace(now, **{name: getattr(earlier, name) for name in same})


def lists_without(optimizer: Optimizer, gone: set[int]) -> list[tuple[list[Any], list[Any]]]:
    """The lists of each group, parameters and names, with what stays in them."""
    cut: list[tuple[list[Any], list[Any]]] = []
    for group in optimizer.param_groups:
        places = {i for i, param in enumerate(group["params"]) if id(param) in gone}
        for each in (group["params"], group.get("param_names", [])):
            cut.append((each, [item for i, item in enumerate(each) if i not in places]))
    return cut
