"""The pytest plugin: the fixture `rnn_audit` and a short summary.

It loads in every pytest run of its environment, so it imports pytest and the standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rnnguard.measurements import SiteReadings
    from rnnguard.records import Finding, Severity
    from rnnguard.report import Report

SEVERITIES = ("error", "warning", "info")
PROPERTY = "rnnguard"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rnnguard", "gradients of recurrent models")
    group.addoption(
        "--rnnguard-fail-on",
        choices=SEVERITIES,
        help="Lowest severity of a finding that fails assert_clean (default: error).",
    )
    group.addoption(
        "--rnnguard-ignore",
        action="append",
        metavar="RULE",
        help="Code, code prefix or name of a rule that assert_clean leaves out (repeatable).",
    )
    parser.addini("rnnguard_fail_on", "Default of --rnnguard-fail-on.", default="error")
    parser.addini("rnnguard_ignore", "Default of --rnnguard-ignore.", type="args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    severity = config.getini("rnnguard_fail_on")
    if severity not in SEVERITIES:
        expected = ", ".join(SEVERITIES)
        raise pytest.UsageError(f"rnnguard_fail_on is {severity!r}, not one of {expected}")


@pytest.fixture(scope="session")
def rnnguard_config() -> dict[str, Any]:
    """Default options of `rnn_audit`, such as `memory`; override it in a conftest."""
    return {}


@pytest.fixture
def rnn_audit(
    request: pytest.FixtureRequest, rnnguard_config: dict[str, Any]
) -> Callable[..., Report]:
    """`rnn_audit(model, **audit_options)` gives a report; `report.assert_clean()` fails the test.

    Takes the arguments of rnnguard.audit. What [tool.rnnguard] in the pyproject.toml of the root
    (or a rnnguard.toml) says of rules holds here too.
    """

    def audited(model: Any, *args: Any, **options: Any) -> Report:
        import rnnguard

        options = rnnguard_config | options
        if rules := _rules(request.config, options.get("rules")):
            options["rules"] = rules
        report = rnnguard.audit(model, *args, **options)
        request.node.user_properties.append((PROPERTY, json.dumps(_noted(report))))
        _let_pytest_fail(report, request.config)
        return report

    return audited


def _rules(config: pytest.Config, given: Any) -> list[Any]:
    """The file of settings in the root, if there is one, and what the test itself gives."""
    from rnnguard.settings_file import find

    file = find(config.rootpath, above=False)
    more = [] if given is None else [given] if isinstance(given, str | Path) else list(given)
    return [*([file] if file else []), *more]


def _let_pytest_fail(report: Report, config: pytest.Config) -> None:
    """Makes `assert_clean` follow the options of the run and fail without a traceback."""
    fail_by_default: Severity = config.getoption("rnnguard_fail_on") or config.getini(
        "rnnguard_fail_on"
    )
    ignored = config.getoption("rnnguard_ignore") or config.getini("rnnguard_ignore")
    original = report.assert_clean

    def assert_clean(fail_on: Severity | None = None, ignore: Iterable[str] | None = None) -> None:
        __tracebackhide__ = True
        try:
            original(fail_on or fail_by_default, ignored if ignore is None else ignore)
        except AssertionError as error:
            text = str(error)
        else:
            return
        pytest.fail(text, pytrace=False)

    report.assert_clean = assert_clean  # type: ignore[method-assign]  # of this one report only


def _noted(report: Report) -> list[dict[str, Any]]:
    """What the summary says of each site, as plain data that also travels through xdist."""
    findings = report.remaining
    sites = report.now.sites
    paths = {site.path for site in sites}
    # A finding of the whole run has no site of its own and is said with the first.
    rest = [finding for finding in findings if finding.path not in paths]
    if not sites:
        return [{"site": "0 sites", "codes": _codes(findings)}]
    return [
        _row(site, [f for f in findings if f.path == site.path] + ([] if number else rest))
        for number, site in enumerate(sites)
    ]


def _row(site: SiteReadings, findings: list[Finding]) -> dict[str, Any]:
    words = f"decay/step {site.decay_per_step:.2f}  T_eff(1e-2) {site.effective_length:3d}"
    return {"site": f"{site.label} {site.cell}", "words": words, "codes": _codes(findings)}


def _codes(findings: Iterable[Finding]) -> list[str]:
    return sorted({finding.code for finding in findings})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if hasattr(config, "workerinput"):  # under xdist the controller speaks
        return
    audits, failed = _audits(terminalreporter)
    if not audits:
        return
    terminalreporter.section("rnnguard summary", sep="-")
    lines = [
        (test, row["site"], row.get("words", ""), " ".join(row["codes"]) or "ok")
        for test, rows in audits.items()
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        terminalreporter.write_line("  ".join([*padded, line[3]]))
    counted = "1 test" if len(audits) == 1 else f"{len(audits)} tests"
    terminalreporter.write_line(f"{counted} audited, {len(failed & audits.keys())} failed")


def _audits(reporter: pytest.TerminalReporter) -> tuple[dict[str, list[dict[str, Any]]], set[str]]:
    """The rows of every test that audited something, and the tests that failed."""
    audits: dict[str, list[dict[str, Any]]] = {}
    failed = set()
    for reports in reporter.stats.values():
        for report in reports:
            # Some outcomes, such as warnings, are no test reports; each test has up to three.
            for name, value in getattr(report, "user_properties", ()):
                if name == PROPERTY:
                    rows = audits.setdefault(report.nodeid, [])
                    rows += [row for row in json.loads(value) if row not in rows]
            if getattr(report, "failed", False):
                failed.add(report.nodeid)
    return audits, failed
