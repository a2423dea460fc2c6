"""Whose code runs: the module, and the user's file and line, found on the stack."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import rnnguard
from rnnguard.inspection.gates import is_recurrent
from rnnguard.inspection.own_code import is_own

_OURS = str(Path(str(rnnguard.__file__)).parent) + os.sep
# Parts of the package that hold modules of their own, as a user's files do.
_MODULES_OF_OURS = (f"{_OURS}nn{os.sep}", f"{_OURS}demo.py")
_PASSED = (
    __file__,
    str(Path(__file__).with_name("recording.py")),
    str(Path(torch.overrides.__file__)),
)


@dataclass(frozen=True)
class Caller:
    """The innermost known module's path, the recurrent module, and the user's file:line.

    `spot` is the instruction there, which tells two calls of one line apart.
    """

    owner: str | None
    module: nn.Module | None
    location: str | None
    spot: int | None


def caller(modules: Mapping[int, str]) -> Caller:
    """Who makes the call that is being recorded; `modules` are the model's paths by id."""
    owner: str | None = None
    module: nn.Module | None = None
    location: str | None = None
    spot: int | None = None
    for frame in _frames():
        holder = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(holder, nn.Module):
            if owner is None:
                owner = modules.get(id(holder))
            if module is None and is_recurrent(holder):
                module = holder
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and not file.startswith(_MODULES_OF_OURS):
            break  # from here outwards it is the caller of rnnguard, not the model
        if location is None and is_own(file):
            location, spot = f"{file}:{frame.f_lineno}", frame.f_lasti
        if location is not None and owner is not None:
            break
    return Caller(owner, module, location, spot)


def _frames() -> Iterator[FrameType]:
    """The frames of the running code from the torch call outwards, without the recorder's own."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename in _PASSED:
        frame = frame.f_back
    while frame is not None:
        yield frame
        frame = frame.f_back
