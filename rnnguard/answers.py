"""How a command ends: its exit code, and what goes to which stream."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable

import typer

from rnnguard.errors import RNNGuardError

STOPPED = 130
"""The exit code of what Ctrl-C ended, as a shell gives it; commands that judge give 2."""


def answer(work: Callable[[], int], debug: bool, *, interrupted: int = 2) -> None:
    """Ends the command with the code that `work` gives, or 2 and one sentence on stderr.

    interrupted: the code after Ctrl-C.
    """
    try:
        code = work()
    except BaseException as error:  # SystemExit and KeyboardInterrupt must not look like findings
        if debug:
            traceback.print_exc()
        print(_sentence(error), file=sys.stderr)
        code = interrupted if isinstance(error, KeyboardInterrupt) else 2
    raise typer.Exit(code)


def _sentence(error: BaseException) -> str:
    if isinstance(error, RNNGuardError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    from rnnguard.targets import origin

    said = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}{origin(error)}: {said or 'no message'} (--debug shows the traceback)"


def print_out(text: str) -> None:
    """Writes to stdout; neither an old encoding nor a reader that went away is a failure."""
    with contextlib.suppress(AttributeError):  # a captured stdout may not be a file
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
