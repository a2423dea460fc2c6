"""The one family of errors: code, place, fact, cure, in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Refusal:
    """One reason not to go on: which code, at which path, what holds, what to do."""

    code: str
    path: str
    fact: str
    cure: str

    def __str__(self) -> str:
        place = f"`{self.path}`: " if self.path else ""
        return f"{place}{self.fact} {self.cure} ({self.code})"


class RNNGuardError(Exception):
    """Base of everything that rnnguard raises on purpose; `reasons` holds all refusals."""

    def __init__(self, *reasons: Refusal) -> None:
        super().__init__(*reasons)
        self.reasons = reasons

    @classmethod
    def of(cls, code: str, path: str, fact: str, cure: str) -> Self:
        return cls(Refusal(code, path, fact, cure))

    @property
    def code(self) -> str:
        return self.reasons[0].code

    @property
    def path(self) -> str:
        return self.reasons[0].path

    @property
    def fact(self) -> str:
        return self.reasons[0].fact

    @property
    def cure(self) -> str:
        return self.reasons[0].cure

    def __str__(self) -> str:
        return "\n".join(map(str, self.reasons))


class RefusedError(RNNGuardError):
    """Refused before anything was touched; all reasons at once."""


class RulesError(RNNGuardError):
    """A rule file or a name taken from one is wrong."""


class RewriteError(RNNGuardError):
    """The rewrite failed; model and optimizer were restored."""


class UndoError(RNNGuardError):
    """Part of the rewrite cannot be taken back without destroying later work."""


class RNNGuardWarning(UserWarning):
    """Something that happened in training and that only the user can judge."""


def refuse(reasons: Iterable[Refusal]) -> None:
    """Raises one RefusedError that holds every reason, or nothing when there is none."""
    gathered = tuple(reasons)
    if gathered:
        raise RefusedError(*gathered)
