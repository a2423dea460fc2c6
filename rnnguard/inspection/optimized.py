"""Which parameters an optimizer lacks, which it holds that are not the model's, and its decay."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.inspection.sites import recurrent_modules


def missing_parameters(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of the trainable parameters that the optimizer does not hold."""
    held = {id(parameter) for parameter in _held(optimizer)}
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and id(p) not in held]


def foreign_parameters(
    model: nn.Module, optimizer: Optimizer, *others: nn.Module | None
) -> list[Tensor]:
    """What the optimizer holds beside the model's parameters and those of `others`.

    others: what else is trained along, such as a loss with weights of its own.
    """
    modules = (model, *(other for other in others if other is not None))
    known = {id(parameter) for module in modules for parameter in module.parameters()}
    return [parameter for parameter in _held(optimizer) if id(parameter) not in known]


def decay_on_biases(model: nn.Module, optimizer: Optimizer) -> float:
    """The largest weight decay that a bias of the model's recurrent modules has.

    Of all parameters, where there is no such bias.
    """
    modules = recurrent_modules(model).values()
    biases = {id(p) for module in modules for p in module.parameters() if p.dim() == 1}
    groups = [
        group
        for group in optimizer.param_groups
        if not biases or not biases.isdisjoint(map(id, group["params"]))
    ]
    return float(max((group.get("weight_decay") or 0 for group in groups), default=0))


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
