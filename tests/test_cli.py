"""The command line as a user meets it: commands, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import BY_HAND, made_up_report, stabilized_report

import rnnguard
from rnnguard.cli import main
from rnnguard.decision.rulebook import load_rulebook
from rnnguard.decision.selection import chosen
from rnnguard.errors import Refusal, RefusedError

ROOT = Path(__file__).resolve().parents[1]

NETS = """
    import sys, torch
    from torch import nn

    print("hello from import")
    def build_model(hidden=8): return nn.LSTM(5, hidden)
    def setup():
        return {"model": nn.LSTM(5, 8), "inputs": torch.zeros(3, 2, 5), "memory": 30, "tiers": ()}
    inputs = torch.zeros(100, 4, 5)
    def batches(): return [(inputs, torch.zeros(4))]
    def step(model, batch): return model(batch[0])[0].sum()
    def make_optimizer(model): return torch.optim.Adam(model.parameters())
    def fails(): raise RuntimeError("broken")
"""


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module `nets`, forgotten afterwards."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for rnnguard.audit: gives the made-up report, keeps the arguments."""
    seen: dict[str, Any] = {}

    def audit(**arguments: Any) -> rnnguard.Report:
        print("hello from forward")
        seen.update(arguments)
        settings = load_rulebook(arguments["rules"]).settings
        told = chosen(settings, made_up_report().findings)
        return made_up_report(findings=told, remaining=told)

    monkeypatch.setitem(vars(rnnguard), "audit", audit)
    return seen


def breaking(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def audit(**_: Any) -> rnnguard.Report:
        raise error

    monkeypatch.setitem(vars(rnnguard), "audit", audit)


def giving(monkeypatch: pytest.MonkeyPatch, report: rnnguard.Report) -> None:
    monkeypatch.setitem(vars(rnnguard), "audit", lambda **_: report)


@pytest.mark.usefixtures("audited")
def test_stdout_carries_the_report_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "nets:build_model"]) == 1
    said = capsys.readouterr()
    assert said.out == f"{made_up_report()}\n"
    assert said.err == "hello from import\nhello from forward\n"


@pytest.mark.usefixtures("audited")
@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 1),
        (["--exit-zero"], 0),
        (["--ignore", "RG401"], 0),
        (["--ignore", "RG401", "--fail-on", "warning"], 1),
        (["--ignore", "RG4,RG2", "--fail-on", "info"], 0),
        (["--ignore", "RG4", "--extend-select", "RG401"], 1),
        (["--select", "RG2"], 0),
        (["--select", "RG2", "--fail-on", "warning"], 1),
        (["--select", "nonsense"], 2),
        (["--fail-on", "fatal"], 2),
        (["--memory", "0"], 2),
        (["--memory", "many"], 2),
        (["--rules", "nowhere"], 2),
        (["--config", "nowhere"], 2),
        (["--config", "nets.py", "--isolated"], 2),
        (["--no-such-option"], 2),
    ],
)
def test_exit_codes(options: list[str], code: int) -> None:
    assert main(["audit", "nets:build_model", *options]) == code


def test_a_clean_report_is_zero_and_warnings_are_not_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    giving(monkeypatch, made_up_report(findings=(), remaining=()))
    assert main(["audit", "nets:build_model", "--fail-on", "info"]) == 0
    giving(monkeypatch, made_up_report(findings=(BY_HAND,), remaining=(BY_HAND,)))
    assert main(["audit", "nets:build_model"]) == 0


