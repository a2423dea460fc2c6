"""The frozen records that travel down the flow, and the words they are made of; no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

SCHEMA = 1

Cell = Literal["rnn_tanh", "rnn_relu", "lstm", "gru", "custom"]
Form = Literal["fused", "cell", "written"]
Direction = Literal["forward", "reverse"]
Readout = Literal["last_step", "final_state", "pooled", "all_steps", "unknown"]
# Worst first, in the order of the health table.
Level = Literal[
    "unstable",
    "exploding",
    "at risk: expansive",
    "truncated",
    "vanishing",
    "at risk: fading",
    "unknown",
    "healthy",
]
Tier = Literal["step", "values", "structure"]
Severity = Literal["error", "warning", "info"]
MemorySource = Literal["declared", "estimated", "assumed", "unknown"]
Basis = Literal["real data", "given inputs", "inferred inputs", "site alone"]
Outcome = Literal["planned", "applied", "taken back"]
OptimizerKind = Literal["sgd", "adam", "adamw", "other", "none"]
Dose = dict[str, float | int | str | bool | None]

TIERS: tuple[Tier, ...] = ("step", "values", "structure")
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")
LEVELS: tuple[Level, ...] = get_args(Level)


class Record(BaseModel):
    """A frozen record; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(Record):
    """A rule met by readings, with the numbers that met it and one cure."""

    code: str
    name: str
    severity: Severity
    path: str | None
    location: str | None
    message: str
    evidence: dict[str, str]
    cure: str
    fix: Tier | Literal["manual", "none"]
    refs: tuple[str, ...] = ()


class Change(Record):
    """One remedy at one place: planned, applied, or taken back after measuring again."""

    remedy: str
    path: str | None
    tier: Tier
    dose: Dose
    scenario: str
    why: str
    outcome: Outcome = "planned"
    result: str = ""


class Plan(Record):
    """The ordered changes as plain data; can be saved, read and replayed."""

    schema_version: int = SCHEMA
    changes: tuple[Change, ...] = ()

    def __iter__(self) -> Iterator[Change]:  # type: ignore[override]  # a plan is its changes
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def to_dict(self) -> dict[str, object]:
        return self.model_dump(mode="json")


def near_miss(name: str, known: list[str]) -> str:
    """The half sentence that helps with a wrong name: nearest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(repr(k) for k in sorted(known)) or 'none'}."
