"""The settings in force: those of a file, under those of the command line; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rnnguard.decision.settings import (
    COMMAND_LINE,
    KEYS,
    OWN_FILE,
    SHARED_FILE,
    Settings,
    kebab,
    read_settings,
    section_of,
)
from rnnguard.errors import RulesError

DEFAULTS = {"seed": 0, "fail_on": "error", "select": ("ALL",)}


def find(folder: Path, *, above: bool = True) -> Path | None:
    """The file of settings in a folder, or in the nearest one above it.

    rnnguard.toml goes before a pyproject.toml, which counts only with [tool.rnnguard].
    """
    folder = folder.resolve()
    for place in (folder, *(folder.parents if above else ())):
        if (place / OWN_FILE).is_file():
            return place / OWN_FILE
        shared = place / SHARED_FILE
        if shared.is_file() and section_of(shared) is not None:
            return shared
    return None


def effective(
    given: Mapping[str, Any] | None = None, *, file: Path | None = None, isolated: bool = False
) -> Settings:
    """The settings of `file`, or of the nearest one, followed by what was given on top.

    given: values by key, as from a command line; None and empty ones were not given.
    isolated: no file is looked for.
    """
    if file is not None and isolated:
        fact = "`--config` names a file and `--isolated` wants none."
        raise RulesError.of("RG913", "", fact, "Leave one of them out.")
    known = file if file is not None or isolated else find(Path())
    settings = read_settings(_shown(known)) if known is not None else Settings()
    values = {key: value for key, value in (given or {}).items() if value not in (None, (), [])}
    lists = {key: tuple(map(str, v)) for key, v in values.items() if isinstance(v, list | tuple)}
    origins = dict.fromkeys(values, COMMAND_LINE)
    return settings.followed_by(Settings(**values | lists, origins=origins))


def home_of(settings: Settings, key: str) -> Path | None:
    """The folder of the file that a value comes from; None for any other value."""
    origin = settings.origins.get(key, COMMAND_LINE)
    return None if origin == COMMAND_LINE else Path(origin).parent


def told(settings: Settings) -> str:
    """Every key with its value and where it was set."""
    rows = [(kebab(key), _value(settings, key), settings.origins.get(key, "default"))
            for key in KEYS]  # fmt: skip
    wide = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{k:{wide[0]}}  {v:{min(wide[1], 44)}}  {origin}" for k, v, origin in rows)


def _value(settings: Settings, key: str) -> str:
    value = getattr(settings, key)
    if key == "thresholds":
        value = {rule: {n: str(c) for n, c in when.cells.items()} for rule, when in value.items()}
    value = value or DEFAULTS.get(key, value)
    return json.dumps(value) if value not in (None, (), {}) else "-"


def _shown(file: Path) -> Path:
    """As seen from the working directory, where it lies below that."""
    here = Path.cwd()
    return file.relative_to(here) if file.is_relative_to(here) else file
