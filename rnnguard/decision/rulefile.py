"""Tables of TOML files, read and checked row by row; what is wrong is told in sentences."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rnnguard.errors import Refusal, RulesError
from rnnguard.records import SCHEMA, near_miss

_RowType = TypeVar("_RowType", bound=BaseModel)


def read_table(file: Path) -> dict[str, Any]:
    """What a TOML file holds; RulesError (RG913) where it cannot be read or is none."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        fact = f"it cannot be read ({error.strerror})."
        raise RulesError.of("RG913", str(file), fact, "Check the path.") from error
    except ValueError as error:  # no TOML, or no text at all
        raise RulesError.of("RG913", str(file), f"not TOML: {error}.", "Correct it.") from error


def rows_of(
    table: dict[str, Any], file: Path, kind: str, row_type: type[_RowType], kinds: Sequence[str]
) -> list[_RowType]:
    """The rows of one kind; raises one RulesError (RG913) that names every wrong row.

    kinds: what else the file may hold.
    """
    known = ["schema", *kinds]
    reasons = [_wrong(str(file), f"'{key}' is not a key; {near_miss(key, known)}")
               for key in table if key not in known]  # fmt: skip
    if table.get("schema") != SCHEMA:
        reasons.append(_wrong(str(file), f"schema is {table.get('schema')!r}, not {SCHEMA}."))
    rows: list[_RowType] = []
    for number, row in enumerate(table.get(kind, []), start=1):
        label = row.get("code") or row.get("id") or f"row {number}"
        try:
            rows.append(row_type.model_validate(row))
        except ValidationError as error:
            reasons += [_wrong(f"{file} {kind} {label}", text) for text in sentences(error)]
    identities = [getattr(row, "code", None) or getattr(row, "id", None) for row in rows]
    reasons += [_wrong(f"{file} {kind} {name}", "the row stands twice.")
                for name in {n for n in identities if identities.count(n) > 1}]  # fmt: skip
    if reasons:
        raise RulesError(*reasons)
    return rows


def sentences(error: ValidationError) -> list[str]:
    """pydantic's errors as facts: where in the row, what is wrong."""
    told = []
    for entry in error.errors():
        place = ".".join(map(str, entry["loc"]))
        text = entry["msg"].removeprefix("Value error, ")
        text = text if text.endswith((".", "?")) else f"{text}."
        told.append(f"{place}: {text}" if place else text)
    return told


def _wrong(place: str, fact: str) -> Refusal:
    return Refusal("RG913", place, fact, "Correct the rule file.")
