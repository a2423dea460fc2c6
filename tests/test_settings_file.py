"""The settings in force: which file is found, what the command line adds, what is told of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rnnguard.decision.settings import Settings
from rnnguard.errors import RulesError
from rnnguard.settings_file import effective, find, home_of, told

SHARED = "[tool.rnnguard]\nmemory = 5\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory two folders deep."""
    folder = tmp_path / "project" / "inner"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def put(file: Path, text: str = SHARED) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def test_the_nearest_file_is_found(here: Path) -> None:
    assert find(here) is None
    above = put(here.parent / "pyproject.toml")
    assert find(here) == above
    assert find(here, above=False) is None
    put(here / "pyproject.toml", "[tool.ruff]\n")
    assert find(here) == above
    own = put(here / "pyproject.toml")
    assert find(here) == own
    assert find(here.parent) == above


def test_an_own_file_goes_first(here: Path) -> None:
    put(here / "pyproject.toml")
    own = put(here / "rnnguard.toml", "memory = 7\n")
    assert find(here) == own
    assert effective().memory == 7


def test_a_file_that_is_no_toml_is_said(here: Path) -> None:
    put(here / "pyproject.toml", "[tool.rnn")
    with pytest.raises(RulesError, match="not TOML"):
        effective()
    assert effective(isolated=True) == Settings()


def test_the_command_line_wins(here: Path) -> None:
    put(here / "pyproject.toml", SHARED + 'ignore = ["RG4"]\nseed = 2\n')
    found = effective({"memory": 9, "seed": 0, "ignore": ["RG5"], "select": [], "target": None})
    assert (found.memory, found.seed, found.ignore) == (9, 0, ("RG4", "RG5"))
    assert found.origins == {
        "memory": "command line",
        "seed": "command line",
        "ignore": "pyproject.toml, command line",
    }
    assert effective({"seed": 1}, isolated=True).memory is None


def test_a_named_file_is_taken_instead(here: Path) -> None:
    put(here / "pyproject.toml")
    other = put(here / "strict.toml", "[tool.rnnguard]\nmemory = 50\n")
    assert effective(file=other).memory == 50
    with pytest.raises(RulesError, match="wants none"):
        effective(file=other, isolated=True)


def test_values_of_a_file_are_at_home_in_its_folder(here: Path) -> None:
    put(here.parent / "pyproject.toml", SHARED + 'target = "net:model"\n')
    found = effective({"loss": "torch.nn:MSELoss"})
    home = home_of(found, "target")
    assert home is not None and home.resolve() == here.parent
    assert home_of(found, "loss") is None
    assert home_of(found, "data") is None


def test_every_key_is_told_with_its_origin(here: Path) -> None:
    text = 'select = ["RG4"]\nthresholds = { RG107 = { saturation = "> 0.9" } }\n'
    put(here / "pyproject.toml", SHARED + text)
    lines = [line.split(maxsplit=1) for line in told(effective({"seed": 4})).splitlines()]
    rows = {key: " ".join(rest.split()) for key, rest in lines}
    assert list(rows)[:3] == ["target", "inputs", "data"]
    assert rows["memory"] == "5 pyproject.toml"
    assert rows["seed"] == "4 command line"
    assert rows["select"] == '["RG4"] pyproject.toml'
    assert rows["thresholds"] == '{"RG107": {"saturation": "> 0.9"}} pyproject.toml'
    assert rows["fail-on"] == '"error" default'
    assert rows["extend-select"] == "- default"
    assert len(rows) == len(Settings.model_fields) - 1
