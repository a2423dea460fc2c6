"""How a structural remedy changes a recurrence: torch's own class only, once, with new children."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from rnnguard.nn.fused import FUSED
from rnnguard.rewrite.edit import Edit

Parts = Mapping[str, nn.Module]


def morph_with(
    edit: Edit,
    module: nn.Module,
    classes: Mapping[type[nn.Module], type[nn.Module]],
    build: Callable[[nn.RNNBase], Parts],
) -> Parts | None:
    """The children with which `module` has become the class that `classes` has for its own.

    None, and nothing is built or done, where they have none: a class of the user's or of
    rnnguard's, a single step's cell, a cell that the class is not made for.
    """
    cls = classes.get(type(module))
    if cls is None:
        return None
    assert isinstance(module, nn.RNNBase)
    parts = build(module)
    _morph(edit, module, cls, parts)
    return parts


def surround_with(
    edit: Edit, module: nn.Module, name: str, build: Callable[[nn.RNNBase], nn.Module | None]
) -> None:
    """Gives a module that runs torch's kernel a child around it; one of that name stays.

    `build` gives None where the child would do nothing on this module.
    """
    around = type(module) in FUSED.values()
    cls = type(module) if around else FUSED.get(type(module))
    if cls is None or (around and hasattr(module, name)):
        return
    assert isinstance(module, nn.RNNBase)
    child = build(module)
    if child is not None:
        _morph(edit, module, cls, {name: child})


def _morph(edit: Edit, module: nn.RNNBase, cls: type[nn.Module], parts: Parts) -> None:
    own = list(module.parameters(recurse=False))
    like = next((p for p in own if p.requires_grad), own[0])
    for part in parts.values():
        # A frozen recurrence stays frozen; what no optimizer holds would never train.
        part.requires_grad_(like.requires_grad)
    edit.morph_(module, cls, **parts)
    path = edit.path_of(module)
    prefix = f"{path}." if path else ""
    added = {
        f"{prefix}{name}.{key}": parameter
        for name, part in parts.items()
        for key, parameter in part.named_parameters()
    }
    # Not without any: an LBFGS at work refuses to be asked.
    if added:
        edit.adopt_(added, like=like)
