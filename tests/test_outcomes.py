"""What training achieves with the one line and without it: the smoke part of the evidence."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rnnguard.decision.rulebook import load_rulebook

ROOT = Path(__file__).parents[1]
SEEDS = 5


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules["evidence"] = module
    spec.loader.exec_module(module)
    return module


def scores(evidence: ModuleType, name: str) -> tuple[list[float], list[float], str]:
    task = next(task for task in evidence.all_tasks() if task.name == name)
    row = evidence.row_of(task, SEEDS)
    plain, mended = (list(map(float, row[key].split())) for key in ("nothing", "rnnguard"))
    return plain, mended, row["remedies"]


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_recall_is_learnt_only_with_the_one_line(evidence: ModuleType, cell: str) -> None:
    plain, mended, remedies = scores(evidence, f"recall T=100, {cell}")
    assert max(plain) < 0.4  # chance is 0.25
    assert min(mended) >= 0.95
    assert "chrono_bias" in remedies


def test_what_values_leave_is_learnt_with_a_new_structure(evidence: ModuleType) -> None:
    plain, mended, remedies = scores(evidence, "recall T=100, tanh RNN")
    assert max(plain) < 0.4 and min(mended) >= 0.95
    assert remedies == "orthogonal+gated_rnn"


def test_digits_gain_and_never_lose(evidence: ModuleType) -> None:
    plain, mended, remedies = scores(evidence, "digits, tanh RNN")
    gains = sorted(after - before for before, after in zip(plain, mended, strict=True))
    assert gains[SEEDS // 2] >= 0.05
    assert gains[0] >= -0.01
    assert remedies == "orthogonal"


def test_a_healthy_model_is_left_alone(evidence: ModuleType) -> None:
    plain, mended, remedies = scores(evidence, "recall T=10, GRU")
    assert remedies == "step tier only"
    assert all(after >= before - 0.01 for before, after in zip(plain, mended, strict=True))


def test_every_cited_row_of_the_evidence_exists() -> None:
    with (ROOT / "benchmarks" / "results" / "evidence.csv").open(newline="") as file:
        rows = {row["row"] for row in csv.DictReader(file)}
    cited = {
        reference.removeprefix("evidence: ")
        for scenario in load_rulebook().scenarios
        for reference in scenario.refs
        if reference.startswith("evidence: ")
    }
    assert cited and cited <= rows
