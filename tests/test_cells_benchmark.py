"""The benchmark of the cells runs, on tiny sizes, and judges every cell that has a target."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


def test_every_cell_is_timed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root))
    cells = importlib.import_module("benchmarks.cells")
    rows = list(cells.rows(True))
    assert {row["cell"].removesuffix(", plain loop") for row in rows} == set(cells.cases())
    assert all(float(row["ratio"]) > 0 for row in rows)
    assert {row["met"] for row in rows if row["target"]} <= {"True", "False"}
    assert cells.peak("IndRNN:own", (8, 2, 5)) >= 0
