"""Rule files: what is refused and in which words, how folders extend and override."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import measurement, site_readings

from rnnguard.decision.diagnosis import findings_of
from rnnguard.decision.rulebook import Rulebook, load_rulebook, rules_folder
from rnnguard.decision.settings import Settings
from rnnguard.errors import RulesError
from rnnguard.records import SEVERITIES

RULE = """
[[rule]]
code = "RG790"
name = "slow"
severity = "warning"
what = "w"
why = "w"
cure = "c"
fix = "manual"
message = "over {steps} steps"
when = { steps = "> 1000" }
"""
SCENARIO = """
[[scenario]]
id = "mine"
when = { cell = "lstm" }
apply = ["orthogonal"]
dose = { orthogonal = { gain = 1.0 } }
why = "Over {steps} steps."
refs = ["me"]
"""


@pytest.fixture(scope="module")
def built_in() -> Rulebook:
    return load_rulebook()


def written(folder: Path, name: str, text: str, schema: str = "schema = 1") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"{schema}\n{text}", encoding="utf-8")
    return folder


def facts(folder: Path) -> list[str]:
    """What is said of the folder's files, without the way to them."""
    with pytest.raises(RulesError) as caught:
        load_rulebook([folder])
    assert {reason.code for reason in caught.value.reasons} == {"RG913"}
    return [str(reason).replace(f"{folder}/", "") for reason in caught.value.reasons]


CURE = " Correct the rule file. (RG913)"


@pytest.mark.parametrize(
    ("old", "new", "fact"),
    [
        ('name = "slow"', 'nme = "slow"', "'nme' is not a key; did you mean 'name'?"),
        (
            "steps = ",
            "stps = ",
            "when: 'stps' is not a reading; did you mean 'steps'?",
        ),
        (
            '"> 1000"',
            '"=> 1000"',
            "when: write a number, '< 0.9', '>= 3' or '0.1..0.9'.",
        ),
        (
            "{steps} steps",
            "{step} steps",
            "message: 'step' is not a reading; did you mean 'steps'?",
        ),
        ('"warning"', '"fatal"', "severity: Input should be 'error', 'warning' or 'info'."),
        ("message = ", "example = ", "a measured rule needs 'when' and 'message'."),
    ],
)
def test_a_wrong_rule(tmp_path: Path, old: str, new: str, fact: str) -> None:
    assert old in RULE
    folder = written(tmp_path / "mine", "rules.toml", RULE.replace(old, new))
    assert facts(folder) == [f"`rules.toml rule RG790`: {fact}{CURE}"]


def test_a_wrong_code(tmp_path: Path) -> None:
    folder = written(tmp_path / "mine", "rules.toml", RULE.replace("RG790", "X1"))
    assert facts(folder) == [
        rf"`rules.toml rule X1`: code: String should match pattern '^RG\d{{3}}$'.{CURE}"
    ]


@pytest.mark.parametrize(
    ("old", "new", "fact"),
    [
        ("apply = ", "aply = ", "'aply' is not a key; did you mean 'apply'?"),
        (
            "dose = { orthogonal",
            "dose = { clip_gradient",
            "dose of 'clip_gradient', which the row does not apply.",
        ),
        (
            "gain = 1.0",
            'gain = "spectral_radus"',
            "'spectral_radus' is not a reading; did you mean 'spectral_radius'?",
        ),
        ("{steps}", "{stps}", "why: 'stps' is not a reading; did you mean 'steps'?"),
        ('refs = ["me"]', "refs = []", "a scenario cites a paper or a row of the evidence table."),
        (
            'id = "mine"',
            'id = "mine"\nscope = "run"',
            "a row of scope 'run' may name readings of the run only.",
        ),
        (
            'cell = "lstm"',
            'cell = "lstmm"',
            "when: 'lstmm' is not a value of reading 'cell'; "
            "expected rnn_tanh, rnn_relu, lstm, gru, custom.",
        ),
    ],
)
def test_a_wrong_scenario(tmp_path: Path, old: str, new: str, fact: str) -> None:
    assert old in SCENARIO
    folder = written(tmp_path / "mine", "scenarios.toml", SCENARIO.replace(old, new))
    assert facts(folder) == [f"`scenarios.toml scenario mine`: {fact}{CURE}"]


def test_all_wrong_rows_are_named_at_once(tmp_path: Path) -> None:
    sound = RULE.replace("RG790", "RG791")
    third = RULE.replace("RG790", "RG792").replace('"manual"', '"magic"')
    text = RULE.replace("steps = ", "stps = ") + sound + third
    assert facts(written(tmp_path / "mine", "rules.toml", text)) == [
        "`rules.toml rule RG790`: when: 'stps' is not a reading; did you mean 'steps'?" + CURE,
        "`rules.toml rule RG792`: fix: Input should be 'step', 'values', 'structure', 'manual' "
        "or 'none'." + CURE,
    ]


