"""A call's tensors as a flat row, which is what autograd's functions take, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeVar

from torch import Tensor

Parts = TypeVar("Parts", bound=tuple[Any, ...])


class _Slot:
    """Where a tensor stood."""


SLOT: Final = _Slot()


def tensors_in(parts: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors of named tuples in named tuples, in order."""
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, tuple):
            yield from tensors_in(part)


def emptied(parts: Parts) -> Parts:
    """The same parts with a slot in place of each tensor."""
    made: Any = parts.__class__
    return made(*(_emptied(part) for part in parts))  # type: ignore[no-any-return]


def _emptied(part: Any) -> Any:
    if isinstance(part, Tensor):
        return SLOT
    return emptied(part) if isinstance(part, tuple) else part


def filled(blank: Parts, values: Iterator[Any]) -> Parts:
    """The emptied parts with the next value in each slot."""
    made: Any = blank.__class__
    return made(*(_filled(part, values) for part in blank))  # type: ignore[no-any-return]


def _filled(part: Any, values: Iterator[Any]) -> Any:
    if part is SLOT:
        return next(values)
    return filled(part, values) if isinstance(part, tuple) else part


def in_slots(blank: tuple[Any, ...], parts: tuple[Any, ...]) -> Iterator[Any]:
    """What the parts hold where the emptied ones have slots, in order."""
    for slot, part in zip(blank, parts, strict=True):
        if slot is SLOT:
            yield part
        elif isinstance(slot, tuple):
            yield from in_slots(slot, part)
