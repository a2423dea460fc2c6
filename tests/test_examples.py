"""The examples run, at small size, and keep what their docstrings promise."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest

Example = Callable[[str], ModuleType]


@pytest.fixture(scope="session")
def example(root: Path) -> Example:
    """Imports an example by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_every_example_has_a_docstring_a_test_and_a_line(root: Path) -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    lines = (root / "examples" / "README.md").read_text(encoding="utf-8")
    for file in sorted((root / "examples").glob("*.py")):
        assert file.read_text(encoding="utf-8").startswith('"""'), file.name
        assert f"def test_{file.stem}" in tests, file.name
        assert f"`{file.name}`" in lines, file.name


def test_plain_loop(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    report, loss = example("plain_loop").main(steps=60, length=40)
    assert report.before["lstm"].level == "vanishing"
    assert report["lstm"].level == "healthy" and report.ok
    assert math.isfinite(loss)
    assert "chrono_bias" in capsys.readouterr().out


def test_plain_loop_without_the_line(example: Example) -> None:
    report, loss = example("plain_loop").main(steps=3, length=10, stabilize=False)
    assert report is None and math.isfinite(loss)


def test_plain_loop_learns_only_with_the_line(example: Example) -> None:
    plain_loop = example("plain_loop")
    _, stabilized = plain_loop.main(steps=150, length=60)
    _, untouched = plain_loop.main(steps=150, length=60, stabilize=False)
    assert stabilized < 1.0 < 1.3 < untouched


def test_own_recurrence(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    own = example("own_recurrence")
    report, stabilized = own.main(steps=160, length=40)
    assert report.before[""].level == "vanishing" and report[""].level == "healthy"
    (change,) = (c for c in report.changes if c.path is not None)
    assert change.dose["gates"] == "gates.bias:32:64:1/gates.bias:96:128:1"
    assert "written_chrono_bias" in capsys.readouterr().out
    _, untouched = own.main(steps=160, length=40, stabilize=False)
    assert stabilized < 0.7 < 1.3 < untouched


def test_char_language_model(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    report, losses = example("char_language_model").main(steps=50, window=16, hidden=32)
    assert [site.path for site in report.sites] == ["lstm"]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) / 10 < losses[0] - 0.5
    assert "bits/char" in capsys.readouterr().out


def test_char_language_model_with_a_declared_memory(example: Example) -> None:
    report, losses = example("char_language_model").main(steps=4, window=16, hidden=32, memory=16)
    assert report["lstm"].level == "healthy"
    assert all(map(math.isfinite, losses))


def test_classifiers(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    results = example("classifiers").main(steps=2)
    assert list(results) == ["TanhClassifier", "ReluClassifier", "LSTMClassifier"]
    for report, share in results.values():
        (site,) = report.sites
        before, after = report.before[site.path], report[site.path]
        assert site.readout == "last_step" and report.ok
        assert after.retention_at_memory > before.retention_at_memory + 5
        assert report.level in ("healthy", "at risk: fading")
        assert 0 <= share <= 1
    assert "held-out digits" in capsys.readouterr().out


def test_packed_bidirectional(example: Example) -> None:
    report, loss = example("packed_bidirectional").main(steps=5, longest=30)
    (site,) = report.sites
    assert site.packed and site.bidirectional and site.readout == "final_state"
    assert report.level == "healthy" and math.isfinite(loss)
    assert "RG201" not in {finding.code for finding in report.findings}


def test_audit_only(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    audit_only = example("audit_only")
    assert audit_only.main(memory=100) == 1
    # A mean over all steps is one hop from each, so that fading is no more than a risk.
    assert "RG407" in capsys.readouterr().out
    assert audit_only.main(memory=3) == 0


def test_test_gradient_health(root: Path, fresh_python: Callable[..., str]) -> None:
    file = root / "examples" / "test_gradient_health.py"
    # Uninstalled, the plugin has to be named; installed, naming it would load it twice.
    installed = entry_points(group="pytest11", name="rnnguard")
    named = [] if installed else ["-p", "rnnguard.pytest_plugin"]
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", *named]
    printed = fresh_python("-m", "pytest", *options, str(file))
    assert "4 passed" in printed and "4 tests audited" in printed
