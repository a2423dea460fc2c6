"""What an optimizer tells about the weights that it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

import rnnguard
from rnnguard.inspection.progress import progress_of, steps_made

KEEPS_STATE = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    **{
        name: lambda p, name=name: getattr(optim, name)(p, lr=0.1)
        for name in ("Adam", "NAdam", "Adagrad", "Rprop", "ASGD", "LBFGS", "Adafactor", "RMSprop")
    },
}


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))]


def step(optimizer: Optimizer, own: list[nn.Parameter]) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in own]).sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("build", KEEPS_STATE.values(), ids=KEEPS_STATE)
def test_a_step_is_seen_and_a_new_optimizer_is_not(build: Any) -> None:
    own = parameters()
    optimizer = build(own)
    assert steps_made(own, optimizer) == 0 and progress_of(own, optimizer) is None
    step(optimizer, own)
    assert steps_made(own, optimizer) != 0
    for weight in own:  # LBFGS keeps one state for all of them
        found = progress_of([weight], optimizer)
        assert found is not None and found.verdict == "trained"


def test_steps_with_other_weights_are_not_the_recurrences() -> None:
    """A front end that was trained first, and a new recurrence added to the optimizer."""
    front, own = parameters(), parameters()
    optimizer = Adam(front)
    step(optimizer, front)
    optimizer.add_param_group({"params": own})
    assert progress_of(own, optimizer) is None
    assert progress_of(front, optimizer) is not None


def test_counts_in_the_group() -> None:
    own = parameters()
    optimizer = SGD(own, lr=0.1)
    assert progress_of(own, optimizer) is None
    optimizer.param_groups[0]["rnnguard_step"] = 0
    assert progress_of(own, optimizer) is None
    optimizer.param_groups[0]["rnnguard_step"] = 7
    found = progress_of(own, optimizer)
    assert found is not None and "7 steps" in found.reason


def test_plain_sgd_is_seen_by_a_scheduler() -> None:
    own = parameters()
    optimizer = SGD(own, lr=0.1)
    StepLR(optimizer, 1)
    assert progress_of(own, optimizer) is None
    step(optimizer, own)
    assert progress_of(own, optimizer) is not None


def test_frozen_and_foreign_weights_are_not_ours_to_change() -> None:
    own = parameters()
    found = progress_of(own, SGD(own[:1], lr=0.1))
    assert found is not None and (found.verdict, found.trained) == ("unsure", True)
    own[1].requires_grad_(False)
    found = progress_of(own, None)
    assert found is not None and "frozen" in found.reason


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


def test_a_trial_that_was_taken_back_is_no_training() -> None:
    """The scheduler's note on the optimizer is given back, too."""
    torch.manual_seed(0)
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    StepLR(optimizer, 1)
    data = [(torch.randn(6, 10, 4), torch.randint(2, (6,))) for _ in range(2)]
    for _ in range(2):
        report = rnnguard.audit(
            model, optimizer, data, loss=nn.CrossEntropyLoss(), memory=10, trial=5
        )
        found = report["rnn"].provenance
        assert found is not None and found.verdict == "untrained", found
