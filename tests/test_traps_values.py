"""Trap 34: weights that came out of training are not initialised again.

It runs a second time against a plausible first implementation, and fails there.
"""

from __future__ import annotations

import pytest
import torch
from naive import fooled_by
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

import rnnguard
from rnnguard.measurements import Provenance
from rnnguard.probe import measurement

IN, HIDDEN, STEPS, BATCH = 3, 8, 12, 8


class Net(nn.Module):
    """A recurrence that fades on weak input, and what reads its last step."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(IN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


def stabilized(model: nn.Module) -> rnnguard.Report:
    """With a fresh optimizer, as after a checkpoint was loaded."""
    x = torch.randn(BATCH, STEPS, IN, generator=torch.Generator().manual_seed(1))
    return rnnguard.stabilize(model, SGD(model.parameters(), lr=0.1), inputs=x, memory=STEPS)


def only_the_optimizer_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The obvious version: no optimizer state, so it cannot have been trained."""
    fresh = Provenance(verdict="untrained", reason="the optimizer has no state")
    monkeypatch.setattr(measurement, "provenance_of", lambda *_: fresh)


@fooled_by(only_the_optimizer_is_asked)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("steps", [1, 20])
def test_trap_34_loaded_checkpoint_not_overwritten(kind: type[nn.RNNBase], steps: int) -> None:
    torch.manual_seed(0)
    trained, model, untrained = Net(kind), Net(kind), Net(kind)
    optimizer = SGD(trained.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(BATCH, STEPS, IN)
        torch.autograd.backward(functional.cross_entropy(trained(x), (x[:, 0, 0] > 0).long()))
        optimizer.step()
    model.load_state_dict(trained.state_dict())
    report = stabilized(model)
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert [(refusal.code, refusal.path) for refusal in report.refusals] == [("RG902", "rnn")]
    known = report["rnn"].provenance
    assert known is not None and known.reason in report.refusals[0].fact
    # What is kept here is changed in a model that was never trained.
    assert {change.tier for change in stabilized(untrained).changes} > {"step"}
