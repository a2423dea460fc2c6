"""Candidates train under the snapshot: nothing remains, the better one wins, errors only lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import joblib
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

import rnnguard.racing
from rnnguard.decision.halving import Budget
from rnnguard.errors import Refusal, UndoError
from rnnguard.inspection.batches import given_batches
from rnnguard.probe.snapshot import fingerprint
from rnnguard.probe.subject import Subject
from rnnguard.race import NOTHING, Race
from rnnguard.racing import raced
from rnnguard.records import Change, Dose
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.transaction import rolled_back

FEATURES, HIDDEN, STEPS = 5, 16, 30
CHRONO = Change(remedy="chrono_bias", path="rnn", tier="values", dose={"t_max": STEPS, "seed": 0})
MORPH = Change(remedy="layer_norm", path="rnn", tier="structure")
CLIP = Change(remedy="clip_gradient", path=None, tier="step", dose={"max_norm": 5.0})
BUDGET = Budget(steps=80, total=2000, seconds=60)


class LastStep(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.drop(self.rnn(x)[0][:, -1]))
        return output


def recall(count: int) -> list[tuple[Tensor, Tensor]]:
    """The label is shown at the first step, among noise afterwards."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        label = torch.randint(4, (32,), generator=generator)
        x = torch.zeros(32, STEPS, FEATURES)
        x[torch.arange(32), 0, label] = 1
        x[:, 1:, 4] = torch.randn(32, STEPS - 1, generator=generator)
        batches.append((x, label))
    return batches


# Of the module, since what a step's closure holds would be given back as well.
SEEN: list[list[float]] = []


def seen_step(model: nn.Module, batch: Any) -> Tensor:
    SEEN[-1].append(float(batch[0].sum()) + float(torch.rand(1)))
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def subject(
    count: int = 40, rate: float = 2e-2, model: nn.Module | None = None, step: Any = None
) -> Subject:
    torch.manual_seed(0)
    model = LastStep() if model is None else model
    loss = None if step else nn.CrossEntropyLoss()
    batches = given_batches(model, recall(count), None, loss, step, count)
    assert batches is not None
    return Subject(model, Adam(model.parameters(), lr=rate), batches, None, None, 0, False)


def race(mine: Subject, *plans: Sequence[Change], **options: Any) -> Race:
    options = {"rates": False} | options
    guard, budget = options.pop("guard", (CLIP,)), options.pop("budget", BUDGET)
    return raced(mine, [tuple(plan) for plan in plans], guard, budget, **options)


def fates(found: Race) -> dict[str, str]:
    return {entry.candidate.name: entry.fate for entry in found.entries}


def test_what_learns_wins_and_nothing_has_happened() -> None:
    mine = subject(model=LastStep(dropout=0.1))
    before = fingerprint(mine.model, mine.optimizer)
    found = race(mine, [CHRONO])
    assert fates(found) == {NOTHING: "not better", "chrono_bias": "won"}
    assert found.winner.changes == (CHRONO,)
    assert found.complete and found.steps == sum(
        len(course.losses) for heat in found.heats for course in heat.courses
    )
    assert fingerprint(mine.model, mine.optimizer) == before


def test_what_changes_nothing_that_matters_does_not_win() -> None:
    harmless: Dose = {"t_max": 3, "seed": 0}
    found = race(subject(rate=1e-5), [CHRONO.model_copy(update={"dose": harmless})])
    assert found.winner.name == NOTHING


def test_all_see_the_same_batches_and_the_same_draws() -> None:
    course = rnnguard.racing.Arena.course

    def watched(self: Any, *args: Any) -> Any:
        SEEN.append([])
        return course(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rnnguard.racing.Arena, "course", watched)
        race(subject(step=seen_step), [CHRONO], [MORPH])
    first, second = SEEN[:3], SEEN[3:]
    assert len(first[0]) == 40 and first[0] == first[1] == first[2]
    assert len(second[0]) == 80 and all(one == second[0] for one in second)
    assert second[0][:40] != first[0]


