"""The progress bar of a trial, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Told = Callable[[int, str], None]


@contextmanager
def trial_progress(steps: int, verbose: bool | None) -> Iterator[Told]:
    """What to call with steps taken and words; draws on standard error, if that is a terminal.

    steps: what the trial may take at most, so that the bar may end before its full length.
    """
    if verbose is False or not sys.stderr.isatty():
        yield lambda taken, words: None
        return
    from rnnguard.report.text import bar

    with bar(steps) as told:
        yield told
