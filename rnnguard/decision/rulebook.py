"""The rule files, read and checked: which readings make which finding, which call for what."""

from __future__ import annotations

import string
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

import rnnguard
from rnnguard.decision.conditions import TEXTS, VOCABULARY, When
from rnnguard.errors import Refusal, RulesError
from rnnguard.records import SCHEMA, Record, Severity, Tier, near_miss

# A remedy's dose under this key is a word of its own and no reading.
FORM = "by"
Code = Field(pattern=r"^RG\d{3}$")
Name = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")


def _check_template(text: str) -> str:
    """Every {name} in a sentence must be a reading, or formatting would fail at the user's."""
    for _, name, _, _ in string.Formatter().parse(text):
        if name is not None and name not in VOCABULARY and name not in TEXTS:
            raise ValueError(f"'{name}' is not a reading; {near_miss(name, list(VOCABULARY))}")
    return text


class Row(Record):
    """A row of a rule file; a wrong key is named together with the nearest right one."""

    @model_validator(mode="before")
    @classmethod
    def _near_miss(cls, row: Any) -> Any:
        for key in row:
            if key not in cls.model_fields:
                raise ValueError(f"'{key}' is not a key; {near_miss(key, list(cls.model_fields))}")
        return row


class Rule(Row):
    """Which readings make which finding; rows without `when` are raised by the code itself.

    `how` it is traced or measured, by `method`. `example` and `twin` are Python that makes the
    arguments of an audit by name: the one has the finding, the other is the same made healthy.
    Where `warning_when` or `error_when` hold too, the severity rises to that.
    """

    code: str = Code
    name: str = Name
    severity: Severity
    stage: Literal["measured", "audit", "refusal"] = "measured"
    what: str
    why: str
    method: Literal["static", "probe", "recorded step"] = "probe"
    how: str = ""
    example: str = ""
    twin: str = ""
    message: str = ""
    cure: str
    fix: Literal[Tier, "manual", "none"]
    when: When | None = None
    warning_when: When | None = None
    error_when: When | None = None
    implied_by: tuple[str, ...] = ()
    refs: tuple[str, ...] = ()

    _template = field_validator("message")(_check_template)

    @model_validator(mode="after")
    def _complete(self) -> Rule:
        if self.stage == "measured" and (self.when is None or not self.message):
            raise ValueError("a measured rule needs 'when' and 'message'")
        return self


class Scenario(Row):
    """Which situation calls for which combination of remedies, with doses, reason and source.

    Of each scope the matching row of the lowest `priority` wins, of equal ones the first; built-in
    rows have 10 and more. `advice` is said in the report and never done. At a site there is one
    for its recurrence, one for its input, one for its structure (on the readings that the changed
    values then give), one for the depth of its layers and one for its output; and there is one for
    the run. A dose is a number or the name of a reading, and `by` the name of a form of the remedy.
    """

    id: str = Name
    priority: int = 0
    scope: Literal["recurrence", "input", "structure", "depth", "output", "run"] = "recurrence"
    codes: tuple[str, ...] = ()
    when: When
    apply: tuple[str, ...]
    dose: dict[str, dict[str, float | int | bool | str]] = Field(default={})
    why: str
    advice: str = ""
    refs: tuple[str, ...]

    _template = field_validator("why", "advice")(_check_template)

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        for remedy, parameters in self.dose.items():
            if remedy not in self.apply:
                raise ValueError(f"dose of '{remedy}', which the row does not apply")
            for key, value in parameters.items():
                if isinstance(value, str) and key != FORM and value not in VOCABULARY:
                    hint = near_miss(value, list(VOCABULARY))
                    raise ValueError(f"'{value}' is not a reading; {hint}")
        if self.scope == "run" and self.when.concerns_site:
            raise ValueError("a row of scope 'run' may name readings of the run only")
        if not self.refs:
            raise ValueError("a scenario cites a paper or a row of the evidence table")
        return self


