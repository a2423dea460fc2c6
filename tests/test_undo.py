"""The way back after life went on: training, loading, moving, and the user's own changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, lr_scheduler

import rnnguard
from rnnguard.errors import RewriteError, UndoError
from rnnguard.nn import OutputNormGRU
from rnnguard.probe.snapshot import fingerprint, same_bits
from rnnguard.records import Change, Plan
from rnnguard.replay import REMEDY
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.stepguard import GuardSettings, guard_of
from rnnguard.rewrite.transaction import transaction


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0][:, -1])
        return output


def change(remedy: str, path: str | None = None, **dose: Any) -> Change:
    tier = REMEDY[remedy].tier
    return Change(remedy=remedy, path=path, tier=tier, dose=dose, scenario="t", why="t")


PLAN = Plan(
    changes=(
        change("clip_gradient", max_norm=1.0),
        change("chrono_bias", "rnn", t_max=20, seed=0),
        change("layer_norm", "rnn"),
    )
)
X = torch.linspace(-1, 1, 60).view(4, 5, 3)
STAYS = "the written value stays, since"


def rewritten(
    build: Callable[[nn.Module], Optimizer] = lambda m: Adam(m.named_parameters()),
) -> tuple[Model, Optimizer, rnnguard.Report]:
    model = Model()
    optimizer = build(model)
    return model, optimizer, rnnguard.apply(model, optimizer, PLAN)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(X).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def moved(model: nn.Module, optimizer: Optimizer) -> None:
    model.double()


def loaded(model: nn.Module, optimizer: Optimizer) -> None:
    state = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def assigned(model: nn.Module, optimizer: Optimizer) -> None:
    state = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def trained_and_loaded(model: nn.Module, optimizer: Optimizer) -> None:
    train(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


LATER = {each.__name__: each for each in (train, moved, loaded, assigned, trained_and_loaded)}


@pytest.mark.parametrize("later", LATER)
def test_structure_goes_on_request_and_values_stay(later: str) -> None:
    model, optimizer, report = rewritten()
    LATER[later](model, optimizer)
    with pytest.raises(UndoError, match=r"`report\.undo\(structure=True\)` takes it back"):
        report.undo()
    assert guard_of(optimizer) is None and type(model.rnn) is OutputNormGRU
    values = {name: value.clone() for name, value in model.state_dict().items()}
    said = report.undo(structure=True)
    assert said.startswith("Taken back but for this: `rnn.bias_ih_l0`: ") and STAYS in said
    assert "OutputNormGRU" not in said
    assert type(model.rnn) is nn.GRU and not hasattr(model.rnn, "output_norm")
    groups = optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [6]
    assert [len(group["param_names"]) for group in groups] == [6]
    state = model.state_dict()
    assert all(same_bits(value, values[name]) for name, value in state.items())
    # The model trains on as a plain one.
    held = fingerprint(model, optimizer)
    assert STAYS in report.undo(structure=True)
    assert fingerprint(model, optimizer) == held
    if later in ("train", "trained_and_loaded"):
        train(model, optimizer)
        assert len(optimizer.state) == 6


def test_a_partial_undo_does_not_open_the_way_for_the_values() -> None:
    """Without its norm the model has fewer touched tensors; the trained ones still show."""
    model, optimizer, report = rewritten()
    train(model, optimizer)
    report.undo(structure=True)
    trained = model.rnn.bias_ih_l0.detach().clone()
    with pytest.raises(UndoError, match="the written value stays"):
        report.undo()
    assert torch.equal(model.rnn.bias_ih_l0, trained)


def test_structure_on_request_is_a_whole_undo_before_any_training() -> None:
    model = Model()
    optimizer = Adam(model.parameters())
    before = fingerprint(model, optimizer)
    report = rnnguard.apply(model, optimizer, PLAN)
    assert report.undo(structure=True).startswith("3 changes taken back.")
    assert fingerprint(model, optimizer) == before
    assert report.undo(structure=True) == "There is nothing to undo."


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_hooks_of_the_user_stay_and_a_class_of_the_user_is_not_taken_away() -> None:
    model, _, report = rewritten()
    calls: list[int] = []
    model.rnn.register_forward_hook(lambda *_: calls.append(1))
    parametrize.register_parametrization(model.rnn, "weight_hh_l0", Half())
    kind = type(model.rnn)
    said = report.undo(structure=True)
    assert "could not be taken back: the module has become a ParametrizedOutputNormGRU" in said
    assert type(model.rnn) is kind
    model(X).sum().backward()
    assert calls == [1]
    # What was in the way is gone, and so is the rest then.
    parametrize.remove_parametrizations(model.rnn, "weight_hh_l0", leave_parametrized=False)
    report.undo(structure=True)
    assert type(model.rnn) is nn.GRU
    model(X)
    assert calls == [1, 1]


def test_a_childs_place_taken_by_the_user_stays_theirs() -> None:
    model, _, report = rewritten()
    model.rnn.output_norm = own = nn.LayerNorm(4)
    report.undo(structure=True)
    assert type(model.rnn) is nn.GRU and model.rnn.output_norm is own


def test_a_scheduler_and_an_option_of_the_user_stay() -> None:
    model, optimizer, report = rewritten()
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    train(model, optimizer, 1)
    scheduler.step()
    report.undo(structure=True)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.0005, 0.3)
    train(model, optimizer, 1)
    scheduler.step()
    assert group["lr"] == 0.00025


def test_lbfgs_keeps_what_it_has_stepped_with() -> None:
    model = Model()
    optimizer = LBFGS(model.parameters(), 0.01)
    report = rnnguard.apply(model, optimizer, Plan(changes=PLAN.changes[1:]))
    train(model, optimizer, 1)
    assert "LBFGS has taken a step with them" in report.undo(structure=True)
    assert type(model.rnn) is nn.GRU
    assert len(optimizer.param_groups[0]["params"]) == 8
    train(model, optimizer, 1)


# --- two rewrites, taken back in either order ---------------------------------------------


def test_the_first_guard_goes_and_what_a_second_request_added_stays() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), 0.1)
    before = fingerprint(model, optimizer)
    first, second = Edit(model, optimizer), Edit(model, optimizer)
    first.hook_(GuardSettings(max_norm=1.0))
    second.hook_(GuardSettings(warmup=7))
    first.undo_()
    assert guard_of(optimizer).settings == GuardSettings(warmup=7)
    second.undo_()
    assert guard_of(optimizer) is None
    assert fingerprint(model, optimizer) == before


def test_a_request_that_others_rest_on_stays_and_says_so() -> None:
    optimizer = SGD(Model().parameters(), 0.1)
    first, second = Edit(Model(), optimizer), Edit(Model(), optimizer)
    first.hook_(GuardSettings(max_norm=1.0))
    second.hook_(GuardSettings(max_norm=1.0, clip="group"))
    with pytest.raises(UndoError, match="a later request to the guard rests on it"):
        first.undo_()
    assert guard_of(optimizer).settings == GuardSettings(max_norm=1.0, clip="group")
    second.undo_()
    first.undo_()
    assert guard_of(optimizer) is None


def test_values_written_over_by_a_second_rewrite_stay() -> None:
    model = Model()
    first, second = Edit(model, None), Edit(model, None)
    first.write_(model.head.bias, torch.ones(1))
    second.write_(model.head.bias, torch.full((1,), 2.0))
    with pytest.raises(UndoError, match="the written value stays"):
        first.undo_()
    assert model.head.bias.item() == 2
    second.undo_()
    first.undo_()
    assert model.head.bias.item() not in (1.0, 2.0)


def test_a_class_that_the_user_gave_the_optimizer_stays() -> None:
    class Own(AdamW):
        pass

    optimizer = Adam(Model().parameters())
    edit = Edit(Model(), optimizer)
    edit.retype_(AdamW)
    optimizer.__class__ = Own
    with pytest.raises(UndoError, match="the optimizer has become a Own since"):
        edit.undo_()
    assert type(optimizer) is Own


# --- verified before it is kept ----------------------------------------------------------


def added_twice(edit: Edit, optimizer: Optimizer, norm: nn.LayerNorm) -> None:
    optimizer.param_groups[0]["params"] += [norm.weight, norm.bias, norm.weight]


def added_not_at_all(edit: Edit, optimizer: Optimizer, norm: nn.LayerNorm) -> None:
    pass


def added_without_names(edit: Edit, optimizer: Optimizer, norm: nn.LayerNorm) -> None:
    optimizer.param_groups[0]["params"] += [norm.weight, norm.bias]


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (added_twice, "the optimizer holds a new parameter 2 times and not 1"),
        (added_not_at_all, "the optimizer holds a new parameter 0 times and not 1"),
        (added_without_names, "has not one name for each parameter"),
    ],
)
def test_a_commit_that_the_optimizer_does_not_follow_is_taken_back(add: Any, words: str) -> None:
    model = Model()
    optimizer = Adam(model.named_parameters())
    params = list(optimizer.param_groups[0]["params"])
    edit = Edit(model, optimizer)
    with pytest.raises(RewriteError, match=words) as failure, transaction(edit):
        norm = nn.LayerNorm(4)
        edit.morph_(model.rnn, OutputNormGRU, output_norm=norm)
        add(edit, optimizer, norm)
    assert failure.value.code == "RG916"
    assert type(model.rnn) is nn.GRU
    optimizer.param_groups[0]["params"][:] = params


def test_what_cannot_be_restored_is_told() -> None:
    model = Model()
    edit = Edit(model, None)
    with pytest.raises(RewriteError) as failure, transaction(edit):
        edit.write_(model.head.weight, torch.zeros(1, 4))
        model.head.weight.data = torch.zeros(5)
        raise OSError("disk")
    assert [reason.code for reason in failure.value.reasons] == ["RG916", "RG917"]
    assert "restored" not in str(failure.value)
    assert "`head.weight`: the written value could not be taken back" in str(failure.value)