@pytest.mark.parametrize(
    ("schema", "text", "said"),
    [
        ("schema = 2", RULE, f"`rules.toml`: schema is 2, not 1.{CURE}"),
        ("", RULE, f"`rules.toml`: schema is None, not 1.{CURE}"),
        (
            "schema = 1",
            RULE.replace("[[rule]]", "[[rules]]"),
            f"`rules.toml`: 'rules' is not a key; did you mean 'rule'?{CURE}",
        ),
        ("schema = 1", RULE + RULE, f"`rules.toml rule RG790`: the row stands twice.{CURE}"),
    ],
)
def test_a_wrong_file(tmp_path: Path, schema: str, text: str, said: str) -> None:
    assert facts(written(tmp_path / "mine", "rules.toml", text, schema)) == [said]


def test_not_toml(tmp_path: Path) -> None:
    (said,) = facts(written(tmp_path / "mine", "rules.toml", "[[rule"))
    assert said.startswith("`rules.toml`: not TOML: ")
    assert said.endswith(". Correct it. (RG913)")


def test_a_folder_without_rule_files(tmp_path: Path) -> None:
    with pytest.raises(RulesError) as caught:
        load_rulebook([tmp_path])
    assert str(caught.value) == (
        f"`{tmp_path}`: the folder holds no rule file. "
        "Put rules.toml or scenarios.toml there, or leave the folder out. (RG913)"
    )


def test_a_folder_extends(tmp_path: Path, built_in: Rulebook) -> None:
    folder = written(tmp_path / "mine", "rules.toml", RULE)
    written(folder, "scenarios.toml", SCENARIO)
    book = load_rulebook([folder])
    assert book.rules[:-1] == built_in.rules
    assert book.rule("slow").code == "RG790"
    assert book.scenarios[0].id == "mine"
    assert book.scenarios[1:] == built_in.scenarios


def test_a_folder_overrides(tmp_path: Path, built_in: Rulebook) -> None:
    own = SCENARIO.replace('"mine"', '"healthy"')
    folder = written(tmp_path / "mine", "rules.toml", RULE.replace("RG790", "RG401"))
    written(folder, "scenarios.toml", own)
    book = load_rulebook([folder])
    assert book.rule("RG401").name == "slow"
    assert len(book.rules) == len(built_in.rules)
    assert book.scenarios[0].apply == ("orthogonal",)
    assert [s.id for s in book.scenarios].count("healthy") == 1


def test_the_last_folder_wins(tmp_path: Path) -> None:
    first = written(tmp_path / "first", "rules.toml", RULE)
    second = written(tmp_path / "second", "rules.toml", RULE.replace("slow", "slower"))
    assert load_rulebook([first, second]).rule("RG790").name == "slower"
    assert load_rulebook([second, first]).rule("RG790").name == "slow"


def test_a_rule_by_code_or_name(built_in: Rulebook) -> None:
    assert built_in.rule("RG401") is built_in.rule("vanishing-through-time")
    with pytest.raises(RulesError) as caught:
        built_in.rule("vanishing-thru-time")
    assert str(caught.value) == (
        "'vanishing-thru-time' is not a known rule; did you mean 'vanishing-through-time'? (RG914)"
    )


def test_an_unknown_remedy(tmp_path: Path) -> None:
    own = SCENARIO.replace("orthogonal", "ortogonal")
    book = load_rulebook([written(tmp_path / "mine", "scenarios.toml", own)])
    with pytest.raises(RulesError) as caught:
        book.check_remedies(["orthogonal", "recurrent_gain"])
    assert str(caught.value) == (
        "'ortogonal' is not a known remedy (scenario mine); did you mean 'orthogonal'? (RG914)"
    )


def test_the_built_in_rules_are_found(root: Path) -> None:
    assert rules_folder() == root / "rules"


def test_without_rule_files_both_places_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "somewhere" / "rnnguard"
    monkeypatch.setattr("rnnguard.__file__", str(package / "__init__.py"))
    with pytest.raises(RulesError) as caught:
        rules_folder()
    assert str(caught.value) == (
        f"`rules`: no rule files in {package / 'rules'} and {package.parent / 'rules'}. "
        "Install rnnguard again. (RG913)"
    )


def test_the_installed_rules_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rnnguard"
    package.mkdir()
    for folder in (package / "rules", tmp_path / "rules"):
        written(folder, "scenarios.toml", "")
    monkeypatch.setattr("rnnguard.__file__", str(package / "__init__.py"))
    assert rules_folder() == package / "rules"


def test_built_in_rows_are_sound(built_in: Rulebook) -> None:
    for rule in built_in.rules:
        assert rule.severity in SEVERITIES
        assert rule.stage == "measured" or (rule.when is None and not rule.message), rule.code
        assert rule.stage != "measured" or rule.refs, f"{rule.code} cites nothing"
        for cause in rule.implied_by:
            assert built_in.rule(cause)


