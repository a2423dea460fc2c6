"""What a test suite can hold on to: how far back the gradient of your model reaches.

The fixture `rnn_audit` comes with rnnguard. In your repository `build_model` would be imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rnnguard

MEMORY = 50  # steps that the task has to look back


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(out[:, -1])


def build_model() -> Encoder:
    """The model as the training script starts with it."""
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.Adam(model.parameters())
    rnnguard.stabilize(model, optimizer, inputs=signals(), memory=MEMORY)
    return model


def signals() -> Tensor:
    return torch.randn(8, 64, 8, generator=torch.Generator().manual_seed(0))


def test_nothing_stands_in_the_way_of_the_gradient(rnn_audit):
    report = rnn_audit(build_model(), inputs=signals(), memory=MEMORY)
    report.assert_clean(fail_on="warning")


def test_the_gradient_reaches_back_far_enough(rnn_audit):
    report = rnn_audit(build_model(), inputs=signals(), memory=MEMORY)
    assert report["lstm"].effective_length >= MEMORY


def test_the_audit_leaves_the_model_as_it_is(rnn_audit):
    model = build_model()
    before = [parameter.clone() for parameter in model.parameters()]
    rnn_audit(model, inputs=signals(), memory=MEMORY)
    assert all(map(torch.equal, before, model.parameters()))


def test_the_audit_sees_a_model_that_forgets(rnn_audit):
    """The same model without the line that stabilizes it."""
    torch.manual_seed(0)
    report = rnn_audit(Encoder(), inputs=signals(), memory=MEMORY)
    with pytest.raises(pytest.fail.Exception, match="vanishing-through-time"):
        report.assert_clean()
