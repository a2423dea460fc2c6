"""States that go on from batch to batch, with and without their graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.inspection.recording import record
from rnnguard.probe import measurement
from rnnguard.probe.snapshot import fingerprint

B, T, F, H = 4, 12, 3, 8


class Stateful(nn.Module):
    """Starts each batch from the state that the last one ended in."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.rnn, self.seen = how, nn.GRU(F, H, batch_first=True), None
        self._state: Tensor | None = None
        self.register_buffer("memory", torch.zeros(1, B, H))

    def forward(self, x: Tensor) -> Tensor:
        start = self.memory.clone() if self.how == "buffer" else self._state
        out, end = self.rnn(x, start if self.how != "only kept" else None)
        if self.how == "buffer":
            self.memory.copy_(end.detach())
        else:
            self._state = end if self.how in ("graph", "only kept") else end.detach()
        return out[:, -1]


class OwnStateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.h = nn.Linear(F + H, H), None

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), H) if self.h is None else self.h
        for x_t in x.unbind(1):
            h = self.cell(torch.cat([x_t, h], 1)).tanh()
        self.h = h.detach()
        return h


@pytest.mark.parametrize(
    ("how", "carried", "graph"),
    [
        ("detached", True, False),
        ("graph", True, True),
        ("buffer", True, False),
        ("only kept", False, False),
    ],
)
def test_a_state_that_goes_on(how: str, carried: bool, graph: bool) -> None:
    model, x = Stateful(how), torch.randn(B, T, F)
    before = fingerprint(model)
    report = rnnguard.audit(model, inputs=x)
    assert fingerprint(model) == before
    assert report["rnn"].carried_over is carried
    assert report.now.run.graph_kept is graph
    assert ("RG301" in {finding.code for finding in report.findings}) is graph
    assert any("from batch to batch" in note for note in report.notes) is carried


def test_a_hand_written_state_that_goes_on() -> None:
    report = rnnguard.audit(OwnStateful(), inputs=torch.randn(B, T, F))
    assert [site.carried_over for site in report.now.sites] == [True]


@pytest.mark.parametrize(("how", "recordings"), [("none", 1), ("detached", 2)])
def test_only_a_model_that_keeps_something_is_recorded_again(
    how: str, recordings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(measurement, "record", lambda *a: seen.append(1) or record(*a))
    model = Stateful(how) if how == "detached" else nn.Sequential(nn.GRU(F, H, batch_first=True))
    rnnguard.audit(model, inputs=torch.randn(B, T, F))
    assert len(seen) == recordings
