"""The benchmark of trained-weight protection runs, and counts as it says."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "provenance.py"


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("provenance_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    assert benchmark.wilson(0, 400)[1] == pytest.approx(0.0095, abs=1e-4)
    assert benchmark.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    output = tmp_path / "quick.csv"
    benchmark.main(["--quick", "--output", str(output)])
    with output.open() as file:
        rows = [row for row in csv.DictReader(file) if row["precision"] == "float32"]
    assert all(row["rate"] == ("0.0000" if row["steps"] == "0" else "1.0000") for row in rows)
    assert {"0", "1", "3"} == {row["steps"] for row in rows}
    assert "float32 | default | fresh" in capsys.readouterr().out
