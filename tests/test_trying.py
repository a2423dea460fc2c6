"""The one line with a trial: what wins is applied, nothing else is, and the report says all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

import rnnguard
from rnnguard.errors import RefusedError
from rnnguard.probe.snapshot import fingerprint
from rnnguard.race import NOTHING
from rnnguard.report.report import Report
from rnnguard.rewrite.stepguard import guard_of
from rnnguard.trying import budget_of

STEPS, FEATURES = 40, 5
CE = nn.CrossEntropyLoss()
Batches = list[tuple[Tensor, Tensor]]


class LastStep(nn.Module):
    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0][:, -1])
        return output


def recall(count: int = 100, at: int = 0) -> Batches:
    """The label is shown at one step, among noise in another channel."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        label = torch.randint(4, (32,), generator=generator)
        x = torch.zeros(32, STEPS, FEATURES)
        x[torch.arange(32), at, label] = 1
        x[:, :, 4] = torch.randn(32, STEPS, generator=generator)
        batches.append((x, label))
    return batches


def pair(rate: float = 3e-3) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = LastStep()
    return model, Adam(model.parameters(), lr=rate)


def tried(data: Any = None, rate: float = 3e-3, **options: Any) -> tuple[Report, nn.Module, Any]:
    model, optimizer = pair(rate)
    known: dict[str, Any] = {"loss": CE, "memory": STEPS} | options
    report = rnnguard.stabilize(model, optimizer, recall() if data is None else data, **known)
    return report, model, optimizer


def outcomes(report: Report) -> dict[str, str]:
    return {change.remedy: change.outcome for change in report.changes}


@pytest.fixture(scope="module")
def learnt() -> tuple[Report, nn.Module, Any]:
    return tried(total_steps=1000)


