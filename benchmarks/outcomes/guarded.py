"""rnnguard as its README shows it."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch

import rnnguard
from benchmarks.outcomes.policies import Case, Prepared
from rnnguard.report.report import Report


def probed(case: Case) -> Prepared:
    """`stabilize` with the data and the loss, measured but not tried."""
    return _stabilized(case, trial=False)


def tried(case: Case) -> Prepared:
    """The same with candidates trained for some steps and compared."""
    return _stabilized(case, trial=None)


def probed_for_memory(case: Case) -> Prepared:
    """`probed` by a user who knows how far back the answer lies."""
    return _stabilized(case, trial=False, memory=case.task.memory)


def tried_for_memory(case: Case) -> Prepared:
    """`tried` by a user who knows how far back the answer lies."""
    return _stabilized(case, trial=None, memory=case.task.memory)


@cache
def warm_up() -> None:
    """Has everything imported once in this process, as training libraries are, at no charge."""
    model = torch.nn.LSTM(1, 4, batch_first=True)
    optimizer = torch.optim.Adam(model.parameters())
    rnnguard.stabilize(model, optimizer, inputs=torch.randn(2, 8, 1), verbose=False)


def _stabilized(case: Case, *, trial: bool | None, **options: Any) -> Prepared:
    if "trial" in inspect.signature(rnnguard.stabilize).parameters:
        options["trial"] = trial
    elif trial is not False:
        raise NotImplementedError("this rnnguard has no `trial=` in `stabilize`")
    report = rnnguard.stabilize(
        case.model, case.optimizer, case.data, loss=case.loss, total_steps=case.task.budget,
        seed=case.seed, verbose=False, **options,
    )  # fmt: skip
    rates = ", ".join(f"{group['lr']:.3g}" for group in case.optimizer.param_groups)
    peaks = [dose["peak"] for dose in _doses(report) if "peak" in dose]
    return Prepared(
        case.model, case.optimizer, _done(report),
        rate=f"{rates} x{peaks[-1]:.3g}" if peaks else rates,
        words=f"{report.level}; {' '.join(report.notes)}"[:300],
    )  # fmt: skip


def _doses(report: Report) -> list[dict[str, Any]]:
    return [dict(change.dose) for change in report.changes if change.outcome == "applied"]


def _done(report: Report) -> str:
    applied = [change.remedy for change in report.changes if change.outcome == "applied"]
    return " ".join(applied) or "nothing"
