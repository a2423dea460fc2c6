"""The user's own code as Python runs it: classes, their methods, functions, and what they call.

Imports no torch.
"""

from __future__ import annotations

import builtins
import inspect
import os
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

_TORCH, _OURS = (
    str(Path(str(spec and spec.origin)).parent) + os.sep
    for spec in map(find_spec, ("torch", "rnnguard"))
)
_DEMO = f"{_OURS}demo.py"
_NOT_USERS = ("torch", "abc", "collections", "typing")
DEPTH = 3  # calls of calls that are followed


def is_own(file: str) -> bool:
    """Whether a file is neither torch's nor rnnguard's."""
    return file == _DEMO or not file.startswith((_TORCH, _OURS))


def is_users(cls: type) -> bool:
    """Whether a class is neither torch's nor Python's."""
    # What is defined by `exec` without a name says that it is of `builtins`, too.
    pythons = getattr(builtins, cls.__name__, None) is cls
    return not pythons and cls.__module__.partition(".")[0] not in _NOT_USERS


def functions_of(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """What a class itself defines, bare of decorators; a property by each of its functions."""
    for name, value in vars(cls).items():
        parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,)
        for part in parts:
            function = getattr(part, "__func__", part)
            function = inspect.unwrap(function) if callable(function) else None
            if isinstance(function, FunctionType):
                yield name, function


def methods_of(cls: type) -> dict[str, list[CodeType]]:
    """By name the codes of what the class and its bases define, setters and deleters included."""
    found: dict[str, list[CodeType]] = {}
    for each in filter(is_users, cls.__mro__):
        for name, function in functions_of(each):
            found.setdefault(name, []).append(function.__code__)
    return found


def called_by_forward(methods: dict[str, list[CodeType]]) -> set[str]:
    """`forward` and the methods that it calls, or those call."""
    reached, pending = set[str](), {"forward", "__call__"}
    while pending:
        reached |= pending
        codes = [code for name in pending for code in methods.get(name, ())]
        pending = {name for code in codes for name in names_in(code) if name in methods} - reached
    return reached


def own_functions(*roots: object) -> list[FunctionType]:
    """The user's functions that the roots are, hold or call, each once.

    roots: functions, methods, partials, callable objects, modules with all that they hold, or
    None. Followed are calls of functions of the same file and of methods of the same class.
    """
    found: dict[CodeType, FunctionType] = {}
    level = [(function, kind) for root in roots for function, kind in _of(root)]
    for _ in range(DEPTH + 1):
        fresh = [(f, kind) for f, kind in level if f.__code__ not in found]
        found |= {function.__code__: function for function, _ in fresh}
        level = [called for function, kind in fresh for called in _called_by(function, kind)]
    return list(found.values())


def variables_of(functions: Iterable[FunctionType]) -> Iterator[Any]:
    """The values of the globals and of the outer functions' variables that they may read."""
    for function in functions:
        held = function.__globals__
        yield from (held[name] for name in sorted(names_in(function.__code__)) if name in held)
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not bound yet
                continue


def names_in(code: CodeType) -> set[str]:
    """Global and attribute names that a function uses, with those of functions inside it."""
    inner = (names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)


_Followed = tuple[FunctionType, type | None]  # with the class whose method it is


def _of(root: Any) -> Iterator[_Followed]:
    from torch import nn

    if isinstance(root, nn.Module):
        # With all methods: a training loop may call others than forward.
        for kind in {type(module) for module in root.modules()}:
            for each in kind.__mro__:
                for _, function in functions_of(each):
                    yield from _own(function, kind)
    elif isinstance(root, partial):
        yield from _of(root.func)
    elif isinstance(root, MethodType):
        yield from _own(root.__func__, type(root.__self__))
    elif isinstance(root, FunctionType):
        yield from _own(root, None)
    elif callable(root) and not isinstance(root, type):
        yield from _own(type(root).__call__, type(root))


def _own(function: Any, kind: type | None) -> Iterator[_Followed]:
    bare = inspect.unwrap(function) if callable(function) else function
    if isinstance(bare, FunctionType) and is_own(bare.__code__.co_filename):
        yield bare, kind


def _called_by(function: FunctionType, kind: type | None) -> Iterator[_Followed]:
    for name in names_in(function.__code__):
        called = function.__globals__.get(name)
        for each, _ in _own(called, None):
            if each.__code__.co_filename == function.__code__.co_filename:
                yield each, None
        if kind is not None:
            yield from _own(inspect.getattr_static(kind, name, None), kind)
