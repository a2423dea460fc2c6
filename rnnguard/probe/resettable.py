"""Whether any code can reset a state that a model keeps on an attribute between its calls."""

from __future__ import annotations

import ast
import dis
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import CodeType

from torch import Tensor, fx, nn

from rnnguard.inspection.own_code import called_by_forward, is_users, methods_of
from rnnguard.inspection.recording import tensors_in
from rnnguard.inspection.sourcefile import SourceFile

Holder = tuple[nn.Module, str]  # who keeps the state, on which attribute
_INTERNAL = frozenset(vars(nn.Module()))
_MAKES = {"__init__", "__new__"}
_SAYS_RESET = re.compile(
    r"reset(?!_?(param|weight))|(init|zero|new)_?(hidden|state|h|c|memory|sequence|episode)"
    r"|clear|forget_all|detach_?(hidden|state)")  # fmt: skip
_TAKES_STATE = re.compile(
    r"(^|_)(h|c|hx|cx|hc|h_?0|c_?0|hiddens?|states?|carry|memory|memories|mems|cache|resets?|dones?"
    r"|starts?|first|episode|init|initial|prev|previous|past)(_|$)", re.IGNORECASE)  # fmt: skip
_WRITES = {"zero_", "fill_", "copy_", "set_", "clear", "pop", "setattr", "delattr"}


def holders(model: nn.Module, kept: Iterable[Tensor]) -> list[list[Holder]]:
    """For each kept tensor the modules and attributes that it lies on, while it still does."""
    places: dict[int, list[Holder]] = {}
    for module in model.modules():
        held = {n: v for n, v in vars(module).items() if n not in _INTERNAL}
        for name, value in (held | dict(module.named_buffers(recurse=False))).items():
            for tensor in tensors_in(value):
                places.setdefault(id(tensor), []).append((module, name))
    return [places.get(id(tensor), []) for tensor in kept]


def resettable(
    model: nn.Module, held: Collection[Holder], step: Callable[..., object] | None = None
) -> bool:
    """Whether code besides `forward` can reset the state that lies on the attributes `held`.

    That is a method of a module on the way there which writes the attribute or says so by its
    name, an argument of `forward` that a state or a sign to reset it may come by, the user's
    `step`, or a statement in the files of these classes, or in one beside them that imports them,
    which writes it from outside. It counts as resettable where it is not known where the state
    lies (`held` is empty), or what else will be written, as in a notebook.
    """
    names = {name for _, name in held}
    if (
        not names
        or hasattr(sys, "ps1")  # somebody types, in a notebook or at a prompt
        or any(_is_own_object(getattr(module, name, None)) for module, name in held)
    ):
        return True
    around = {type(module) for module in model.modules() if _leads_to(module, held)}
    classes = set(filter(is_users, around))
    if any(_takes_state(cls) or _resets(cls, names) for cls in classes):
        return True
    code = getattr(step, "__code__", None)
    if isinstance(code, CodeType) and _may_write(code, names):
        return True
    return any(_written_outside(file, names) for file in _files(classes))


def resets(
    model: nn.Module,
    carried: Mapping[str, Iterable[fx.Node]],
    held: list[list[Holder]],
    step: Callable[..., object] | None = None,
) -> dict[str, bool]:
    """By path of a site that goes on from kept states whether they are `resettable`.

    `carried` is what `carried_over` gives, `held` the `holders` of the kept tensors, in order.
    """
    found = {}
    for path, nodes in carried.items():
        places = [int(str(node.target).removeprefix("kept")) for node in nodes]
        own = [holder for place in places for holder in held[place]]
        found[path] = resettable(model, own, step)
    return found


def _is_own_object(value: object) -> bool:
    """Whether the state is kept by an object of the user's that can reset itself."""
    own = is_users(type(value)) and not isinstance(value, nn.Module)
    return own and any(_SAYS_RESET.search(name) for name in dir(type(value)))


def _leads_to(module: nn.Module, held: Collection[Holder]) -> bool:
    inside = {id(part) for part in module.modules()}
    return any(id(owner) in inside for owner, _ in held)


def _takes_state(cls: type) -> bool:
    names = list(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
    # The first argument is the input, whatever its name.
    return any(_TAKES_STATE.search(name) for name in names[1:])


def _resets(cls: type, names: set[str]) -> bool:
    """Whether a method writes the attributes, or says so; not what only `forward` calls."""
    methods = methods_of(cls)
    called = called_by_forward(methods)
    for name, codes in methods.items():
        if name not in _MAKES and _SAYS_RESET.search(name):
            return True
        inner = name in ("forward", "__call__") or (name in called and name.startswith("_"))
        if not inner and name not in _MAKES and any(_may_write(code, names) for code in codes):
            return True
    return False


def _may_write(code: CodeType, names: set[str]) -> bool:
    """Whether the code assigns one of the attributes, or changes it in place."""
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_ATTR", "DELETE_ATTR") and step.argval in names:
            return True
    constants = {part for c in code.co_consts for part in (c if isinstance(c, tuple) else (c,))}
    used = {*code.co_names, *constants}
    if not names.isdisjoint(used) and not _WRITES.isdisjoint(used):
        return True
    return any(_may_write(c, names) for c in code.co_consts if isinstance(c, CodeType))


def _files(classes: Collection[type]) -> set[Path]:
    """The files of the classes, the script that runs, and those beside these that import them."""
    modules = (sys.modules.get(name) for name in {cls.__module__ for cls in classes} | {"__main__"})
    named = (Path(str(getattr(module, "__file__", None))) for module in modules)
    own = {file for file in named if file.suffix == ".py"}
    stems, kinds = {file.stem for file in own}, {cls.__name__ for cls in classes}
    words = "|".join(map(re.escape, stems | kinds))
    imported = re.compile(rf"^\s*(from|import)\b.*\b({words})\b", re.MULTILINE)
    folders = {Path(), *(file.parent for file in own)}
    beside = {file for folder in folders for file in folder.glob("*.py")}
    return own | {file for file in beside if imported.search(SourceFile(str(file)).text)}


def _written_outside(file: Path, names: set[str]) -> bool:
    """Whether a statement such as `model.hidden = None` stands in the file."""
    source = SourceFile(str(file))
    return any(name in source.text for name in names) and any(
        isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.ctx, ast.Store | ast.Del)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
        for node in source.nodes
    )
