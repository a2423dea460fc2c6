"""Everything that makes rnnguard refuse a model or an optimizer, gathered before any touch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from rnnguard.errors import Refusal
from rnnguard.inspection.gates import parameter_name, recurrences
from rnnguard.inspection.sites import recurrent_modules
from rnnguard.records import TIERS, near_miss

_OLD_STYLE = ("_g", "_v", "_orig", "_raw")


def run_refusals(model: nn.Module) -> Iterator[Refusal]:
    """Reasons why the model cannot even be run and measured."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield Refusal("RG908", path, "the module is scripted.", _before("torch.jit.script"))
            break
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
            yield Refusal("RG909", path, "the module is compiled.", _before("torch.compile"))
            break
    yield from _weights_refused(model)


def _weights_refused(model: nn.Module) -> Iterator[Refusal]:
    """Weights without values, or without finite ones; one reason for each kind of fault."""
    named = list(model.named_parameters())
    lazy = [n for n, p in named if isinstance(p, UninitializedParameter)]
    meta = [n for n, p in named if n not in lazy and p.is_meta]
    sound = [(n, p.detach()) for n, p in named if n not in lazy and n not in meta]
    broken = [n for n, p in sound if not bool(torch.isfinite(p).all())]
    inference = [n for n, p in sound if p.is_inference()]
    rebuild_outside = "Build the model outside of torch.inference_mode."
    rerun = "Run the model once on a batch first."
    materialise = "Move the model to a device with `to_empty` and initialise it first."
    rebuild = "Build the model again, or load a checkpoint from before the bad step."
    for code, names, fact, cure in (
        ("RG907", lazy, "the parameter is lazy and has no values yet", rerun),
        ("RG907", meta, "the parameter lies on the meta device", materialise),
        ("RG911", broken, "the weights hold NaN or infinity", rebuild),
        ("RG921", inference, "the parameter was made in inference mode", rebuild_outside),
    ):
        if names:
            more = f" ({len(names) - 1} more like it)" if len(names) > 1 else ""
            yield Refusal(code, names[0], f"{fact}{more}.", cure)


def _before(wrapper: str) -> str:
    return f"Call rnnguard on the plain model, before {wrapper}."


def rewrite_refusals(
    model: nn.Module, optimizer: Optimizer, skip: Iterable[str]
) -> Iterator[Refusal]:
    """Further reasons why model and optimizer cannot be rewritten."""
    yield from _wrappers(model)
    left_alone = set(skip)
    for path, module in recurrent_modules(model).items():
        if path not in left_alone:
            yield from _parametrized(path, module)
    yield from optimizer_refusals(model, optimizer)


def optimizer_refusals(model: nn.Module, optimizer: Optimizer) -> Iterator[Refusal]:
    """The optimizer must hold parameters of this model and no others."""
    if not isinstance(optimizer, Optimizer):
        fact = f"a {type(optimizer).__name__} is not a torch.optim.Optimizer."
        yield Refusal("RG904", "optimizer", fact, "Pass the optimizer object itself.")
        return
    known = {id(parameter) for parameter in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in held if id(p) not in known]
    if foreign:
        shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:3])
        more = " and more" if len(foreign) > 3 else ""
        count = f"holds {len(foreign)} of {len(held)} parameters"
        fact = f"{count} that are not this model's: {shapes}{more}."
        cure = "Build it from this model's parameters, or pass one module that holds them all."
        yield Refusal("RG904", "optimizer", fact, cure)


def _wrappers(model: nn.Module) -> Iterator[Refusal]:
    for path, module in model.named_modules():
        name = type(module).__name__
        if isinstance(module, _wrapper_classes()):
            place = f"{path}." if path else ""
            cure = f"Pass `{place}module`, before wrapping: first stabilize, then wrap."
            yield Refusal("RG901", path, f"the module is wrapped in {name}.", cure)


def _wrapper_classes() -> tuple[type[Any], ...]:
    from torch.nn.parallel import DataParallel, DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    classes: tuple[type[Any], ...] = (DataParallel, DistributedDataParallel, AveragedModel)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        classes = (*classes, FullyShardedDataParallel, FSDPModule)
    return classes


def _parametrized(path: str, module: nn.Module) -> Iterator[Refusal]:
    cure = f'Remove the parametrization or leave this site out with `skip=["{path}"]`.'
    own = [name for name, _ in module.named_parameters(recurse=False)]
    names = {name.removesuffix(s) for name in own for s in _OLD_STYLE if name.endswith(s)}
    # Weight drop sets a plain tensor in the parameter's place at every forward.
    names |= {name for name in _weight_names(module) if name not in own}
    if parametrize.is_parametrized(module):
        names |= set(module.parametrizations.keys())  # type: ignore[operator,union-attr]
    for name in sorted(names):
        yield Refusal("RG903", path, f"{name} is parametrized.", cure)


def _weight_names(module: nn.Module) -> Iterator[str]:
    for layer, direction in recurrences(module):
        for kind in ("weight_ih", "weight_hh"):
            yield parameter_name(module, kind, layer, direction)


def option_refusals(memory: object, total_steps: object) -> Iterator[Refusal]:
    """Counts of steps must be whole and positive."""
    for name, value in (("memory", memory), ("total_steps", total_steps)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value >= 1):  # type: ignore[operator]
            fact = f"{value!r} is not a number of steps."
            yield Refusal("RG920", name, fact, "Give a whole number of 1 or more, or leave it out.")


def skip_refusals(model: nn.Module, skip: Iterable[str]) -> Iterator[Refusal]:
    """Paths to leave alone must be paths of recurrences."""
    known = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for path in skip:
        if path not in known:
            fact = f"`skip` names {path!r}, which is no module of this model;"
            sites = list(recurrent_modules(model)) or known
            yield Refusal("RG914", "skip", fact, near_miss(path, sites))


def tier_refusals(tiers: Iterable[str]) -> Iterator[Refusal]:
    for tier in tiers:
        if tier not in TIERS:
            fact = f"{tier!r} is not a tier;"
            yield Refusal("RG914", "tiers", fact, near_miss(tier, list(TIERS)))


def sparse_refusals(model: nn.Module) -> list[Refusal]:
    """Layers whose sparse gradients have no norm together with dense ones."""
    cure = "Use sparse=False there to have the gradient clipped."
    return [
        Refusal("RG905", path, "the layer gives sparse gradients.", cure)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
