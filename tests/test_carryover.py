"""States that go on from batch to batch, with and without their graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


class StatefulLSTM(nn.Module):
    """Keeps its state with the graph, and does something about it when it reads it."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rnn, self.read = nn.LSTM(F, H, 2, batch_first=True), read
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out, self.state = self.rnn(x, None if self.state is None else self.read(self.state))
        return out


@pytest.mark.parametrize(
    ("read", "graph"),
    [
        (lambda s: s, True),
        (lambda s: (s[0].detach(), s[1]), True),
        (lambda s: (0.5 * s[0], s[1].detach()), True),
        (lambda s: (s[0].detach(), s[1].detach()), False),
        (lambda s: tuple(v.data for v in s), False),
        (lambda s: tuple(v.detach_() for v in s), False),
    ],
)
def test_a_state_may_be_detached_where_it_is_read(read: Callable[[Any], Any], graph: bool) -> None:
    report = rnnguard.audit(StatefulLSTM(read), inputs=torch.randn(B, T, F))
    assert report["rnn"].carried_over
    assert report.now.run.graph_kept is graph


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(F, H, batch_first=True)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        out, state = self.rnn(x, state)
        return out, state


class Loop:
    """A training loop that keeps the state itself."""

    def __init__(self, detach: bool) -> None:
        self.state: Tensor | None = None
        self.detach, self.losses = detach, list[Any]()
        self.losses.append(self.losses)

    def step(self, model: nn.Module, x: Tensor) -> Tensor:
        out, state = model(x, self.state)
        self.state = state.detach() if self.detach else state
        loss: Tensor = out.square().mean()
        self.losses.append(loss)
        return loss


def in_closure(detach: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    state: Tensor | None = None

    def step(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal state
        out, end = model(x, state)
        state = end.detach() if detach else end
        loss: Tensor = out.square().mean()
        return loss

    return step


SHARED: dict[str, Any] = {"state": None}


def in_a_global(detach: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        out, end = model(x, SHARED["state"])
        SHARED["state"] = end.detach() if detach else end
        loss: Tensor = out.square().mean()
        return loss

    SHARED["state"] = None
    return step


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("made", [lambda d: Loop(d).step, in_closure, in_a_global])
def test_a_state_that_the_users_step_keeps(made: Callable[[bool], Any], detach: bool) -> None:
    data = [torch.randn(B, T, F) for _ in range(3)]
    report = rnnguard.audit(Decoder(), data=data, step=made(detach))
    assert report["rnn"].carried_over
    assert report.now.run.graph_kept is not detach
    assert "RG303" not in {finding.code for finding in report.findings}


@pytest.mark.parametrize(("how", "recordings"), [("none", 1), ("detached", 2)])
def test_only_a_model_that_keeps_something_is_recorded_again(
    how: str, recordings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(measurement, "record", lambda *a: seen.append(1) or record(*a))
    model = Stateful(how) if how == "detached" else nn.Sequential(nn.GRU(F, H, batch_first=True))
    rnnguard.audit(model, inputs=torch.randn(B, T, F))
    assert len(seen) == recordings
