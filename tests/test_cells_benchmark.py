"""The benchmark of the cells runs, on tiny sizes, and its naive loops are the cells' own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

SIZE = (8, 2, 5)
LOOPED = (
    "LSTM", "IndRNN", "LayerNormLSTM", "ZoneoutLSTM", "LayerNormGRU", "ZoneoutGRU", "GateLastGRU",
    "LayerNormRNN", "ResidualRNN", "BoundedRNN", "GatedRNN",
)  # fmt: skip


@pytest.fixture
def cells(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root))
    return importlib.import_module("benchmarks.cells")


def test_every_cell_is_timed(cells: Any) -> None:
    rows = list(cells.rows(True))
    named = {row["cell"] for row in rows}
    assert {name for name in named if not name.endswith((", naive loop", ", rung 0"))} == set(
        cells.cases()
    )
    assert {f"{name}, naive loop" for name in LOOPED} <= named
    assert {f"{name}, rung 0" for name, case in cells.cases().items() if case.loop} <= named
    assert all(float(row["ratio"]) > 0 for row in rows)
    assert {row["met"] for row in rows if row["target"]} <= {"True", "False"}


@pytest.mark.parametrize("run", ["torch", "own", "naive"])
def test_memory_is_measured(cells: Any, run: str) -> None:
    assert cells.peak(f"IndRNN:{run}", SIZE) >= 0


def test_naive_loops_take_every_second_turn(cells: Any) -> None:
    calls = {"torch": 0, "naive loop": 0}

    def count(name: str) -> None:
        calls[name] += 1

    works = {name: lambda name=name: count(name) for name in calls}
    found = cells.turns(works, 0.0, 5)
    assert ["naive loop" in turn for turn in found] == [True, False, True, False, True]
    assert calls == {"torch": 6, "naive loop": 4}  # one more each: unmeasured


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_a_naive_loop_gives_the_cells_own_outputs(cells: Any, name: str, spread: float) -> None:
    """Also with weights so large that a bound is at work."""
    loops = importlib.import_module("benchmarks.naive_loops")
    module = cells.cases()[name].build(3, 5, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-spread, spread)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(loops.naive(module, x), module(x)[0], rtol=1e-10, atol=1e-10)


def test_every_cell_with_a_recurrence_of_its_own_has_a_naive_loop(cells: Any) -> None:
    loops = importlib.import_module("benchmarks.naive_loops")
    looped = {name for name, case in cells.cases().items() if type(case.build(1, 1)) in loops.LOOPS}
    assert looped == set(LOOPED)


@pytest.mark.parametrize("name", ["ZoneoutLSTM", "ZoneoutGRU"])
def test_naive_zoneout_draws_in_training(cells: Any, name: str) -> None:
    """With nearly every unit kept at every step, outputs hardly leave their zeros."""
    loops = importlib.import_module("benchmarks.naive_loops")
    module = cells.cases()[name].build(3, 50, zoneout_hidden=0.99, dtype=torch.float64)
    x = torch.randn(1, 20, 3, dtype=torch.float64)
    kept = float((loops.naive(module, x) == 0).double().mean())
    assert 0.95 < kept < 1.0
    assert not bool((loops.naive(module.eval(), x) == 0).any())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_is_timed_as_asked(cells: Any, precision: str) -> None:
    """On a GPU they differ; that they run shows here."""
    place, before = cells.Place("cpu", precision), torch.get_float32_matmul_precision()
    with place.entered():
        asked = torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()
    assert asked == (precision in ("bf16", "fp16"), "high" if precision == "tf32" else "highest")
    assert torch.get_float32_matmul_precision() == before
    if precision == "fp16":
        return  # torch's LSTM has none on a CPU
    (row, *_) = cells.time_rows("LayerNormLSTM", cells.cases()["LayerNormLSTM"], SIZE, True, place)
    assert row["precision"] == precision and float(row["ratio"]) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_cell_is_measured_on_a_gpu(cells: Any) -> None:
    rows = list(cells.rows_on_gpu(["fp32"], quick=True))
    assert {row["figure"] for row in rows} == {cells.TIME, "peak memory"}
    assert set(cells.cases()) <= {row["cell"] for row in rows}
