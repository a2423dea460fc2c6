"""The cells of a decision table: intervals and sets over the readings, no expressions."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, model_validator

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Record, near_miss

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_COMPARISON = re.compile(rf"\s*(<=|>=|<|>)\s*({_NUMBER})\s*", re.IGNORECASE)
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*", re.IGNORECASE)


class Interval(Record):
    """A number's allowed range; closed unless said otherwise."""

    low: float = float("-inf")
    high: float = float("inf")
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: Any) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return bool(above and below)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"= {self.low:g}"
        if self.high == float("inf"):
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        if self.low == float("-inf"):
            return f"{'<' if self.high_open else '<='} {self.high:g}"
        return f"{self.low:g}..{self.high:g}"


class OneOf(Record):
    """The allowed labels of a reading."""

    values: frozenset[str | bool]

    def holds(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "= " + " or ".join(sorted(map(str, self.values)))


def _kind(annotation: Any) -> Any:
    """The bare type of a reading: bool, float or its labels; None when rules cannot use it."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        return _kind(inner[0]) if len(inner) == 1 else None
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if annotation is bool:
        return bool
    return float if annotation in (int, float) else None


def _vocabulary(record: type[Record]) -> dict[str, Any]:
    kinds = {name: _kind(hint) for name, hint in get_type_hints(record).items()}
    return {n: k for n, k in kinds.items() if k is not None and n in record.model_fields}


def _texts(record: type[Record]) -> set[str]:
    hints = get_type_hints(record)
    return {name for name in record.model_fields if hints[name] in (str, str | None)}


SITE_VOCABULARY = _vocabulary(SiteReadings)
RUN_VOCABULARY = _vocabulary(RunReadings)
VOCABULARY = SITE_VOCABULARY | RUN_VOCABULARY
# What a sentence may name besides: readings of free text, which no cell can state anything about.
TEXTS = _texts(SiteReadings) | _texts(RunReadings)


def _interval(text: Any) -> Interval:
    if isinstance(text, int | float) and not isinstance(text, bool):
        return Interval(low=text, high=text)
    if isinstance(text, str):
        if found := _COMPARISON.fullmatch(text):
            sign, bound = found[1], float(found[2])
            if sign[0] == ">":
                return Interval(low=bound, low_open=sign == ">")
            return Interval(high=bound, high_open=sign == "<")
        if found := _RANGE.fullmatch(text):
            return Interval(low=float(found[1]), high=float(found[2]))
    raise ValueError("write a number, '< 0.9', '>= 3' or '0.1..0.9'")


def _labels(name: str, allowed: tuple[Any, ...], cell: Any) -> OneOf:
    values = cell if isinstance(cell, list) else [cell]
    for value in values:
        # 1 == True in Python, so the type is compared too.
        if not any(value == a and type(value) is type(a) for a in allowed):
            expected = ", ".join(map(str, allowed))
            raise ValueError(f"{value!r} is not a value of reading '{name}'; expected {expected}")
    return OneOf(values=frozenset(values))


def parse_cell(name: str, cell: Any) -> Interval | OneOf:
    """The condition that one table cell states about the reading `name`."""
    if name in TEXTS:
        raise ValueError(f"'{name}' is text, which only a message may name")
    if name not in VOCABULARY:
        raise ValueError(f"'{name}' is not a reading; {near_miss(name, list(VOCABULARY))}")
    kind = VOCABULARY[name]
    if kind is float:
        return _interval(cell)
    return _labels(name, (True, False) if kind is bool else kind, cell)


class When(BaseModel):
    """All cells of one row; holds when every one of them holds."""

    model_config = ConfigDict(frozen=True)

    cells: dict[str, Interval | OneOf]

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, table: Any) -> Any:
        if not isinstance(table, Mapping):
            raise ValueError("write a table such as { cell = ['lstm'], decay_per_step = '< 0.9' }")
        parsed = {name: parse_cell(name, cell) for name, cell in table.items()}
        # Explanations follow the order of the readings, not that of the file.
        return {"cells": {name: parsed[name] for name in VOCABULARY if name in parsed}}

    @property
    def concerns_site(self) -> bool:
        return any(name in SITE_VOCABULARY for name in self.cells)

    def holds(self, readings: Mapping[str, Any]) -> bool:
        """Whether every cell holds; a reading that was not taken never holds."""
        return all(
            readings.get(name) is not None and cell.holds(readings[name])
            for name, cell in self.cells.items()
        )

    def explain(self, readings: Mapping[str, Any]) -> str:
        """Each observed reading beside what the row wanted of it."""
        return ", ".join(f"{name} {text}" for name, text in self.evidence(readings).items())

    def evidence(self, readings: Mapping[str, Any]) -> dict[str, str]:
        """Per reading what was observed, and for a number the range that was wanted."""
        return {
            name: f"= {display(readings.get(name))}"
            if isinstance(cell, OneOf)
            else f"{display(readings.get(name))} ({cell})"
            for name, cell in self.cells.items()
        }


def display(value: Any) -> str:
    """A reading as people read it: four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def vocabulary_values(*records: Record | None) -> dict[str, Any]:
    """The readings that rules may name, taken from the given records."""
    return {
        name: getattr(record, name)
        for record in records
        if record is not None
        for name in type(record).model_fields
        if name in VOCABULARY or name in TEXTS
    }
