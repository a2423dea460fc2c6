"""Whether a kept state can be reset, by the code that there is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import recorded
from torch import Tensor, nn

from rnnguard.inspection.recording import record
from rnnguard.probe.carryover import answers_differently, carried_over, kept_tensors
from rnnguard.probe.resettable import holders, resets, resettable
from rnnguard.probe.snapshot import untouched
from rnnguard.probe.stillness import reseed

B, T, F, H = 4, 7, 3, 8
X = torch.randn(B, T, F)


class Keeps(nn.Module):
    """Goes on from where the last batch ended."""

    rnn: Any
    left: Any

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(F, H, batch_first=True)
        self.ended: Any = None

    def forward(self, x: Tensor) -> Any:
        out, end = self.rnn(x, self.ended)
        self.ended = end.detach()
        return out


class Around(nn.Module):
    inner: Any

    def __init__(self, inner: type[nn.Module] = Keeps) -> None:
        super().__init__()
        self.inner = inner()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class InBuffer(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left", torch.zeros(1, B, H))

    def forward(self, x: Tensor) -> Any:
        out, end = self.rnn(x, self.left.clone())
        self._keep(end)
        return out

    def _keep(self, end: Tensor) -> None:
        self.left.copy_(end.detach())


class WithParameters(Keeps):
    def reset_parameters(self) -> None:
        self.rnn.reset_parameters()

    def describe(self) -> Any:
        return self.ended


class Resets(Keeps):
    def new_song(self) -> None:
        self.ended = None


class ResetsByName(Keeps):
    def init_hidden(self, batch: int) -> Tensor:
        return torch.zeros(1, batch, H)


class ResetsBuffer(InBuffer):
    def start(self) -> None:
        self.left.zero_()


class ResetsByProperty(Keeps):
    @property
    def where(self) -> Any:
        return self.ended

    @where.setter
    def where(self, value: Any) -> None:
        self.ended = value


class ResetsBySetattr(Keeps):
    def start(self) -> None:
        for name in ("ended",):
            setattr(self, name, None)


class TakesSign(Keeps):
    def forward(self, x: Tensor, reset: bool = False) -> Any:
        return super().forward(x)


class TakesState(Keeps):
    def forward(self, x: Tensor, hidden: Any = None) -> Any:
        return super().forward(x)


class ResetsInside(Around):
    def start(self) -> None:
        setattr(self.inner, "ended", None)  # noqa: B010


class SetOutside(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.place_of_its_own: Any = None

    def forward(self, x: Tensor) -> Any:
        out, end = self.rnn(x, self.place_of_its_own)
        self.place_of_its_own = end.detach()
        return out


def train(model: SetOutside) -> None:
    model.place_of_its_own = None


@dataclass
class Memory:
    states: list[Any] = field(default_factory=list)

    def reset(self) -> None:
        self.states.clear()


class InObject(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def forward(self, x: Tensor) -> Any:
        out, end = self.rnn(x, self.memory.states[0] if self.memory.states else None)
        self.memory.states[:] = [end.detach()]
        return out


def answers(model: nn.Module, step: Callable[..., Any] | None = None) -> dict[str, bool]:
    with untouched(model):
        kept = kept_tensors(recorded(model, X))
        held = holders(model, kept)
        again = record(lambda: model(X), model, X, kept)
        return resets(model, carried_over(model, again), held, step)


@pytest.mark.parametrize("kind", [Keeps, InBuffer, WithParameters])
def test_no_code_resets_it(kind: type[nn.Module]) -> None:
    assert answers(kind()) == {"rnn": False}
    assert answers(Around(kind)) == {"inner.rnn": False}


@pytest.mark.parametrize(
    "kind",
    [
        *(Resets, ResetsByName, ResetsBuffer, ResetsByProperty, ResetsBySetattr),
        *(TakesSign, TakesState, SetOutside, InObject),
    ],
)
def test_some_code_can(kind: type[nn.Module]) -> None:
    assert answers(kind()) == {"rnn": True}
    assert answers(Around(kind)) == {"inner.rnn": True}


def test_what_holds_it_can() -> None:
    assert answers(ResetsInside()) == {"inner.rnn": True}


def test_the_users_step_can() -> None:
    def step(model: Any, batch: Tensor) -> Any:
        setattr(model, "ended", None)  # noqa: B010
        return model(batch).sum()

    assert answers(Keeps(), step) == {"rnn": True}
    assert answers(Keeps(), lambda model, batch: model(batch).sum()) == {"rnn": False}


def test_a_script_beside_the_model_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("from model import Keeps\nnet.other = None", "job.ended = None"):
        (tmp_path / "train.py").write_text(text, encoding="utf-8")
        assert answers(Keeps()) == {"rnn": False}
    text = "def run():\n    from model import Keeps\n    Keeps().ended = None"
    (tmp_path / "train.py").write_text(text, encoding="utf-8")
    assert answers(Keeps()) == {"rnn": True}


def test_nobody_knows_what_else_a_notebook_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    assert answers(Keeps()) == {"rnn": True}


def test_a_class_without_a_file() -> None:
    code = """
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.last = nn.GRU(3, 8, batch_first=True), None

    def forward(self, x):
        out, end = self.rnn(x, self.last)
        self.last = end.detach()
        return out
"""
    names: dict[str, Any] = {"nn": nn}
    exec(code, names)
    assert answers(names["Own"]()) == {"rnn": False}
    exec(code + "\n    def again(self):\n        self.last = None\n", names)
    assert answers(names["Own"]()) == {"rnn": True}


def test_where_a_tensor_is_held() -> None:
    model = Around(InBuffer)
    lost, inner = torch.zeros(2), model.inner
    assert holders(model, [inner.left, lost]) == [[(inner, "left")], []]
    assert resettable(model, [])


@pytest.mark.parametrize(("kind", "differs"), [(Keeps, True), (nn.Dropout, False)])
def test_the_same_batch_twice(kind: Any, differs: bool) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.noise = kind(), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Any:
            return {"out": self.noise(self.inner(x)), "step": torch.tensor(1)}

    model = Noisy()
    with untouched(model):
        runs = []
        for _ in range(2):
            reseed(0)
            runs.append(recorded(model, X))
        assert answers_differently(*runs) is differs
