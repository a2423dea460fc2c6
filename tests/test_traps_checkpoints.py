"""Traps 24 to 26: copies of a rewritten model, and checkpoints that cross a rewrite."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from naive import fooled_by
from torch import Tensor, nn
from torch.optim import Adam

import rnnguard
from rnnguard.errors import RNNGuardWarning
from rnnguard.nn import output_norm
from rnnguard.records import Change, Plan
from rnnguard.rewrite.stepguard import guard_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0][:, -1])
        return output


PLAN = Plan(
    changes=(
        Change(remedy="clip_gradient", path=None, tier="step", dose={"max_norm": 1.0},
               scenario="test", why="A test."),
        Change(remedy="layer_norm", path="rnn", tier="structure", dose={}, scenario="test",
               why="A test."),
    )
)  # fmt: skip
X = torch.linspace(-1, 1, 30).view(2, 5, 3)


def rewritten() -> tuple[Model, Adam, rnnguard.Report]:
    model = Model()
    optimizer = Adam(model.parameters())
    return model, optimizer, rnnguard.apply(model, optimizer, PLAN)


def by_a_closure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm by a forward of the instance, which copies share and no pickle takes."""
    from rnnguard.remedies import layer_norm

    def apply(edit: object, module: nn.Module, dose: object) -> None:
        module.output_norm = norm = nn.LayerNorm(4, eps=output_norm.EPSILON)
        inner = module.forward

        def forward(x: Tensor) -> tuple[Tensor, object]:
            output, state = inner(x)
            return norm(output), state

        module.forward = forward
        edit.write_(module.bias_hh_l0, torch.zeros(16))  # something to undo

    monkeypatch.setitem(vars(layer_norm.LAYER_NORM), "apply", apply)


@fooled_by(by_a_closure)
def test_trap_24_copy_and_pickle_of_a_rewritten_model() -> None:
    model, optimizer, _ = rewritten()
    expected = model(X)
    (twin, twin_optimizer), file = copy.deepcopy((model, optimizer)), io.BytesIO()
    with torch.no_grad():
        model.rnn.output_norm.weight.mul_(2)
    assert torch.equal(twin(X), expected), "the copy shares its norm with the model"
    try:
        torch.save(twin, file)
    except (AttributeError, TypeError) as error:
        pytest.fail(f"the model cannot be saved: {error}")
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded.rnn) is type(model.rnn)
    assert torch.equal(loaded(X), expected)
    assert [id(p) for p in twin.parameters()] != [id(p) for p in model.parameters()]
    # A copied optimizer has lost its guard, as the facts say, and gets it by the plan alone.
    assert guard_of(twin_optimizer) is None
    again = rnnguard.apply(twin, twin_optimizer, PLAN)
    assert [change.remedy for change in again.changes] == ["clip_gradient"]


def loads_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that makes up for missing keys by itself: the norm is quietly left as it is."""

    def load(self: nn.Module, state: dict[str, Tensor], prefix: str, *more: object) -> None:
        for name, value in self.output_norm.state_dict().items():
            state.setdefault(f"{prefix}output_norm.{name}", value)
        nn.Module._load_from_state_dict(self, state, prefix, *more)

    monkeypatch.setattr(output_norm._OutputNorm, "_load_from_state_dict", load)


@fooled_by(loads_in_silence)
def test_trap_25_old_checkpoint_into_a_rewritten_model() -> None:
    old = Model().state_dict()
    model, _, report = rewritten()
    with (
        pytest.warns(RNNGuardWarning, match=r"`rnn`: the checkpoint is from before the rewrite"),
        pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*rnn\.output_norm"),
    ):
        model.load_state_dict(old)
    # torch has copied by then what it could, so that the values count as changed.
    report.undo(structure=True)
    model.load_state_dict(old)
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    again, _, _ = rewritten()
    with pytest.warns(RNNGuardWarning, match="strict=False"):
        again.load_state_dict(old, strict=False)
    # Replay works the other way round too: the plan first, then what was saved under it.
    fresh, _, _ = rewritten()
    fresh.load_state_dict(again.state_dict())
    assert torch.equal(fresh(X), again(X))


def leaves_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """An undo that gives the class back and forgets the child: its keys still load, unused."""
    real = nn.Module.__delattr__

    def delattr_(self: nn.Module, name: str) -> None:
        if name != "output_norm":
            real(self, name)

    monkeypatch.setattr(nn.Module, "__delattr__", delattr_)


@fooled_by(leaves_the_child)
def test_trap_26_rewritten_checkpoint_into_a_plain_model() -> None:
    model, optimizer, report = rewritten()
    with torch.no_grad():
        model.rnn.output_norm.weight.mul_(2)
    expected, checkpoint = model(X), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.rnn.output_norm.weight.div_(2)
    # Nothing of ours is in a plain model, so that undo itself has to name the plan.
    assert "load after `rnnguard.apply` of `report.plan`" in report.undo()
    assert any("rnnguard.apply(model, optimizer, path)" in note for note in report.notes)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) .*rnn\.output_norm\.weight"):
        model.load_state_dict(checkpoint)
    rnnguard.apply(model, optimizer, report.plan)
    model.load_state_dict(checkpoint)
    assert torch.equal(model(X), expected)
