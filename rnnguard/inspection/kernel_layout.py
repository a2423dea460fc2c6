"""Whether a recurrence's weights and mode are as torch's kernels want them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rnnguard.inspection.gates import is_single_step, recurrences, weights_of


def is_contiguous(module: nn.Module, used: Sequence[Tensor] = ()) -> bool:
    """Whether the weights of torch's module or cell lie in memory as its kernel wants them.

    `used` are the weights that its call was given; where there are none, or more than torch's own
    module has, those of the module count. Each must be contiguous. Those of a fused module must be
    its own parameters and, on CUDA, where cuDNN else copies them at every call, all in one chunk,
    as `flatten_parameters` makes them.
    """
    weights = [
        tensor
        for layer, way in recurrences(module)
        for tensor in weights_of(module, layer, way).tensors().values()
    ]
    weights = list(used) if len(used) == len(weights) else weights
    if not all(weight.is_contiguous() for weight in weights):
        return False
    if is_single_step(module):
        return True
    on_cuda = any(weight.is_cuda for weight in weights)
    return _are_own(module) and (not on_cuda or is_one_chunk(weights))


def is_one_chunk(weights: Sequence[Tensor]) -> bool:
    """Whether the weights lie side by side in one piece of memory."""
    return len({weight.untyped_storage().data_ptr() for weight in weights}) <= 1


def _are_own(module: nn.Module) -> bool:
    """Whether the list that goes to the kernel holds the module's parameters themselves.

    What is made anew in each forward, as by a parametrization, is no parameter of that name.
    """
    flat: Sequence[Tensor | None] = getattr(module, "_flat_weights", ())
    names: Sequence[str] = getattr(module, "_flat_weights_names", ())
    own = dict(module.named_parameters(recurse=False))
    pairs = zip(names, flat, strict=False)
    return all(weight is own[name] for name, weight in pairs if name in own)


def refuses_backward(module: nn.Module, device: str) -> bool:
    """Whether a fused recurrence is in eval mode on CUDA with weights that are to be trained.

    `device` is the type of the device that the model runs on. cuDNN alone refuses the backward
    pass then (pytorch #5878).
    """
    if device != "cuda" or is_single_step(module) or module.training:
        return False
    return any(parameter.requires_grad for parameter in module.parameters())