class Rulebook(Record):
    """All rules and scenarios in force, in their order."""

    rules: tuple[Rule, ...]
    scenarios: tuple[Scenario, ...]

    def rule(self, code_or_name: str) -> Rule:
        """The rule with this code or name; RulesError with the nearest name otherwise."""
        for rule in self.rules:
            if code_or_name in (rule.code, rule.name):
                return rule
        names = [n for rule in self.rules for n in (rule.code, rule.name)]
        raise _unknown("rule", code_or_name, names)

    def ranked(self, scope: str) -> list[Scenario]:
        """The scenarios of a scope, those that win first."""
        return sorted((s for s in self.scenarios if s.scope == scope), key=lambda s: s.priority)

    def check_remedies(self, known: Sequence[str]) -> None:
        """Raises RulesError when a scenario applies a remedy that does not exist."""
        for scenario in self.scenarios:
            for remedy in scenario.apply:
                if remedy not in known:
                    raise _unknown(f"remedy (scenario {scenario.id})", remedy, list(known))


def _unknown(what: str, name: str, known: list[str]) -> RulesError:
    near = near_miss(name, known)
    return RulesError.of("RG914", "", f"{name!r} is not a known {what};", near)


def rules_folder() -> Path:
    """Where the built-in rule files lie: inside an installed package, or beside a checkout."""
    package = Path(rnnguard.__file__).parent
    candidates = [package / "rules", package.parent / "rules"]
    for folder in candidates:
        if (folder / "scenarios.toml").is_file():
            return folder
    tried = " and ".join(map(str, candidates))
    raise RulesError.of("RG913", "rules", f"no rule files in {tried}.", "Install rnnguard again.")


def load_rulebook(extra: Sequence[str | Path] = ()) -> Rulebook:
    """The built-in rules, extended or overridden by the given folders, in that order.

    Raises RulesError (RG913) that names file, row and the nearest right word.
    """
    rules: dict[str, Rule] = {}
    scenarios: dict[str, Scenario] = {}
    for folder in [rules_folder(), *map(Path, extra)]:
        found_rules = _read(folder / "rules.toml", "rule", Rule)
        found_scenarios = _read(folder / "scenarios.toml", "scenario", Scenario)
        if found_rules is None and found_scenarios is None:
            cure = "Put rules.toml or scenarios.toml there, or leave the folder out."
            raise RulesError.of("RG913", str(folder), "the folder holds no rule file.", cure)
        rules |= {rule.code: rule for rule in found_rules or ()}
        added = {scenario.id: scenario for scenario in found_scenarios or ()}
        # A user's rows come first, since the first match wins.
        scenarios = added | {k: v for k, v in scenarios.items() if k not in added}
    return Rulebook(rules=tuple(rules.values()), scenarios=tuple(scenarios.values()))


_RowType = TypeVar("_RowType", bound=Row)


def _read(file: Path, kind: str, row_type: type[_RowType]) -> list[_RowType] | None:
    if not file.is_file():
        return None
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RulesError.of("RG913", str(file), f"not TOML: {error}.", "Correct it.") from error
    reasons = [_wrong(str(file), f"'{k}' is not a key; {near_miss(k, ['schema', kind])}")
               for k in table if k not in ("schema", kind)]  # fmt: skip
    if table.get("schema") != SCHEMA:
        reasons.append(_wrong(str(file), f"schema is {table.get('schema')!r}, not {SCHEMA}."))
    rows: list[_RowType] = []
    for number, row in enumerate(table.get(kind, []), start=1):
        label = row.get("code") or row.get("id") or f"row {number}"
        try:
            rows.append(row_type.model_validate(row))
        except ValidationError as error:
            reasons += [_wrong(f"{file} {kind} {label}", text) for text in _sentences(error)]
    identities = [getattr(row, "code", None) or getattr(row, "id", None) for row in rows]
    reasons += [_wrong(f"{file} {kind} {name}", "the row stands twice.")
                for name in {n for n in identities if identities.count(n) > 1}]  # fmt: skip
    if reasons:
        raise RulesError(*reasons)
    return rows


def _wrong(place: str, fact: str) -> Refusal:
    return Refusal("RG913", place, fact, "Correct the rule file.")


def _sentences(error: ValidationError) -> list[str]:
    """pydantic's errors as facts: where in the row, what is wrong."""
    sentences = []
    for entry in error.errors():
        place = ".".join(map(str, entry["loc"]))
        text = entry["msg"].removeprefix("Value error, ")
        text = text if text.endswith((".", "?")) else f"{text}."
        sentences.append(f"{place}: {text}" if place else text)
    return sentences
