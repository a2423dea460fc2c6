"""Several processes that train together: they raise alike, and follow one of them.

Alone, or without torch.distributed, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rnnguard.errors import Refusal, RefusedError, RewriteError, RNNGuardError

T = TypeVar("T")


class _RaisedElsewhere(Exception):
    """Carries what another process raised, which all of them know already."""

    def __init__(self, error: RNNGuardError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class _Failure:
    """What one process raised, in a form that the others can raise too."""

    kind: type[RNNGuardError]
    reasons: tuple[Refusal, ...]


def size() -> int:
    """How many processes train together; 1 without torch.distributed."""
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


def rank() -> int:
    """The number of this process; 0 is the one that decides."""
    return torch.distributed.get_rank() if size() > 1 else 0


def note() -> tuple[str, ...]:
    """What a report says of the processes; nothing when there is one."""
    if size() == 1:
        return ()
    return (
        f"Process {rank()} of {size()}: changes are as process 0 decided them, figures are of "
        "this process's own data.",
    )


@contextmanager
def alike() -> Iterator[None]:
    """All processes come to the end of the block, or all of them raise there.

    What the first of them raised, every one raises: an RNNGuardError as it is, anything else
    as a RewriteError (RG916) that names the process, except where it came from, which raises
    its own. Every process has to run the same blocks, and the same `told` in them.
    """
    if size() == 1:
        yield
        return
    try:
        yield
    except _RaisedElsewhere as known:
        raise known.error from None
    except BaseException as error:
        first = _first_failure(_exchange(_failure_of(error), None))
        if isinstance(error, RNNGuardError) and getattr(first, "__notes__", None):
            raise first from error
        raise
    else:
        try:
            _raise_first(_exchange(None, None))
        except _RaisedElsewhere as known:
            raise known.error from None


def told(word: T) -> T:
    """What process 0 says; to be called in a block of `alike`."""
    if size() == 1:
        return word
    said = _exchange(None, word if rank() == 0 else None)
    _raise_first(said)
    first: T = said[0][1]
    return first


@contextmanager
def on_its_own() -> Iterator[None]:
    """In the block nothing may talk to other processes, which need not be there to answer.

    Raises RefusedError (RG912) in place of a wait that might never end.
    """
    if size() == 1:
        yield
        return
    listener = _Listener()  # type: ignore[no-untyped-call]
    try:
        with listener:
            yield
    except Exception as error:
        if listener.heard is None:
            raise
        fact = f"the run talks to other processes ({listener.heard}), which may not listen."
        cure = (
            "Give a model and a loss that do not, or stabilize in one process and replay its "
            "plan in all with `rnnguard.apply`."
        )
        raise RefusedError.of("RG912", "", fact, cure) from error


class _Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at the first collective operation, before it is begun."""

    heard: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "c10d" in func.namespace:
            self.heard = str(func)
            raise RuntimeError(self.heard)
        return func(*args, **(kwargs or {}))


def _failure_of(error: BaseException) -> _Failure:
    if isinstance(error, RNNGuardError):
        return _Failure(type(error), error.reasons)
    fact = f"process {rank()} raised {type(error).__name__}: {error}."
    restored = Refusal("RG916", "", fact, "The model and optimizer were restored.")
    return _Failure(RewriteError, (restored,))


def _exchange(failure: _Failure | None, word: Any) -> list[tuple[_Failure | None, Any]]:
    said: list[Any] = [None] * size()
    torch.distributed.all_gather_object(said, (failure, word))
    return said


def _raise_first(said: list[tuple[_Failure | None, Any]]) -> None:
    if any(failure is not None for failure, _ in said):
        raise _RaisedElsewhere(_first_failure(said))


def _first_failure(said: list[tuple[_Failure | None, Any]]) -> RNNGuardError:
    first, failure = next((i, f) for i, (f, _) in enumerate(said) if f is not None)
    error = failure.kind(*failure.reasons)
    if first != rank():
        error.add_note(f"raised by process {first} of {len(said)}")
    return error
