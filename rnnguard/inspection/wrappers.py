"""What stands around a model or an optimizer: looked through, left unrun, or refused.

Wrappers are known by the names of their classes, so that no library is imported to ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.errors import Refusal

# Class -> the attribute that holds the plain module.
_AROUND = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_forward_module",
}
_SHARDED = "FullyShardedDataParallel"
_AVERAGED = "AveragedModel"
# The forward of one talks to other processes, the hooks of the other keep what passes.
_COLLECTIVE, _SAMPLING = "SyncBatchNorm", "GradSampleModule"
_SHARDING_OPTIMIZER = "ZeroRedundancyOptimizer"

Stance = Literal["run", "not run", "refused"]


@dataclass(frozen=True)
class Wrapping:
    """One thing that binds the model to its weights as they are, and what follows from it.

    "run": the plain module inside is measured; "not run": it cannot be, so that only the
    optimizer's steps are guarded; "refused": not even that would be right.
    """

    name: str
    stance: Stance
    refusal: Refusal


@dataclass(frozen=True)
class Opened:
    """The plain model inside a given one, what was looked through, and all that binds it."""

    model: nn.Module
    wrappings: tuple[Wrapping, ...]
    around: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether the plain model can be run and measured without a trace."""
        return all(wrapping.stance == "run" for wrapping in self.wrappings)

    @property
    def refusals(self) -> list[Refusal]:
        """Why values and structure stay as they are."""
        return [wrapping.refusal for wrapping in self.wrappings]

    @property
    def hopeless(self) -> list[Refusal]:
        """Why not even the optimizer's steps can be guarded."""
        return [wrapping.refusal for wrapping in self.wrappings if wrapping.stance == "refused"]


def opened(model: nn.Module) -> Opened:
    """The plain model inside, through any number of outer wrappers; nothing is changed."""
    around: list[Wrapping] = []
    path, inner = "", model
    while (attribute := _attribute_inside(inner)) is not None:
        around.append(_around(path, inner, attribute))
        public = "module" if attribute == "_forward_module" else attribute
        path = f"{path}.{public}" if path else public
        inner = getattr(inner, attribute)
    names = tuple(wrapping.name for wrapping in around)
    return Opened(inner, (*around, *_within(path, inner)), names)


def wrapper_refusals(model: nn.Module) -> Iterator[Refusal]:
    """Every wrapper and compiled or sharded part as a reason to leave values and structure."""
    yield from opened(model).refusals


def stepping(optimizer: Any) -> Any:
    """The optimizer whose `step` moves the weights, inside wrappers that share its parameters.

    Accelerate, Lightning, Opacus, SAM and Lookahead keep one on an attribute; anything else
    comes back as it is, and so does a sharding optimizer, whose inner one sees a part only.
    """
    seen: set[int] = set()
    while id(optimizer) not in seen and not _is(optimizer, _SHARDING_OPTIMIZER):
        seen.add(id(optimizer))
        held = _held(optimizer)
        alike = (inner for inner in _optimizers_in(optimizer) if held and _held(inner) == held)
        optimizer = next(alike, optimizer)
    return optimizer


def copies_weights(optimizer: Any) -> str | None:
    """The class of an inner optimizer that steps copies of the weights that the outer names."""
    held = _held(optimizer)
    if _is(optimizer, _SHARDING_OPTIMIZER) or not held:
        return None
    inner = [each for each in _optimizers_in(optimizer) if _held(each)]
    apart = [each for each in inner if held.isdisjoint(_held(each))]
    return type(apart[0]).__name__ if apart and len(apart) == len(inner) else None


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, of which each process holds a part."""
    return _is(tensor, "DTensor")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _is(thing: object, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(thing).__mro__)


def _attribute_inside(module: nn.Module) -> str | None:
    names = (_AROUND[name] for name in _AROUND if _is(module, name))
    return next((n for n in names if isinstance(getattr(module, n, None), nn.Module)), None)


def _around(path: str, module: nn.Module, attribute: str) -> Wrapping:
    if attribute == "_orig_mod":
        return Wrapping("torch.compile", "run", _compiled(path))
    name = type(module).__name__
    return Wrapping(name, "run", _wrapped(path, name))


def _compiled(path: str) -> Refusal:
    cure = "Call rnnguard on the plain model, before torch.compile."
    return Refusal("RG909", path, "the module is compiled.", cure)


def _wrapped(path: str, name: str) -> Refusal:
    place = f"{path}." if path else ""
    cure = f"Pass `{place}module`, before wrapping: first stabilize, then wrap."
    return Refusal("RG901", path, f"the module is wrapped in {name}.", cure)


def _within(start: str, model: nn.Module) -> Iterator[Wrapping]:
    """What binds parts of the plain model; of things that spread, the first place."""
    told: set[str] = set()
    for path, module in model.named_modules(prefix=start):
        found = _binding(path, module, model)
        # Each part of a compiled or sharded module is one itself.
        if found is not None and not (found.name in told and found.name not in _AROUND):
            told.add(found.name)
            yield found


def _binding(path: str, module: nn.Module, model: nn.Module) -> Wrapping | None:
    name, attribute = type(module).__name__, _attribute_inside(module)
    if _is(module, _SHARDED):
        return Wrapping(name, "refused", _sharded_flat(path))
    if _is(module, _AVERAGED):
        return Wrapping(name, "refused" if module is model else "run", _averaged(path, name))
    # A compiled module sets the second on itself, a module in an OptimizedModule on the outer.
    if attribute == "_orig_mod" or getattr(module, "_compiled_call_impl", None):
        return Wrapping("torch.compile", "not run", _compiled(path))
    if attribute is not None:
        return Wrapping(name, "not run", _wrapped(path, name))
    if _is(module, "FSDPModule") or any(map(is_sharded, module.parameters(recurse=False))):
        return Wrapping("fully_shard", "not run", _sharded(path))
    if (_is(module, _COLLECTIVE) and _several()) or _is(module, _SAMPLING):
        return Wrapping(name, "not run", _not_run(path, name))
    return None


def _sharded_flat(path: str) -> Refusal:
    fact = f"the module is wrapped in {_SHARDED}, whose gradients are shards of flat parameters."
    cure = (
        "First stabilize the plain model with tiers=('values', 'structure'), then wrap; clip in "
        "the training loop with `fsdp_root.clip_grad_norm_(max_norm)`."
    )
    return Refusal("RG901", path, fact, cure)


def _averaged(path: str, name: str) -> Refusal:
    fact = f"the module is an {name}, which no gradient trains."
    cure = "Stabilize the plain model that it averages, and make the average afterwards."
    return Refusal("RG901", path, fact, cure)


def _sharded(path: str) -> Refusal:
    fact = "the parameters are sharded (DTensor)."
    return Refusal("RG901", path, fact, "First stabilize the plain model, then call fully_shard.")


def _not_run(path: str, name: str) -> Refusal:
    fact = f"the module is a {name}, whose forward reaches beyond this model."
    return Refusal("RG901", path, fact, "First stabilize the plain model, then convert it.")


def _several() -> bool:
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    return started and distributed.get_world_size() > 1


def _held(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", None) or ()
    return {id(param) for group in groups for param in group["params"]}


def _optimizers_in(optimizer: Any) -> list[Optimizer]:
    values = getattr(optimizer, "__dict__", {}).values()
    return [value for value in values if isinstance(value, Optimizer) and value is not optimizer]
