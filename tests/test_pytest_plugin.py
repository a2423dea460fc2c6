"""The pytest plugin as a user meets it, told by small suites that pytest runs."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree

import pytest

# Uninstalled, the plugin has to be named; installed, naming it would load it twice.
NAMED = [] if entry_points(group="pytest11", name="rnnguard") else ["-p", "rnnguard.pytest_plugin"]
ROOT = Path(__file__).resolve().parents[1]

# Stands in for rnnguard.audit: the made-up report of test_report.py, by a word.
STUB = """
    import pytest, rnnguard
    from test_report import BY_HAND, made_up_report, stabilized_report

    seen = []

    def audit(model, *args, **options):
        seen.append(options)
        return {"sick": made_up_report, "mended": stabilized_report}[model]()

    @pytest.fixture(autouse=True)
    def _stub(monkeypatch):
        monkeypatch.setitem(vars(rnnguard), "audit", audit)  # setattr would import torch first
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A suite beside which rnnguard and the made-up reports can be imported."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.setenv("COLUMNS", "100")
    pytester.makeconftest(STUB)
    return pytester


def run(suite: pytest.Pytester, *options: str) -> pytest.RunResult:
    return suite.runpytest_subprocess("-p", "no:cacheprovider", *NAMED, *options)


SICK_AND_MENDED = """
    def test_sick(rnn_audit):
        report = rnn_audit("sick")
        report.assert_clean()

    def test_mended(rnn_audit):
        rnn_audit("mended").assert_clean()

    def test_unrelated():
        pass
"""


def test_a_sick_model_fails_and_a_mended_one_passes(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_nets=SICK_AND_MENDED)
    result = run(suite)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines([
        "*RG401 error  vanishing-through-time  encoder.lstm",
        "*- rnnguard summary -*",
        "test_nets.py::test_sick    encoder.lstm lstm  decay/step 0.63  T_eff(1e-2)   9  RG201 *",
        "test_nets.py::test_mended  encoder.lstm lstm  decay/step 0.97  T_eff(1e-2) 100  RG201",
        "2 tests audited, 1 failed",
        "FAILED test_nets.py::test_sick - Failed: RG401 vanishing-through-time",
    ])  # fmt: skip
    # The reader gets the report and not our stack.
    result.stdout.no_fnmatch_line("*Error*")
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")
    result.stdout.no_fnmatch_line("*report.assert_clean()*")


def test_no_summary_when_nothing_was_audited(suite: pytest.Pytester) -> None:
    suite.makepyfile("def test_unrelated(): pass")
    result = run(suite)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*rnnguard summary*")


@pytest.mark.parametrize(
    ("options", "ini", "failed"),
    [
        ((), "", 1),
        (("--rnnguard-fail-on", "warning"), "", 2),
        ((), "rnnguard_fail_on = warning", 2),
        (("--rnnguard-fail-on", "error"), "rnnguard_fail_on = warning", 1),
        (("--rnnguard-ignore", "RG401"), "", 0),
        ((), "rnnguard_ignore = RG401 vanishing-through-time", 0),
        (("--rnnguard-ignore", "RG4", "--rnnguard-ignore", "RG2", "--rnnguard-fail-on", "info"),
         "", 0),
    ],
)  # fmt: skip
def test_options_and_ini_set_the_default(
    suite: pytest.Pytester, options: tuple[str, ...], ini: str, failed: int
) -> None:
    suite.makepyfile(SICK_AND_MENDED)
    suite.makeini(f"[pytest]\n{ini}")
    run(suite, *options).assert_outcomes(passed=3 - failed, failed=failed)


def test_what_a_test_says_itself_wins(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        def test_stricter(rnn_audit):
            rnn_audit("mended").assert_clean(fail_on="warning")

        def test_laxer(rnn_audit):
            rnn_audit("sick").assert_clean(ignore=["RG401"])

        def test_empty_ignore(rnn_audit):
            rnn_audit("sick").assert_clean(ignore=())
    """)
    result = run(suite, "--rnnguard-ignore", "RG401")
    result.assert_outcomes(passed=1, failed=2)


def test_an_unknown_rule_is_an_error_and_not_a_pass(suite: pytest.Pytester) -> None:
    suite.makepyfile(SICK_AND_MENDED)
    result = run(suite, "--rnnguard-ignore", "RG9999")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*'RG9999' is not a known rule; did you mean*"])


def test_a_wrong_setting_is_a_usage_error(suite: pytest.Pytester) -> None:
    suite.makepyfile(SICK_AND_MENDED)
    assert run(suite, "--rnnguard-fail-on", "fatal").ret == pytest.ExitCode.USAGE_ERROR
    suite.makeini("[pytest]\nrnnguard_fail_on = fatal")
    result = run(suite)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: rnnguard_fail_on is 'fatal', not one of error, warning, info"]
    )


def test_the_config_fixture_gives_default_options(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        import pytest
        from conftest import seen

        @pytest.fixture(scope="session")
        def rnnguard_config():
            return {"memory": 30, "seed": 7}

        def test_defaults(rnn_audit):
            rnn_audit("mended", memory=50)
            assert seen == [{"memory": 50, "seed": 7}]
    """)
    run(suite).assert_outcomes(passed=1)


