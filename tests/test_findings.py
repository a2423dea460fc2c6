"""What an audit says besides figures: advice, foreign parameters, watched steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.cli import main
from rnnguard.decision.settings import Settings

X, Y = torch.randn(6, 20, 5), torch.randint(3, (6,))
CE = nn.CrossEntropyLoss()
OFF = Settings(severity={"RG305": "off"})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    CE(model(batch[0]), batch[1]).backward()
    optimizer.step()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def found(report: rnnguard.Report) -> dict[str, str]:
    return {finding.code: finding.severity for finding in report.findings}


def test_an_optimizer_of_another_model_is_a_finding_of_the_audit() -> None:
    model, other = Net(), Net()
    optimizer = torch.optim.Adam(other.parameters())
    report = rnnguard.audit(model, optimizer, [(X, Y)], loss=CE, memory=4)
    assert found(report)["RG506"] == "error"
    with pytest.raises(rnnguard.RefusedError, match="RG904"):
        rnnguard.stabilize(model, optimizer, [(X, Y)], loss=CE, memory=4)


def test_a_training_step_is_watched() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    given: dict[str, Any] = {"data": [(X, Y)] * 2, "loss": CE, "memory": 4}
    assert "RG502" not in found(rnnguard.audit(model, optimizer, **given))
    report = rnnguard.audit(model, optimizer, train_step=step, **given)
    (late,) = [finding for finding in report.findings if finding.code == "RG502"]
    assert late.severity == "error" and "test_findings.py" in str(late.location)
    with pytest.raises(rnnguard.RefusedError, match="no optimizer"):
        rnnguard.audit(model, train_step=step, **given)


def test_a_training_step_that_cannot_be_watched_is_noted() -> None:
    def broken(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        raise KeyError("labels")

    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    report = rnnguard.audit(model, optimizer, [(X, Y)], loss=CE, memory=4, train_step=broken)
    assert any("KeyError" in note for note in report.notes)


def advised(report: rnnguard.Report) -> list[str]:
    return [note for note in report.notes if note.startswith("Advice for `rnn`: ")]


def test_advice_is_said_and_names_its_site() -> None:
    """The input goes around the recurrence too, so that its gradient is not all there is."""

    class Around(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean(1)[:, :3]

    model = Around()
    (said,) = advised(rnnguard.audit(model, inputs=X, memory=18))
    assert "held-out score" in said
    optimizer = torch.optim.Adam(model.parameters())
    mended = rnnguard.stabilize(model, optimizer, inputs=X, memory=18)
    assert mended["rnn"].level == "healthy" and advised(mended) == []


def test_advice_does_not_repeat_a_finding() -> None:
    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            _, state = self.rnn(x[:, :10])
            logits: Tensor = self.head(self.rnn(x[:, 10:], state.detach())[1][-1])
            return logits

    report = rnnguard.audit(Cut(), inputs=X, memory=18)
    assert "RG305" in found(report) and advised(report) == []
    assert "through 18 steps" in advised(rnnguard.audit(Cut(), inputs=X, memory=18, rules=OFF))[0]


def test_the_command_line_watches_and_tries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from test_findings import CE, X, Y, Net, step\n"
        "import torch\n"
        "model = Net()\n"
        "optimizer = torch.optim.Adam(model.parameters())\n"
        "data = [(X, Y)] * 2\n"
    )
    words = [f"--{name}={file}:{name}" for name in ("data", "optimizer")]
    words += [f"--train-step={file}:step", "--loss=torch.nn:CrossEntropyLoss()", "--trial=4"]
    assert main(["audit", f"{file}:model", *words, "--memory=4", "--isolated"]) == 1
    said = capsys.readouterr().out
    assert "RG502 error  clip-out-of-order" in said and "Trial: 4 real steps" in said
