"""Which statements of the user's classes make a module or a parameter; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rnnguard.inspection.own_code import is_users
from rnnguard.inspection.sourcefile import ClassSource, SourceFile, classes_of

if TYPE_CHECKING:
    from torch import nn


def makers(
    model: nn.Module, path: str, classes: Mapping[type, tuple[ClassSource, ...]]
) -> Iterator[tuple[str, set[int]]]:
    """File and lines of the statements that assign what lies at a path, or what holds it."""
    parts = path.split(".") if path else []
    for cut in range(len(parts) - 1, -1, -1):
        try:
            owner = model.get_submodule(".".join(parts[:cut]))
        except AttributeError:
            return
        # torch's own containers are not the user's code: what made them is asked next.
        if is_users(type(owner)):
            for source in classes.get(type(owner), ()):
                for span in source.assigning(parts[cut]):
                    yield source.file.name, set(span)
            return


def made_at(model: nn.Module, path: str) -> str | None:
    """The file:line of the first statement that makes what lies at a path; None if unknown."""
    known: dict[str, SourceFile] = {}
    classes = {type(module): classes_of(type(module), known) for module in model.modules()}
    found = ((name, min(lines)) for name, lines in makers(model, path, classes))
    return next((f"{name}:{line}" for name, line in found), None)