def test_a_structure_that_trains_is_taken_back_too() -> None:
    mine = subject()
    before, kind = fingerprint(mine.model, mine.optimizer), type(mine.model.get_submodule("rnn"))
    found = race(mine, [CHRONO, MORPH])
    assert type(mine.model.get_submodule("rnn")) is kind
    assert fingerprint(mine.model, mine.optimizer) == before
    assert found.heats[0]["chrono_bias + layer_norm"].sound


def test_the_less_invasive_of_two_that_learn_alike_wins() -> None:
    """A bound that no matrix comes near changes nothing but the class."""
    bound = Change(remedy="spectral_bound", path="rnn", tier="structure", dose={"bound": 1e3})
    found = race(subject(), [CHRONO, bound], [CHRONO])
    first = found.heats[0]
    assert first["chrono_bias"].losses == pytest.approx(
        first["chrono_bias + spectral_bound"].losses, rel=1e-3
    )
    assert found.winner.name == "chrono_bias"


def test_an_error_in_a_candidate_only_loses() -> None:
    class Strict(LastStep):
        def forward(self, x: Tensor) -> Tensor:
            if type(self.rnn) is not nn.LSTM:
                raise TypeError("an nn.LSTM it must be")
            return super().forward(x)

    mine = subject(model=Strict())
    before = fingerprint(mine.model, mine.optimizer)
    found = race(mine, [MORPH], [CHRONO])
    assert fates(found)["layer_norm"] == "stopped"
    words = {entry.candidate.name: entry.words for entry in found.entries}
    assert words["layer_norm"] == "TypeError: an nn.LSTM it must be"
    assert found.winner.name == "chrono_bias"
    assert fingerprint(mine.model, mine.optimizer) == before


def test_a_way_back_that_fails_is_told_and_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(edit: Edit, mark: int = 0) -> Any:
        rolled_back(edit, mark)
        return (Refusal("RG917", "rnn", "it is stuck.", "Build the model anew."),), None

    monkeypatch.setattr(rnnguard.racing, "rolled_back", stuck)
    with pytest.raises(UndoError, match="it is stuck"):
        race(subject(), [CHRONO])


def test_what_cannot_be_applied_is_no_candidate() -> None:
    found = race(subject(), [CHRONO.model_copy(update={"path": "nowhere"})], [CHRONO])
    assert set(fates(found)) == {NOTHING, "chrono_bias"}
    assert found.left_out == ("chrono_bias",)


def test_what_there_is_no_budget_for_is_told() -> None:
    found = race(subject(), [CHRONO], [MORPH], budget=Budget(steps=20, total=60, seconds=60))
    assert set(fates(found)) == {NOTHING, "chrono_bias"}
    assert found.left_out == ("layer_norm",)


def test_an_interrupt_restores_everything() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        if type(model.rnn) is not nn.LSTM:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    mine = subject(step=step)
    before = fingerprint(mine.model, mine.optimizer)
    with pytest.raises(KeyboardInterrupt):
        race(mine, [CHRONO, MORPH])
    assert fingerprint(mine.model, mine.optimizer) == before


def test_time_that_is_up_leaves_all_as_it_was() -> None:
    found = race(subject(), [CHRONO], budget=Budget(steps=80, total=2000, seconds=0.0))
    assert found.winner.name == NOTHING and not found.complete


def test_progress_is_told() -> None:
    told: list[tuple[int, str]] = []
    found = race(subject(), [CHRONO], told=lambda steps, words: told.append((steps, words)))
    assert sum(steps for steps, _ in told) == found.steps
    assert any("chrono_bias" in words for _, words in told)


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_other_backends_find_the_same(backend: str) -> None:
    alone = race(subject(), [CHRONO])
    with joblib.parallel_config(backend=backend, n_jobs=2):
        together = race(subject(), [CHRONO])
    assert fates(together) == fates(alone)
    for one, other in zip(alone.heats, together.heats, strict=True):
        for course in one.courses:
            assert other[course.candidate].losses == pytest.approx(course.losses, rel=1e-4)
