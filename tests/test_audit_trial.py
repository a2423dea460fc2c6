"""An audit with a trial: what only real optimizer steps show, with all of them taken back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.errors import RefusedError
from rnnguard.probe.snapshot import fingerprint
from rnnguard.report.report import Report

B, T, F, H = 16, 12, 4, 16


class Reader(nn.Module):
    def __init__(self, *, keeps: bool = False) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(F, H, batch_first=True), nn.Linear(H, 2)
        self.keeps, self.state = keeps, None

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.rnn(x, self.state)
        if self.keeps:
            self.state = state
        return self.head(out[:, -1])


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    drawn = [torch.randn(B, T, F) for _ in range(count)]
    return [(x, (x[:, -1, 0] > 0).long()) for x in drawn]


def audited(
    rate: float = 1e-2, *, keeps: bool = False, poison: int | None = None, steps: int = 40
) -> tuple[Report, bool]:
    """The report, and whether model, optimizer and random state were left as they were."""
    torch.manual_seed(0)
    model, data = Reader(keeps=keeps), batches()
    if poison is not None:
        data[poison][0][3, 5] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    before = fingerprint(model, optimizer)
    report = rnnguard.audit(model, optimizer, data, loss=nn.CrossEntropyLoss(), trial=steps)
    return report, fingerprint(model, optimizer) == before


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings}


def test_a_healthy_run_is_calm_and_learns() -> None:
    report, untouched = audited(0.1)
    run = report.now.run
    assert untouched and run.trial_steps == 40
    assert (run.spike_rate, run.nonfinite_steps, run.improved) == (0.0, 0, True)
    assert run.update_ratio is not None and -6 < run.update_ratio < -1
    assert not codes(report) & {"RG301", "RG410", "RG411", "RG412", "RG509"}
    assert any(note == "Trial: 40 real steps, all taken back." for note in report.notes)


@pytest.mark.parametrize(("rate", "large"), [(3.0, True), (50.0, False)])
def test_too_large_a_rate_is_told(rate: float, large: bool) -> None:
    report, untouched = audited(rate)
    run = report.now.run
    assert untouched and run.improved is False
    assert run.update_ratio is not None and (run.update_ratio > -1) is large
    # A large step is the cause of the rise, and is not told beside it.
    assert "RG412" in codes(report) and "RG509" not in codes(report)


def test_a_batch_that_is_not_finite_is_told_with_its_place() -> None:
    report, untouched = audited(poison=4)
    assert untouched and report.level == "unstable"
    assert report.now.run.nonfinite_steps and "batch 4" in str(report.now.run.first_nonfinite)
    assert codes(report) & {"RG403", "RG411"}


def test_a_missing_detach_is_told_and_does_not_raise() -> None:
    report, untouched = audited(keeps=True)
    assert untouched and "RG301" in codes(report)
    assert report.now.run.trial_stopped is not None and report.now.run.trial_steps <= 1


def test_without_a_trial_there_are_no_such_readings() -> None:
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters())
    run = rnnguard.audit(model, optimizer, batches(), loss=nn.CrossEntropyLoss()).now.run
    assert (run.trial_steps, run.spike_rate, run.improved) == (0, None, None)


def test_a_trial_needs_an_optimizer_a_loss_and_steps() -> None:
    model, data = Reader(), batches()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(RefusedError, match="no optimizer"):
        rnnguard.audit(model, None, data, loss=nn.CrossEntropyLoss(), trial=5)
    with pytest.raises(RefusedError, match="no loss"):
        rnnguard.audit(model, optimizer, data, trial=5)
    with pytest.raises(RefusedError, match=r"-1 steps|RG9"):
        rnnguard.audit(model, optimizer, data, loss=nn.CrossEntropyLoss(), trial=-1)
