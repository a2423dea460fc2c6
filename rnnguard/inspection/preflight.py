"""Everything that makes rnnguard refuse a model or an optimizer, gathered before any touch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from rnnguard.errors import Refusal
from rnnguard.inspection.gates import parameter_name, recurrences
from rnnguard.inspection.sites import recurrent_modules
from rnnguard.inspection.wrappers import copies_weights, is_sharded, local_part
from rnnguard.records import TIERS, near_miss

_OLD_STYLE = ("_g", "_v", "_orig", "_raw")


def run_refusals(model: nn.Module) -> Iterator[Refusal]:
    """Reasons why the model cannot even be run and measured."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield Refusal("RG908", path, "the module is scripted.", _before("torch.jit.script"))
            break
    yield from _weights_refused(model)


def _weights_refused(model: nn.Module) -> Iterator[Refusal]:
    """Weights without values, or without finite ones; one reason for each kind of fault."""
    named = list(model.named_parameters())
    lazy = [n for n, p in named if isinstance(p, UninitializedParameter)]
    meta = [n for n, p in named if n not in lazy and p.is_meta]
    # Of a sharded tensor each process looks at its own part.
    sound = [(n, local_part(p.detach())) for n, p in named if n not in lazy and n not in meta]
    broken = [n for n, p in sound if not bool(torch.isfinite(_dense(p)).all())]
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


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _before(wrapper: str) -> str:
    return f"Call rnnguard on the plain model, before {wrapper}."


def rewrite_refusals(
    model: nn.Module, optimizer: Optimizer, skip: Iterable[str]
) -> Iterator[Refusal]:
    """Further reasons why model and optimizer cannot be rewritten."""
    left_alone = set(skip)
    for path, module in recurrent_modules(model).items():
        if path not in left_alone:
            yield from _parametrized(path, module)
    yield from optimizer_refusals(model, optimizer)


def kind_refusals(optimizer: object) -> Iterator[Refusal]:
    """What is passed as the optimizer must be one."""
    if not isinstance(optimizer, Optimizer):
        fact = f"a {type(optimizer).__name__} is not a torch.optim.Optimizer."
        yield Refusal("RG904", "optimizer", fact, "Pass the optimizer object itself.")


def optimizer_refusals(model: nn.Module, optimizer: Optimizer) -> Iterator[Refusal]:
    """The optimizer must hold parameters of this model and no others, and step them itself."""
    if refused := list(kind_refusals(optimizer)):
        yield from refused
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
        if any(map(is_sharded, model.parameters())) and not any(map(is_sharded, foreign)):
            cure = "fully_shard makes new parameters: build the optimizer after it."
        yield Refusal("RG904", "optimizer", fact, cure)
    elif len(meshes := {getattr(p, "device_mesh", None) for p in held}) > 1:
        spread = "sharded and plain" if None in meshes else "differently sharded"
        fact = f"holds {spread} parameters, whose gradients have no common norm."
        cure = "Call fully_shard on the whole model, or give each kind an optimizer of its own."
        yield Refusal("RG925", "optimizer", fact, cure)
    if (inner := copies_weights(optimizer)) is not None:
        fact = f"its inner {inner} steps copies of the weights and not the weights themselves."
        yield Refusal("RG904", "optimizer", fact, "Clip with what made the copies.")


def _parametrized(path: str, module: nn.Module) -> Iterator[Refusal]:
    cure = f'Remove the parametrization or leave this site out with `skip=["{path}"]`.'
    # With duplicates, since one weight may stand under two names of its module.
    held = module.named_parameters(recurse=False, remove_duplicate=False)
    own = [name for name, _ in held]
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