@pytest.mark.parametrize("arguments", [[], ["audit"], ["rules"], ["nonsense"]])
def test_a_wrong_use_is_two(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_targets_and_options_reach_the_audit(nets: Path, audited: dict[str, Any]) -> None:
    (nets / "team").mkdir()
    (nets / "team" / "rules.toml").write_text("schema = 1\n")
    main([
        "audit", "nets:build_model(16)", "--data", "nets:batches", "--inputs", "nets:inputs",
        "--loss", "torch.nn:MSELoss()", "--step", "nets:step", "--optimizer", "nets:make_optimizer",
        "--memory", "60", "--skip", "a", "--skip", "b", "--rules", "team", "--seed", "3",
    ])  # fmt: skip
    assert audited["model"].hidden_size == 16
    assert len(audited["data"]) == 1
    assert tuple(audited["inputs"].shape) == (100, 4, 5)
    assert type(audited["loss"]).__name__ == "MSELoss"
    assert audited["step"].__name__ == "step"
    assert type(audited["optimizer"]).__name__ == "Adam"
    rest = {name: audited[name] for name in ("memory", "skip", "seed", "verbose")}
    assert rest == {"memory": 60, "skip": ("a", "b"), "seed": 3, "verbose": False}
    (settings,) = audited["rules"]
    assert settings.rules == ("team",)


def test_options_win_over_a_factorys_dict(audited: dict[str, Any]) -> None:
    main(["audit", "nets:setup"])
    assert (audited["memory"], audited["seed"]) == (30, 0)
    assert "tiers" not in audited
    main(["audit", "nets:setup", "--memory", "50"])
    assert audited["memory"] == 50


def test_the_seed_makes_the_model_too(audited: dict[str, Any]) -> None:
    weights = []
    for seed in ("1", "1", "2"):
        main(["audit", "nets:build_model", "--seed", seed])
        weights.append(audited["model"].weight_hh_l0.sum().item())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.usefixtures("audited")
def test_formats_and_files(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "nets:build_model", "--output-format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["remaining"][0]["code"] == "RG401"
    for name, start in (("r.html", "<!doctype html>"), ("r.json", "{"), ("r.txt", "rnnguard ")):
        assert main(["audit", "nets:build_model", "-o", name]) == 1
        assert (nets / name).read_text(encoding="utf-8").startswith(start)
        assert capsys.readouterr().out == ""
    assert main(["audit", "nets:build_model", "--output-format", "html", "-o", "page"]) == 1
    assert (nets / "page").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.usefixtures("audited")
def test_quiet_leaves_the_readings_out(capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", "nets:build_model", "-q"])
    said = capsys.readouterr().out
    assert "decay/step" not in said
    assert "RG401 error" in said


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("no\n  way"), "ValueError: no way (--debug shows the traceback)"),
        (SystemExit(0), "SystemExit: 0 (--debug shows the traceback)"),
        (KeyboardInterrupt(), "Interrupted."),
        (MemoryError(), "MemoryError: no message (--debug shows the traceback)"),
        (
            RefusedError(Refusal("RG912", "", "the model cannot be run.", "Give inputs.")),
            "the model cannot be run. Give inputs. (RG912)",
        ),
    ],
)
def test_any_crash_is_two_and_one_sentence(
    error: BaseException,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    breaking(monkeypatch, error)
    assert main(["audit", "nets:build_model"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    last = said.err.splitlines()[-1]
    # Where it was raised is this file, which stands between kind and words.
    assert last.replace(last[last.find(" at ") : last.find(": ")], "") == sentence
    assert "Traceback" not in said.err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "nets:fails", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "RuntimeError: broken" in said
    assert said.count("Traceback") >= 1
    assert said.endswith("`--debug` shows the traceback. (RG919)\n")


def test_a_rule_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RG401", "vanishing-through-time"):
        assert main(["rule", name]) == 0
        assert capsys.readouterr().out.startswith("# vanishing-through-time (RG401)\n")
    assert main(["rule", "RG999"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "RG914" in said.err


def test_all_rules_are_listed_and_given_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    codes = [rule.code for rule in load_rulebook().rules]
    assert main(["rule"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == codes
    assert main(["rule", "--all"]) == 0
    assert capsys.readouterr().out.count("## What is wrong") == len(codes)
    assert main(["rule", "--all", "--output-format", "json"]) == 0
    assert [row["code"] for row in json.loads(capsys.readouterr().out)] == codes


def test_a_remedy_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remedy", "chrono_bias"]) == 0
    assert capsys.readouterr().out.startswith("# chrono_bias\n")
    assert main(["remedy", "chrono_bias", "--output-format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tier"] == "values"
    assert main(["remedy", "--all"]) == main(["remedy"]) == 0
    assert main(["remedy", "chrono"]) == 2
    assert "RG914" in capsys.readouterr().err


SETTINGS = """
[tool.rnnguard]
target = "nets:build_model(16)"
memory = 60
ignore = ["RG201"]
[tool.rnnguard.severity]
RG401 = "warning"
"""


def test_a_file_of_settings_is_honoured(
    nets: Path, audited: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit"]) == 2
    assert "no target is named" in capsys.readouterr().err
    (nets / "pyproject.toml").write_text(SETTINGS)
    assert main(["audit"]) == 1
    assert (audited["model"].hidden_size, audited["memory"]) == (16, 60)
    assert "RG401" in capsys.readouterr().out
    assert main(["audit", "nets:build_model", "--memory", "9", "--ignore", "RG4"]) == 0
    assert (audited["model"].hidden_size, audited["memory"]) == (8, 9)
    # A selection of the command line starts afresh.
    main(["audit", "--select", "RG2"])
    assert "RG201 warning" in capsys.readouterr().out
    assert main(["audit", "--isolated"]) == 2
    audited.clear()
    assert main(["audit", "nets:build_model", "--isolated"]) == 1
    assert "memory" not in audited


def test_the_lowest_severity_that_fails_may_stand_in_a_file(
    nets: Path, audited: dict[str, Any]
) -> None:
    (nets / "rnnguard.toml").write_text('ignore = ["RG401"]\nfail-on = "warning"\n')
    assert main(["audit", "nets:build_model"]) == 1
    assert main(["audit", "nets:build_model", "--fail-on", "error"]) == 0


@pytest.mark.usefixtures("audited")
def test_what_is_wrong_in_a_file_is_said_with_its_name(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, said in (
        ("memroy = 3", "`strict.toml`: 'memroy' is not a key; did you mean 'memory'?"),
        ("memory = 'x'", "`strict.toml memory`: Input should be a valid integer."),
        ("ignore = ['RG40x']", "`strict.toml ignore`: 'RG40x' is not a known rule;"),
    ):
        (nets / "strict.toml").write_text(text)
        for command in (["audit", "nets:build_model"], ["config"], ["rule"]):
            assert main([*command, "--config", "strict.toml"]) == 2
            assert said in capsys.readouterr().err
    assert main(["audit", "nets:build_model", "--select", "nonsense"]) == 2
    assert "`command line select`: 'nonsense' is not" in capsys.readouterr().err


def test_the_settings_in_force_are_printed(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nets / "pyproject.toml").write_text(SETTINGS)
    assert main(["config"]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines()}
    assert lines["memory"] == ["60", "pyproject.toml"]
    assert lines["seed"] == ["0", "default"]
    assert main(["config", "--isolated"]) == 0
    assert "pyproject.toml" not in capsys.readouterr().out


def test_rules_are_explained_as_they_are_in_force(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (nets / "pyproject.toml").write_text(SETTINGS)
    main(["rule", "RG401"])
    assert "\nwarning; fix: values" in capsys.readouterr().out
    main(["rule", "RG401", "--isolated"])
    assert "\nerror; fix: values" in capsys.readouterr().out


def test_rule_files_are_checked(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "check"]) == 0
    assert "scenarios are in order.\n" in capsys.readouterr().out
    (nets / "rules.toml").write_text('schema = 1\n[[rule]]\ncode = "X1"\n')
    assert main(["rules", "check", "."]) == 1
    assert "rules.toml rule X1" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"rnnguard {rnnguard.__version__}\n"
    assert main(["version", "--verbose"]) == 0
    assert "\npydantic 2" in capsys.readouterr().out


def test_the_demo_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    story = types.ModuleType("rnnguard.demo")
    vars(story)["run"] = lambda *arguments: told.append(arguments)
    monkeypatch.setitem(sys.modules, "rnnguard.demo", story)
    monkeypatch.setitem(vars(rnnguard), "demo", story)
    assert main(["demo"]) == main(["demo", "--seed", "3", "-o", "d.html"]) == 0
    assert told == [(0, None), (3, Path("d.html"))]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        env={k: v for k, v in os.environ.items() if k != "FORCE_COLOR"} | settings,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def test_help_is_there_without_anything_heavy() -> None:
    code = (
        "import sys; from rnnguard.cli import main; code = main(['--help']);"
        "print(code, [m for m in ('torch', 'rich', 'jinja2', 'pydantic', 'numpy')"
        " if m in sys.modules])"
    )
    done = run("-c", code)
    assert done.stdout.endswith("0 []\n")
    assert "audit" in done.stdout


@pytest.mark.parametrize("command", ["rule", "config"])
def test_rules_and_settings_are_told_without_torch(command: str) -> None:
    code = (
        f"import sys; from rnnguard.cli import main; code = main(['{command}']);"
        "print(code, 'torch' in sys.modules)"
    )
    assert run("-c", code).stdout.endswith("0 False\n")


def test_python_m_rnnguard_gives_the_exit_code() -> None:
    done = run("-m", "rnnguard", "audit", "nowhere:model")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("`nowhere:model`: there is no module `nowhere`.")
    assert "Traceback" not in done.stderr


def test_an_old_encoding_is_no_crash() -> None:
    done = run("-m", "rnnguard", "rule", "--all", PYTHONIOENCODING="ascii")
    assert done.returncode == 0


def test_a_reader_that_goes_away_is_no_crash() -> None:
    command = f"{sys.executable} -m rnnguard rule --all | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


# The stories below run real audits.

SICK = ["audit", "torch.nn:LSTM(5, 32)", "--inputs", "nets:inputs", "--memory", "100"]


def test_a_default_lstm_is_found_sick(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SICK, "--output-format", "json"]) == 1
    data = json.loads(capsys.readouterr().out)
    errors = [f["code"] for f in data["remaining"] if f["severity"] == "error"]
    assert errors == ["RG401"]
    assert data["level"] == "vanishing"
    assert main([*SICK, "--ignore", "RG401"]) == 0


def test_two_audits_with_one_seed_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for _ in range(2):
        main([*SICK, "--output-format", "json"])
        data = json.loads(capsys.readouterr().out)
        data["before"]["run"].pop("seconds")
        reports.append(data)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("form", ["text", "json", "html"])
def test_views_of_a_stabilized_model_are_writable(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    giving(monkeypatch, stabilized_report())
    assert main(["audit", "nets:build_model", "--output-format", form]) == 0
    assert "chrono_bias" in capsys.readouterr().out


def test_a_terminal_gets_colour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], audited: Callable[..., Any]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    main(["audit", "nets:build_model"])
    assert "\x1b[1;31m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(["audit", "nets:build_model"])
    assert "31m" not in capsys.readouterr().out
