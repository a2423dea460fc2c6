"""The frozen records that travel down the flow, and the words they are made of; no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from rnnguard.errors import RefusedError
from rnnguard.files import write_text

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
Basis = Literal["real data", "given inputs", "inferred inputs", "site alone", "not run"]
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
    """One remedy at one place: planned, applied, or taken back after measuring again.

    What is left out is as for a change that somebody asks for by hand.
    """

    remedy: str
    path: str | None
    tier: Tier
    dose: Dose = {}
    scenario: str = "by hand"
    why: str = "Asked for by hand."
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

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as text; also written to `path` when given, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """The plan that a file holds, or a text of JSON; nothing in it is run as code.

        Raises RefusedError (RG924) where it cannot be read or is no plan of this schema.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        where = "" if is_text else str(source)
        try:
            text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
            data = json.loads(text, parse_constant=_no_number)
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else str(error)
            _refuse_plan(where, f"the plan cannot be read ({said}).")
        return cls.from_dict(data, where)

    @classmethod
    def from_dict(cls, data: Any, where: str = "") -> Self:
        """The plan that `to_dict` gave; raises RefusedError (RG924) for anything else."""
        if not isinstance(data, dict):
            _refuse_plan(where, f"a plan is a table of changes and not a {type(data).__name__}.")
        schema = data.get("schema_version", SCHEMA)
        if schema != SCHEMA or isinstance(schema, bool):
            fact = f"the plan has schema_version {schema!r}; this rnnguard reads {SCHEMA}."
            cure = "Make the plan anew, or install the rnnguard that made it."
            raise RefusedError.of("RG924", where, fact, cure)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the plan"
            _refuse_plan(where, f"{place} is wrong in the plan: {first['msg']}.")


def _refuse_plan(where: str, fact: str) -> NoReturn:
    cure = "Save one with `report.plan.to_json(path)`."
    raise RefusedError.of("RG924", where, fact, cure)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def near_miss(name: str, known: list[str]) -> str:
    """The half sentence that helps with a wrong name: nearest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(repr(k) for k in sorted(known)) or 'none'}."
