"""What users set for themselves: which rules they want to hear of, how loud, from where on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt, ValidationError

from rnnguard.decision.conditions import When
from rnnguard.decision.rulefile import read_table, sentences
from rnnguard.errors import Refusal, RulesError
from rnnguard.records import Record, Severity, near_miss

OWN_FILE, SHARED_FILE = "rnnguard.toml", "pyproject.toml"
COMMAND_LINE = "command line"


def _listed(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("write a list such as ['RG201', 'no-clipping']")
    return value


# One literal, so that pydantic names all four in one sentence.
SetSeverity = Literal["error", "warning", "info", "off"]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class Settings(Record):
    """The keys of [tool.rnnguard], with _ for -; what is None or empty was not set.

    Rules go by code, beginning of a code ("RG4") or name. The closest word decides between
    `select` with `extend_select` and `ignore`: RG401 may be selected although RG4 is ignored.
    `severity` is fixed for a rule, or "off"; `thresholds` replace cells of a rule's `when`;
    `per_site_ignores` go by patterns of site paths. `rules` are folders and files of more rules.
    """

    target: str | None = None
    inputs: str | None = None
    data: str | None = None
    loss: str | None = None
    optimizer: str | None = None
    step: str | None = None
    train_step: str | None = None
    trial: StrictInt | None = Field(default=None, ge=0)
    memory: StrictInt | None = Field(default=None, ge=1)
    seed: StrictInt | None = None
    select: Names = ()
    extend_select: Names = ()
    ignore: Names = ()
    severity: dict[str, SetSeverity] = Field(default={})
    per_site_ignores: dict[str, Names] = Field(default={})
    thresholds: dict[str, When] = Field(default={})
    rules: Names = ()
    fail_on: Severity | None = None
    origins: dict[str, str] = Field(default={})
    """Where each value was set, by its name; not a key of a file."""

    def wants(self, code: str, name: str, path: str | None = None) -> bool:
        """Whether findings of this rule, at this site, are to be heard of."""
        if self.severity_of(code, name) == "off":
            return False
        picked = _closeness([*(self.select or ("ALL",)), *self.extend_select], code, name)
        if picked <= _closeness(self.ignore, code, name):
            return False
        return path is None or not any(
            fnmatchcase(path, pattern) and _closeness(names, code, name) >= 0
            for pattern, names in self.per_site_ignores.items()
        )

    def severity_of(self, code: str, name: str) -> SetSeverity | None:
        """The severity that was set for a rule, by the closest word for it."""
        meant = [word for word in self.severity if means(word, code, name)]
        if not meant:
            return None
        return self.severity[max(meant, key=lambda word: _closeness([word], code, name))]

    def followed_by(self, later: Settings) -> Settings:
        """Both together: the later one wins, lists and tables go on.

        A later `select` starts afresh: what was selected, ignored or off before is forgotten.
        """
        values = {key: getattr(later, key) for key in later.model_fields_set - {"origins"}}
        afresh = bool(later.select)
        for key in ("extend_select", "ignore", "rules"):
            if key == "rules" or not afresh:
                values[key] = (*getattr(self, key), *getattr(later, key))
            else:
                values[key] = getattr(later, key)
        heard = {k: v for k, v in self.severity.items() if not (afresh and v == "off")}
        values["severity"] = heard | later.severity
        values["per_site_ignores"] = self.per_site_ignores | later.per_site_ignores
        values["thresholds"] = self.thresholds | later.thresholds
        both = {k: f"{self.origins[k]}, {v}" for k, v in later.origins.items()
                if k in self.origins and values[k] != getattr(later, k)}  # fmt: skip
        values["origins"] = self.origins | later.origins | both
        return self.model_copy(update=values)

    def check_known(self, rules: Iterable[tuple[str, str]]) -> None:
        """Raises RulesError (RG914) for words that are no rule; rules: all (code, name)."""
        pairs = set(rules)
        per_site = (name for names in self.per_site_ignores.values() for name in names)
        told = {"select": self.select, "extend_select": self.extend_select, "ignore": self.ignore,
                "severity": self.severity, "per_site_ignores": per_site}  # fmt: skip
        reasons = [
            Refusal("RG914", self.place_of(key), f"{name!r} is not a known rule;", hint)
            for key, names in told.items()
            for name in names
            if (hint := unknown(name, pairs)) is not None
        ]
        if reasons:
            raise RulesError(*reasons)

    def place_of(self, key: str) -> str:
        """Where a value was set, for sentences on it; empty for one from a program."""
        return f"{self.origins[key]} {kebab(key)}" if key in self.origins else ""


KEYS = tuple(name for name in Settings.model_fields if name != "origins")


def kebab(name: str) -> str:
    """A name of this record as it stands in a file and on the command line."""
    return name.replace("_", "-")


def means(word: str, code: str, name: str) -> bool:
    """Whether a code, the beginning of one, a name or "ALL" stands for this rule."""
    prefix = word == "ALL" or (word.startswith("RG") and code.startswith(word))
    return prefix or word == name


def unknown(word: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """None for a word that stands for one of these rules (code, name), else the nearest one."""
    pairs = list(rules)
    if any(means(word, *pair) for pair in pairs):
        return None
    near = difflib.get_close_matches(word, sorted({text for pair in pairs for text in pair}), n=1)
    return f"did you mean {near[0]!r}?" if near else "`rnnguard rule` lists them all."


def _closeness(words: Iterable[str], code: str, name: str) -> int:
    """How exactly the closest of these words names a rule; -1 where none does."""
    by_length = (0 if w == "ALL" else len(code) if w == name else len(w)
                 for w in words if means(w, code, name))  # fmt: skip
    return max(by_length, default=-1)


def holds_settings(file: Path) -> bool:
    """Whether a TOML file is one of settings, and not of rules."""
    return file.name in (OWN_FILE, SHARED_FILE) or "tool" in read_table(file)


def section_of(file: Path) -> dict[str, Any] | None:
    """The table of settings in a file; None for a pyproject.toml without [tool.rnnguard]."""
    table = read_table(file)
    if file.name != SHARED_FILE and "tool" not in table:
        return table
    tools = table.get("tool")
    found = tools.get("rnnguard") if isinstance(tools, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else None


def read_settings(file: str | Path) -> Settings:
    """The settings of a pyproject.toml, a rnnguard.toml, or a file written like one of them.

    Paths in `rules` are relative to the file. Raises one RulesError (RG913) that names file and
    key for everything that is wrong.
    """
    file = Path(file)
    section = section_of(file)
    if section is None:
        fact = "there is no [tool.rnnguard] in it."
        raise RulesError.of("RG913", str(file), fact, "Add it, or name another file.")
    keys = [*map(kebab, KEYS)]
    reasons = [_wrong(f"{file}", f"'{key}' is not a key; {near_miss(key, keys)}")
               for key in section if key not in keys]  # fmt: skip
    values = {key.replace("-", "_"): section[key] for key in section if key in keys}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        for text in sentences(error):
            key, _, fact = text.partition(": ")
            head, *rest = key.split(".")
            reasons.append(_wrong(f"{file} {'.'.join([kebab(head), *rest])}", fact))
    if reasons:
        raise RulesError(*reasons)
    beside = tuple(str(file.parent / path) for path in settings.rules)
    origins = dict.fromkeys(values, str(file))
    own = {"rules": beside} if "rules" in values else {}
    return settings.model_copy(update={**own, "origins": origins})


def _wrong(place: str, fact: str) -> Refusal:
    return Refusal("RG913", place, fact, "Correct the settings.")
