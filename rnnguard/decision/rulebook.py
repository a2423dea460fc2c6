"""The rule files, read and checked: which readings make which finding, which call for what."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

import rnnguard
from rnnguard.decision.conditions import TEXTS, VOCABULARY, When
from rnnguard.decision.rulefile import read_table, rows_of
from rnnguard.decision.settings import Settings, holds_settings, read_settings
from rnnguard.errors import RulesError
from rnnguard.records import SCHEMA, Record, Severity, Tier, near_miss

# A remedy's dose under this key is a word of its own and no reading.
FORM = "by"
Code = Field(pattern=r"^RG\d{3}$")
Name = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")


def _several(tables: Any) -> Any:
    return (tables,) if isinstance(tables, Mapping) else tables


AnyOf = Annotated[tuple[When, ...], BeforeValidator(_several)]


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
    Where `warning_when` or `error_when` hold too, one table or any of several, the severity rises
    to that.
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
    warning_when: AnyOf = ()
    error_when: AnyOf = ()
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
    `rivals`: rows whose remedies a trial compares with those of this one; a row that is
    `only_rival` is never chosen without one.
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
    rivals: tuple[str, ...] = ()
    only_rival: bool = False
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
    """All rules and scenarios in force, in their order; `settings` say which are heard of."""

    rules: tuple[Rule, ...]
    scenarios: tuple[Scenario, ...]
    settings: Settings = Settings()

    def rule(self, code_or_name: str) -> Rule:
        """The rule with this code or name; RulesError with the nearest name otherwise."""
        for rule in self.rules:
            if code_or_name in (rule.code, rule.name):
                return rule
        names = [n for rule in self.rules for n in (rule.code, rule.name)]
        raise _unknown("rule", code_or_name, names)

    def scenario(self, name: str) -> Scenario:
        """The scenario with this id; RulesError with the nearest one otherwise."""
        for scenario in self.scenarios:
            if scenario.id == name:
                return scenario
        raise _unknown("scenario", name, [scenario.id for scenario in self.scenarios])

    def ranked(self, scope: str) -> list[Scenario]:
        """The scenarios of a scope that can be chosen, those that win first."""
        rows = (row for row in self.scenarios if row.scope == scope and not row.only_rival)
        return sorted(rows, key=lambda row: row.priority)

    def check_remedies(self, known: Sequence[str]) -> None:
        """Raises RulesError when a scenario names a remedy or a rival that does not exist."""
        for scenario in self.scenarios:
            for rival in scenario.rivals:
                self.scenario(rival)
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


def load_rulebook(extra: Sequence[str | Path | Settings] = ()) -> Rulebook:
    """The built-in rules, extended or overridden by what is given, in that order.

    Takes folders of rule files, single rule files, and settings with what they name: a
    pyproject.toml, a rnnguard.toml or Settings. Raises RulesError (RG913, RG914) that names file,
    row and the nearest right word.
    """
    paths, settings = [rules_folder()], Settings()
    for item in extra:
        if isinstance(item, Settings) or (Path(item).is_file() and holds_settings(Path(item))):
            own = item if isinstance(item, Settings) else read_settings(item)
            paths += map(Path, own.rules)
            settings = settings.followed_by(own)
        else:
            paths.append(Path(item))
    rules: dict[str, Rule] = {}
    scenarios: dict[str, Scenario] = {}
    for path in paths:
        found_rules, found_scenarios = _rows(path)
        rules |= {rule.code: rule for rule in found_rules}
        added = {scenario.id: scenario for scenario in found_scenarios}
        # A user's rows come first, since the first match wins.
        scenarios = added | {k: v for k, v in scenarios.items() if k not in added}
    settings.check_known((rule.code, rule.name) for rule in rules.values())
    book = Rulebook(rules=tuple(rules.values()), scenarios=tuple(scenarios.values()))
    return _tuned(book, settings)


def _tuned(book: Rulebook, settings: Settings) -> Rulebook:
    """The rules with the thresholds and severities that the settings fix."""
    cells = {_row(book, word, settings).code: when for word, when in settings.thresholds.items()}
    rules = []
    for rule in book.rules:
        if rule.code in cells:
            rule = _with_thresholds(rule, cells[rule.code], settings)
        severity = settings.severity_of(rule.code, rule.name)
        if severity not in (None, "off"):
            fixed = {"severity": severity, "warning_when": (), "error_when": ()}
            rule = rule.model_copy(update=fixed)
        rules.append(rule)
    return book.model_copy(update={"rules": tuple(rules), "settings": settings})


def _row(book: Rulebook, word: str, settings: Settings) -> Rule:
    try:
        return book.rule(word)
    except RulesError as error:
        place = settings.place_of("thresholds")
        raise RulesError.of("RG914", place, error.fact, error.cure) from error


def _with_thresholds(rule: Rule, wanted: When, settings: Settings) -> Rule:
    stated = rule.when.cells if rule.when is not None else {}
    for name in wanted.cells:
        if name not in stated:
            fact = f"{rule.code} has no cell for '{name}';"
            place = settings.place_of("thresholds")
            raise RulesError.of("RG914", place, fact, near_miss(name, list(stated)))
    cells = {name: wanted.cells.get(name, cell) for name, cell in stated.items()}
    return rule.model_copy(update={"when": When.model_construct(cells=cells)})


def _rows(path: Path) -> tuple[list[Rule], list[Scenario]]:
    """The rules and scenarios of a folder, or of one file, which may hold both."""
    if path.is_file():
        table, both = read_table(path), ("rule", "scenario")
        rules = rows_of(table, path, "rule", Rule, both)
        return rules, rows_of(table, path, "scenario", Scenario, both)
    files = path / "rules.toml", path / "scenarios.toml"
    if not any(file.is_file() for file in files):
        here = "the folder holds no rule file." if path.is_dir() else "there is no such file."
        cure = "Put rules.toml or scenarios.toml there, or leave the folder out."
        raise RulesError.of("RG913", str(path), here, cure if path.is_dir() else "Check the path.")
    first, second = (read_table(f) if f.is_file() else {"schema": SCHEMA} for f in files)
    return (
        rows_of(first, files[0], "rule", Rule, ("rule",)),
        rows_of(second, files[1], "scenario", Scenario, ("scenario",)),
    )
