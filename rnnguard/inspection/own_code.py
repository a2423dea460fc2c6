"""The user's own functions: those given, the methods of the model's classes, and what they call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

import rnnguard

_TORCH, _OURS = (str(Path(str(m.__file__)).parent) + os.sep for m in (torch, rnnguard))
_DEMO = f"{_OURS}demo.py"
DEPTH = 3  # calls of calls that are followed


def is_own(file: str) -> bool:
    """Whether a file is neither torch's nor rnnguard's."""
    return file == _DEMO or not file.startswith((_TORCH, _OURS))


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


def names_in(code: CodeType) -> set[str]:
    """Global and attribute names that a function uses, with those of functions inside it."""
    inner = (names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)


_Followed = tuple[FunctionType, type | None]  # with the class whose method it is


def _of(root: Any) -> Iterator[_Followed]:
    if isinstance(root, nn.Module):
        # With all methods: a training loop may call others than forward.
        for kind in {type(module) for module in root.modules()}:
            yield from _methods(kind)
    elif isinstance(root, partial):
        yield from _of(root.func)
    elif isinstance(root, MethodType):
        yield from _own(root.__func__, type(root.__self__))
    elif isinstance(root, FunctionType):
        yield from _own(root, None)
    elif callable(root) and not isinstance(root, type):
        yield from _own(type(root).__call__, type(root))


def _methods(kind: type) -> Iterator[_Followed]:
    for each in kind.__mro__:
        for value in vars(each).values():
            held = value.fget if isinstance(value, property) else value
            yield from _own(getattr(held, "__func__", held), kind)


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
