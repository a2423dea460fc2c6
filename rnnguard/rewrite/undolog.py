"""The log of what was done: one way back per change, run newest first, whatever comes between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rnnguard.errors import Refusal
from rnnguard.records import Tier
from rnnguard.rewrite.footprint import Footprint, Touched


class InTheWay(Exception):
    """What the user has done since keeps this change from being taken back; says what."""


@dataclass(frozen=True, eq=False)
class Inverse:
    """The way back from one verb: right also when the verb got only half-way, or when run twice."""

    run: Callable[[], None]
    tier: Tier
    """Step: taken back at any time; values: only untrained; structure: untrained or on request."""
    path: str = ""
    what: str = ""
    """What stays where it is not taken back, in words."""

    def stays(self, why: str) -> Refusal:
        """Why it is not taken back: `why` names what changed afterwards."""
        fact = f"{self.what} stays, since {why} changed afterwards."
        cure = "Build the model anew to be without it."
        if self.tier == "structure":
            cure = "`report.undo(structure=True)` takes it back all the same."
        return Refusal("RG917", self.path, fact, cure)


class UndoLog:
    """The inverses in the order of their changes, with the footprint as it was before each."""

    def __init__(self, footprint: Footprint) -> None:
        self._footprint = footprint
        self._entries: list[tuple[Inverse, Touched]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, inverse: Inverse) -> None:
        self._entries.append((inverse, self._footprint.saved()))

    def since(self, mark: int, *tiers: Tier) -> list[Inverse]:
        """The inverses after the mark, of these tiers or of all."""
        kept = (inverse for inverse, _ in self._entries[mark:])
        return [inverse for inverse in kept if not tiers or inverse.tier in tiers]

    def take_back_(self, inverses: list[Inverse]) -> list[Refusal]:
        """Runs these inverses, newest first; gives what could not be taken back, and why.

        An interrupt waits until all is back: the inverse that it hit is run once more.
        """
        pending, failures = list(inverses), dict[Inverse, Refusal]()
        interrupt: BaseException | None = None
        while pending:
            try:
                failure = _run(pending[-1])
                if failure is None:
                    self._forget(pending[-1])
                else:
                    failures[pending[-1]] = failure
                pending.pop()
            except BaseException as caught:
                interrupt = caught
        if interrupt is not None:
            raise interrupt
        return list(failures.values())

    def _forget(self, inverse: Inverse) -> None:
        for last, touched in self._entries[-1:]:
            # Out of order the footprint stays, so that what was trained since still shows.
            if last is inverse:
                self._footprint.restore(touched)
        self._entries = [entry for entry in self._entries if entry[0] is not inverse]


def _run(inverse: Inverse) -> Refusal | None:
    """Nothing, or why it failed; not at the first fault, since memory may be short for a moment."""
    try:
        inverse.run()
        return None
    except InTheWay as obstacle:
        return _failure(inverse, obstacle)
    except Exception:
        pass
    try:
        inverse.run()
        return None
    except Exception as error:
        return _failure(inverse, error)


def _failure(inverse: Inverse, error: Exception) -> Refusal:
    said = str(error) if isinstance(error, InTheWay) else f"{type(error).__name__}: {error}"
    fact = f"{inverse.what or 'a change of the optimizer'} could not be taken back: {said}."
    return Refusal("RG917", inverse.path, fact, "Take that back first, or build the model anew.")