def test_the_settings_of_the_root_are_honoured(suite: pytest.Pytester) -> None:
    suite.makefile(".toml", pyproject="[tool.rnnguard]\nignore = ['RG401']\n")
    suite.mkdir("inner").joinpath("test_inner.py").write_text(
        "import os\nfrom conftest import seen\n"
        "def test_settings(rnn_audit):\n"
        "    rnn_audit('mended')\n"
        "    rnn_audit('mended', rules='team')\n"
        "    rnn_audit('mended', rules=['team', 'other'])\n"
        "    rules = [[str(r) for r in options['rules']] for options in seen]\n"
        "    root = os.path.realpath('pyproject.toml')\n"
        "    assert rules == [[root], [root, 'team'], [root, 'team', 'other']]\n"
    )
    run(suite, "--rootdir", ".", "inner").assert_outcomes(passed=1)


def test_a_wrong_setting_of_the_root_is_said(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makefile(".toml", rnnguard="ignore = ['RG9999']\n")
    pytester.makepyfile("""
        import torch

        def test_it(rnn_audit):
            rnn_audit(torch.nn.LSTM(5, 8))
    """)
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*rnnguard.toml ignore`: 'RG9999' is not a known rule;*"])


def test_the_report_is_the_whole_report(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        def test_readings(rnn_audit):
            report = rnn_audit("sick")
            assert report["encoder.lstm"].decay_per_step == 0.63
            assert not report.ok
            report.only(ignore=["RG401"]).assert_clean()
    """)
    run(suite).assert_outcomes(passed=1)


def test_an_audit_in_a_fixture_is_summed_up_once(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        import pytest

        @pytest.fixture
        def report(rnn_audit):
            return rnn_audit("sick")

        @pytest.mark.parametrize("n", [1, 2])
        def test_it(report, n): pass

        @pytest.fixture
        def broken(rnn_audit):
            rnn_audit("sick").assert_clean()

        def test_error(broken): pass
    """)
    result = run(suite)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["3 tests audited, 1 failed"])
    assert sum("T_eff" in line and "::" in line for line in result.outlines) == 3


def test_results_reach_junit_xml(suite: pytest.Pytester) -> None:
    suite.makepyfile(SICK_AND_MENDED)
    run(suite, "--junitxml", "out.xml")
    tree = ElementTree.parse(suite.path / "out.xml")
    values = [p.attrib["value"] for p in tree.iter("property") if p.attrib["name"] == "rnnguard"]
    assert [json.loads(value)[0]["codes"] for value in values] == [["RG201", "RG401"], ["RG201"]]


def test_xdist_sums_up_once(suite: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    suite.makepyfile(SICK_AND_MENDED)
    result = run(suite, "-n2")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["2 tests audited, 1 failed"])
    assert sum("rnnguard summary" in line for line in result.outlines) == 1


def test_the_plugin_can_be_left_out(suite: pytest.Pytester) -> None:
    suite.makepyfile("def test_unrelated(): pass")
    result = suite.runpytest_subprocess("-p", "no:rnnguard", "-p", "no:rnnguard.pytest_plugin")
    result.assert_outcomes(passed=1)
    result = run(suite, "--collect-only", "-q")
    assert result.ret == 0


def test_strict_settings_are_kept(suite: pytest.Pytester) -> None:
    suite.makepyfile(SICK_AND_MENDED)
    suite.makeini("[pytest]\naddopts = --strict-markers --strict-config\nfilterwarnings = error")
    run(suite).assert_outcomes(passed=2, failed=1)


def test_fixtures_and_options_are_documented(suite: pytest.Pytester) -> None:
    result = run(suite, "--fixtures")
    result.stdout.fnmatch_lines(["rnn_audit*", "*gives a report; `report.assert_clean()` fails*"])
    run(suite, "--help").stdout.fnmatch_lines(["*--rnnguard-fail-on=*", "*--rnnguard-ignore=RULE*"])


# The story below runs real audits.


def test_a_default_lstm_fails_and_a_stabilized_one_passes(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytester.makepyfile(
        test_story="""
        import pytest, torch, rnnguard

        @pytest.fixture(scope="session")
        def rnnguard_config():
            return {"inputs": torch.randn(100, 4, 5), "memory": 100}

        @pytest.fixture
        def model():
            torch.manual_seed(0)
            return torch.nn.LSTM(5, 32)

        def test_default(rnn_audit, model):
            report = rnn_audit(model)
            assert [f.code for f in report.exceeds("error")] == ["RG401"]
            report.assert_clean()

        def test_stabilized(rnn_audit, rnnguard_config, model):
            optimizer = torch.optim.Adam(model.parameters())
            rnnguard.stabilize(model, optimizer, **rnnguard_config)
            rnn_audit(model, optimizer).assert_clean()
    """
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines([
        "*RG401 error  vanishing-through-time  (model)",
        "test_story.py::test_default*(model) lstm  decay/step 0.6?*RG401*",
        "test_story.py::test_stabilized*(model) lstm  decay/step 0.9?*",
        "2 tests audited, 1 failed",
    ])  # fmt: skip
