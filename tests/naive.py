"""Runs a test twice: as it stands, and against a naive version that it has to catch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest

Naive = Callable[[pytest.MonkeyPatch], None]
FAILED = (AssertionError, pytest.fail.Exception)


def fooled_by(
    naive: Naive, *, fails_with: type[BaseException] | tuple[type[BaseException], ...] = FAILED
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a run of the test in which `naive` has replaced the right code: there it must fail.

    `naive` puts the obvious but wrong version in place through the monkeypatch. The test must
    fail by its own assertions, unless `fails_with` names what the naive version raises.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(version: str, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> None:
            if "monkeypatch" in wanted:
                arguments["monkeypatch"] = monkeypatch
            if version == "rnnguard":
                test(**arguments)
                return
            naive(monkeypatch)
            with pytest.raises(fails_with):
                test(**arguments)

        wanted = inspect.signature(test).parameters
        added = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("version", "monkeypatch")
            if name not in wanted
        ]
        run.__signature__ = inspect.Signature([*added, *wanted.values()])  # type: ignore[attr-defined]
        versions: Callable[..., Callable[..., None]] = pytest.mark.parametrize(
            "version", ["rnnguard", "naive"]
        )
        return versions(run)

    return decorate