def test_what_learns_in_the_trial_is_applied(learnt: tuple[Report, nn.Module, Any]) -> None:
    report, model, optimizer = learnt
    assert report.trial is not None
    winner = report.trial.winner
    assert winner.changes and winner.rate > 1
    assert outcomes(report)["chrono_bias"] == "applied"
    (chrono,) = (change for change in report.changes if change.remedy == "chrono_bias")
    assert "log10 R" in chrono.result and "trial: loss" in chrono.result
    guard = guard_of(optimizer)
    assert guard is not None and guard.settings.peak == winner.rate
    assert guard.settings.total_steps == 1000
    # At rest the rate is the user's own.
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3]
    assert report["rnn"].level == "healthy"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_plan_replays_what_won(learnt: tuple[Report, nn.Module, Any]) -> None:
    report, model, _ = learnt
    other, optimizer = pair()
    rnnguard.apply(other, optimizer, rnnguard.Plan.from_json(report.plan.to_json()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    guard = guard_of(optimizer)
    assert guard is not None and guard.settings.peak > 1


def test_the_report_shows_all_candidates(learnt: tuple[Report, nn.Module, Any]) -> None:
    report = learnt[0]
    race = report.trial
    assert race is not None
    text, page = str(report), report.to_html()
    data = json.loads(report.to_json())["trial"]
    assert data["entries"][0]["candidate"]["name"] == NOTHING
    assert len(data["heats"]) == len(race.heats) >= 2
    for entry in race.entries:
        assert f"{entry.fate}: {entry.words.split()[0]}" in " ".join(text.split())
        assert entry.candidate.name in page
    assert f"{race.steps} of {race.budget_steps} steps" in text
    assert race.steps <= race.budget_steps


def test_what_does_not_learn_leaves_model_and_rate_alone() -> None:
    noise = [(x, y[torch.randperm(32)]) for x, y in recall()]
    report, model, optimizer = tried(noise, total_steps=1000)
    untouched, _ = pair()
    for name, value in untouched.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert report.trial is not None and report.trial.winner.name == NOTHING
    assert {c.tier for c in report.changes if c.outcome == "applied"} == {"step"}
    guard = guard_of(optimizer)
    assert guard is not None
    assert (guard.settings.peak, guard.settings.total_steps) == (1.0, None)
    assert outcomes(report)["chrono_bias"] == "taken back"
    assert report["rnn"].level == "vanishing"


def test_what_needs_no_memory_only_gets_a_rate() -> None:
    report, _, _ = tried(recall(at=STEPS - 1), rate=1e-3, memory=1, total_steps=1000)
    assert report.trial is not None
    assert {c.tier for c in report.changes if c.outcome == "applied"} == {"step"}
    assert report.trial.winner.rate > 1


def test_a_scheduler_of_the_users_own_keeps_the_rate() -> None:
    model, optimizer = pair(3e-2)
    StepLR(optimizer, 100)
    report = rnnguard.stabilize(model, optimizer, recall(), loss=CE, memory=STEPS)
    assert report.trial is not None
    assert {entry.candidate.rate for entry in report.trial.entries} == {1.0}
    guard = guard_of(optimizer)
    assert guard is not None and guard.settings.peak == 1.0
    assert "A scheduler sets the learning rate" in str(report).replace("\n", " ")


def test_without_a_trial_the_probe_has_the_word() -> None:
    report, _, _ = tried(trial=False)
    assert report.trial is None and outcomes(report)["chrono_bias"] == "applied"


def test_few_batches_are_no_trial_unless_asked_for() -> None:
    report, _, _ = tried(recall(8))
    assert report.trial is None and outcomes(report)["chrono_bias"] == "applied"
    assert any("8 batches are learnt by heart" in note for note in report.notes)
    asked, _, _ = tried(recall(8), trial=20)
    assert asked.trial is not None and asked.trial.batches == 8
    assert any("trained on 8 batches" in note for note in asked.notes)


def test_an_iterator_is_not_eaten_up() -> None:
    batches = iter(recall(60))
    report, _, _ = tried(batches)
    assert report.trial is None
    assert len(list(batches)) == 52


def test_a_second_time_nothing_is_tried() -> None:
    report, model, optimizer = tried()
    assert report.trial is not None
    before = fingerprint(model, optimizer)
    again = rnnguard.stabilize(model, optimizer, recall(), loss=CE, memory=STEPS)
    assert again.trial is None and not again.changes
    assert fingerprint(model, optimizer) == before


def test_undo_takes_back_what_won() -> None:
    model, optimizer = pair()
    before = fingerprint(model, optimizer)
    report = rnnguard.stabilize(model, optimizer, recall(), loss=CE, memory=STEPS)
    assert report.changes
    report.undo()
    assert fingerprint(model, optimizer) == before


def test_a_plan_with_a_trial_changes_nothing() -> None:
    model, optimizer = pair()
    before = fingerprint(model, optimizer)
    plan = rnnguard.plan(model, optimizer, recall(), loss=CE, memory=STEPS)
    assert "chrono_bias" in [change.remedy for change in plan]
    assert fingerprint(model, optimizer) == before


def test_an_interrupt_in_the_trial_restores_everything() -> None:
    model, optimizer = pair()

    class Interrupted(nn.CrossEntropyLoss):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            # Only a step that was taken leaves a state, and only the trial takes one.
            if optimizer.state:
                raise KeyboardInterrupt
            return super().forward(output, target)

    before = fingerprint(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        rnnguard.stabilize(model, optimizer, recall(), loss=Interrupted(), memory=STEPS)
    assert fingerprint(model, optimizer) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trial": 3}, "3 is no number of steps"),
        ({"trial": "long"}, "'long' is no number of steps"),
        ({"trial": True, "loss": None}, "needs something to learn from"),
    ],
)
def test_a_trial_that_cannot_be_meant_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        tried(**options)


def test_budgets_follow_the_training() -> None:
    assert (budget_of(None, 1600).steps, budget_of(None, 1600).total) == (100, 640)
    assert [budget_of(None, total).steps for total in (100, 10**6, None)] == [80, 200, 100]
    assert (budget_of(50, 10**6).steps, budget_of(50, None).total) == (50, 400)
