"""The methods of a user's class, and which of them `forward` calls."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType

_NOT_USERS = ("torch", "abc", "collections", "typing")


def is_users(cls: type) -> bool:
    """Whether the class is neither torch's nor Python's."""
    # What is defined by `exec` without a name says that it is of `builtins`, too.
    pythons = getattr(builtins, cls.__name__, None) is cls
    return not pythons and cls.__module__.partition(".")[0] not in _NOT_USERS


def methods_of(cls: type) -> dict[str, list[CodeType]]:
    """By name the codes of what the class and its bases define, setters and deleters included."""
    found: dict[str, list[CodeType]] = {}
    for each in filter(is_users, cls.__mro__):
        for name, value in vars(each).items():
            found.setdefault(name, []).extend(_codes(value))
    return {name: codes for name, codes in found.items() if codes}


def called_by_forward(methods: dict[str, list[CodeType]]) -> set[str]:
    """`forward` and the methods that it calls, or those call."""
    reached, pending = set[str](), {"forward", "__call__"}
    while pending:
        reached |= pending
        codes = [code for name in pending for code in methods.get(name, ())]
        pending = {name for code in codes for name in names_in(code) if name in methods} - reached
    return reached


def names_in(code: CodeType) -> Iterator[str]:
    """The attributes, methods and globals that a code uses, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def _codes(value: object) -> Iterator[CodeType]:
    parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,)
    for part in parts:
        function = getattr(part, "__func__", part)
        function = inspect.unwrap(function) if callable(function) else None
        if isinstance(function, FunctionType):
            yield function.__code__
