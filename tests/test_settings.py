"""Settings: what is refused and in which words, which word decides, how two of them add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rnnguard.decision.settings import Settings, read_settings
from rnnguard.errors import RulesError

PAIRS = [("RG401", "vanishing-through-time"), ("RG402", "exploding-through-time")]
EVERY_KEY = """
[project]
name = "x"
[tool.rnnguard]
target = "net:build_model"
inputs = "net:sample"
data = "net:batches"
loss = "torch.nn:MSELoss"
optimizer = "net:make_optimizer"
step = "net:step"
train-step = "net:train_step"
trial = 20
memory = 150
seed = 3
select = ["RG"]
extend-select = ["RG401"]
ignore = ["RG4", "no-clipping"]
rules = ["rules/team.toml"]
fail-on = "warning"
[tool.rnnguard.severity]
RG407 = "error"
no-clipping = "off"
[tool.rnnguard.per-site-ignores]
"decoder.*" = ["RG401"]
[tool.rnnguard.thresholds]
RG107 = { saturation = "> 0.9" }
"""


def written(folder: Path, text: str, name: str = "pyproject.toml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def facts(file: Path) -> list[str]:
    """What is said of the file, without the way to it."""
    with pytest.raises(RulesError) as caught:
        read_settings(file)
    assert {reason.code for reason in caught.value.reasons} == {"RG913"}
    cure = " Correct the settings. (RG913)"
    return [str(r).replace(f"{file.parent}/", "").removesuffix(cure) for r in caught.value.reasons]


def test_every_key_is_read(tmp_path: Path) -> None:
    file = written(tmp_path, EVERY_KEY)
    found = read_settings(file)
    assert (found.target, found.memory, found.seed) == ("net:build_model", 150, 3)
    assert found.ignore == ("RG4", "no-clipping")
    assert found.severity == {"RG407": "error", "no-clipping": "off"}
    assert found.per_site_ignores == {"decoder.*": ("RG401",)}
    assert str(found.thresholds["RG107"].cells["saturation"]) == "> 0.9"
    assert found.rules == (str(tmp_path / "rules" / "team.toml"),)
    assert set(found.origins.values()) == {str(file)}
    assert found.origins.keys() == Settings.model_fields.keys() - {"origins"}


def test_an_own_file_needs_no_section(tmp_path: Path) -> None:
    own = EVERY_KEY.partition("[tool.rnnguard]")[2].replace("tool.rnnguard.", "")
    found = read_settings(written(tmp_path, own, "rnnguard.toml"))
    shared = read_settings(written(tmp_path, EVERY_KEY))
    assert found.model_copy(update={"origins": {}}) == shared.model_copy(update={"origins": {}})


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ('selct = ["RG4"]', "`pyproject.toml`: 'selct' is not a key; did you mean 'select'?"),
        (
            'extend_select = ["RG4"]',
            "`pyproject.toml`: 'extend_select' is not a key; did you mean 'extend-select'?",
        ),
        ("origins = {}", "`pyproject.toml`: 'origins' is not a key;"),
        (
            'memory = "many"',
            "`pyproject.toml memory`: Input should be a valid integer.",
        ),
        ("memory = 0", "`pyproject.toml memory`: Input should be greater than or equal to 1."),
        ("memory = true", "`pyproject.toml memory`: Input should be a valid integer."),
        ("target = 3", "`pyproject.toml target`: Input should be a valid string."),
        (
            'extend-select = "RG4"',
            "`pyproject.toml extend-select`: write a list such as ['RG201', 'no-clipping'].",
        ),
        (
            'fail-on = "fatal"',
            "`pyproject.toml fail-on`: Input should be 'error', 'warning' or 'info'.",
        ),
        ('severity = "error"', "`pyproject.toml severity`: Input should be a valid dictionary."),
        ('severity = { RG4 = "loud" }', "`pyproject.toml severity.RG4`: Input should be"),
        (
            'per-site-ignores = { "decoder.*" = "RG4" }',
            "`pyproject.toml per-site-ignores.decoder.*`: write a list such as",
        ),
        (
            'thresholds = { RG107 = { saturatoin = "> 1" } }',
            "`pyproject.toml thresholds.RG107`: 'saturatoin' is not a reading; did you mean "
            "'saturation'?",
        ),
        (
            'thresholds = { RG107 = { saturation = "=> 1" } }',
            "`pyproject.toml thresholds.RG107`: write a number, '< 0.9', '>= 3' or '0.1..0.9'.",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, line: str, fact: str) -> None:
    (said,) = facts(written(tmp_path, f"[tool.rnnguard]\n{line}\n"))
    assert said.startswith(fact)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, 'memry = 3\nseed = "x"\nignore = 4\n', "rnnguard.toml")
    assert len(facts(file)) == 3


@pytest.mark.parametrize("text", ["[project]\nname = 'x'\n", "[tool.ruff]\n", "tool = 3\n"])
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RulesError, match=r"there is no \[tool.rnnguard\] in it"):
        read_settings(written(tmp_path, text))


@pytest.mark.parametrize(
    ("fields", "path", "heard"),
    [
        ({}, None, True),
        ({"select": ("RG2",)}, None, False),
        ({"select": ("RG4",)}, None, True),
        ({"select": ("vanishing-through-time",)}, None, True),
        ({"ignore": ("ALL",)}, None, False),
        ({"ignore": ("RG401",)}, None, False),
        ({"ignore": ("RG4",)}, None, False),
        # The closest word decides, and of two alike `ignore`.
        ({"select": ("RG401",), "ignore": ("RG4",)}, None, True),
        ({"select": ("RG4",), "ignore": ("vanishing-through-time",)}, None, False),
        ({"select": ("RG401",), "ignore": ("RG401",)}, None, False),
        ({"select": ("RG401",), "ignore": ("vanishing-through-time",)}, None, False),
        ({"ignore": ("RG4",), "extend_select": ("RG40",)}, None, True),
        ({"select": ("RG2",), "extend_select": ("RG401",)}, None, True),
        ({"severity": {"RG401": "off"}}, None, False),
        ({"severity": {"RG4": "off", "RG401": "info"}}, None, True),
        ({"severity": {"RG4": "info", "vanishing-through-time": "off"}}, None, False),
        ({"per_site_ignores": {"decoder.*": ("RG4",)}}, "decoder.rnn", False),
        ({"per_site_ignores": {"decoder.*": ("RG4",)}}, "decoder", True),
        ({"per_site_ignores": {"decoder.*": ("RG2",)}}, "decoder.rnn", True),
        ({"per_site_ignores": {"*": ("RG4",)}}, "", False),
        ({"per_site_ignores": {"*": ("RG4",)}}, None, True),
    ],
)
def test_which_findings_are_heard_of(fields: dict[str, Any], path: str | None, heard: bool) -> None:
    assert Settings(**fields).wants("RG401", "vanishing-through-time", path) is heard


def test_the_closest_word_gives_the_severity() -> None:
    found = Settings(severity={"ALL": "info", "RG4": "warning", "RG401": "error"})
    assert found.severity_of(*PAIRS[0]) == "error"
    assert found.severity_of(*PAIRS[1]) == "warning"
    assert found.severity_of("RG201", "bidirectional-last-step") == "info"
    assert Settings().severity_of(*PAIRS[0]) is None


def test_a_later_value_wins_and_lists_go_on() -> None:
    file = Settings(
        memory=5, ignore=("RG4",), rules=("a",), severity={"RG2": "off", "RG3": "error"},
        origins={"memory": "f", "ignore": "f"},
    )  # fmt: skip
    said = Settings(memory=9, ignore=("RG5",), rules=("b",), origins={"memory": "c", "ignore": "c"})
    both = file.followed_by(said)
    assert (both.memory, both.ignore, both.rules) == (9, ("RG4", "RG5"), ("a", "b"))
    assert both.severity == file.severity
    assert both.origins == {"memory": "c", "ignore": "f, c"}


def test_a_later_selection_starts_afresh() -> None:
    file = Settings(ignore=("RG401",), extend_select=("RG2",), severity={"RG402": "off"})
    both = file.followed_by(Settings(select=("RG4",)))
    assert both.wants(*PAIRS[0]) and both.wants(*PAIRS[1])
    assert not both.wants("RG201", "bidirectional-last-step")
    assert file.followed_by(Settings(extend_select=("RG4",))).ignore == ("RG401",)


def test_nothing_on_top_changes_nothing() -> None:
    found = Settings(memory=5, select=("RG4",), fail_on="info")
    assert found.followed_by(Settings()) == found
    assert Settings().followed_by(found) == found


def test_unknown_words_are_named_with_place_and_nearest() -> None:
    found = Settings(
        select=("RG4", "RG412"), severity={"RG402": "off", "vanishing-thru-time": "off"},
        per_site_ignores={"*": ("exploding-thru-time",)},
        origins={"select": "pyproject.toml", "per_site_ignores": "pyproject.toml"},
    )  # fmt: skip
    with pytest.raises(RulesError) as caught:
        found.check_known(PAIRS)
    assert [str(reason) for reason in caught.value.reasons] == [
        "`pyproject.toml select`: 'RG412' is not a known rule; did you mean 'RG402'? (RG914)",
        "'vanishing-thru-time' is not a known rule; did you mean 'vanishing-through-time'? (RG914)",
        "`pyproject.toml per-site-ignores`: 'exploding-thru-time' is not a known rule; did you "
        "mean 'exploding-through-time'? (RG914)",
    ]