def settings(folder: Path, text: str) -> Path:
    """A pyproject.toml with these settings."""
    file = folder / "pyproject.toml"
    file.write_text(f"[tool.rnnguard]\n{text}\n", encoding="utf-8")
    return file


def test_one_file_may_hold_both_kinds(tmp_path: Path, built_in: Rulebook) -> None:
    file = tmp_path / "team.toml"
    file.write_text(f"schema = 1\n{RULE}{SCENARIO}", encoding="utf-8")
    for extra in (file, str(file)):
        book = load_rulebook([extra])
        assert book.rule("slow").code == "RG790"
        assert book.scenarios[0].id == "mine"
        assert len(book.rules) == len(built_in.rules) + 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RulesError, match=r"there is no such file. Check the path. \(RG913\)"):
        load_rulebook([tmp_path / "team.toml"])


def test_settings_name_rules_beside_their_file(tmp_path: Path) -> None:
    written(tmp_path / "mine", "rules.toml", RULE)
    book = load_rulebook([settings(tmp_path, 'rules = ["mine"]\nignore = ["slow"]')])
    assert book.rule("slow").code == "RG790"
    assert book.settings.ignore == ("slow",)


def test_thresholds_replace_cells(tmp_path: Path, built_in: Rulebook) -> None:
    text = """[tool.rnnguard.thresholds]
        RG107 = { saturation = "> 0.9" }
        fading-through-time = { memory_needed = "> 30" }"""
    book = load_rulebook([settings(tmp_path, text)])
    assert book.rule("RG107").when is not None and built_in.rule("RG107").when is not None
    saturation = book.rule("RG107").when.cells["saturation"]  # type: ignore[union-attr]
    assert saturation.holds(0.95) and not saturation.holds(0.85)
    fading = book.rule("RG407").when
    assert fading is not None and str(fading.cells["memory_needed"]) == "> 30"
    # What is not named stays.
    assert fading.cells["level"] == built_in.rule("RG407").when.cells["level"]  # type: ignore[union-attr]
    assert [r for r in book.rules if r.code not in ("RG107", "RG407")] == [
        r for r in built_in.rules if r.code not in ("RG107", "RG407")
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'thresholds = { RG107 = { saturation = "> 0.9", steps = 3 } }',
            "RG107 has no cell for 'steps'; known: 'saturation'. (RG914)",
        ),
        (
            'thresholds = { saturated-unit = { saturation = "> 0.9" } }',
            "'saturated-unit' is not a known rule; did you mean 'saturated-units'? (RG914)",
        ),
        ('thresholds = { RG001 = { steps = "> 1" } }', "RG001 has no cell for 'steps';"),
        ('select = ["RG1", "no-cliping"]', "did you mean 'no-clipping'? (RG914)"),
    ],
)
def test_settings_name_what_is_not_there(tmp_path: Path, text: str, said: str) -> None:
    file = settings(tmp_path, text)
    with pytest.raises(RulesError) as caught:
        load_rulebook([file])
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"`{file} {text.split()[0]}`: ")


def test_a_fixed_severity_neither_rises_nor_falls(tmp_path: Path) -> None:
    rises = RULE + 'error_when = { steps = "> 9000" }\n'
    folder = written(tmp_path / "mine", "rules.toml", rises)
    assert load_rulebook([folder]).rule("slow").error_when
    fixed = load_rulebook([folder, Settings(severity={"RG79": "info"})]).rule("slow")
    assert (fixed.severity, fixed.error_when) == ("info", ())
    # What is off keeps its severity: it is left out when findings are selected.
    off = load_rulebook([folder, Settings(severity={"slow": "off"})])
    assert off.rule("slow").error_when
    assert not off.settings.wants("RG790", "slow")


def test_settings_follow_each_other(tmp_path: Path) -> None:
    file = settings(tmp_path, 'ignore = ["RG4"]\nseverity = { RG5 = "error" }')
    found = load_rulebook([file, Settings(ignore=("RG2",))]).settings
    assert found.ignore == ("RG4", "RG2")
    assert load_rulebook([file]).rule("RG501").severity == "error"
    assert load_rulebook().settings == Settings()


def test_a_severity_rises_where_one_of_several_tables_holds(tmp_path: Path) -> None:
    rises = 'warning_when = [{ steps = "> 2000" }, { batch = 1 }]\n'
    text = RULE.replace('"warning"', '"info"') + rises
    (rule,) = load_rulebook([written(tmp_path, "rules.toml", text)]).rules[-1:]
    looks = [measurement(site_readings(steps=1500, **more)) for more in ({}, {"batch": 1})]
    book = Rulebook(rules=(rule,), scenarios=())
    found = [finding.severity for look in looks for finding in findings_of(book, look)]
    assert found == ["info", "warning"]
