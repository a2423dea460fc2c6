"""Traps 35 to 37 and 72 to 78: what a write leaves behind, and all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from naive import FAILED, fooled_by
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import rnnguard
from rnnguard.errors import RefusedError, RewriteError, UndoError
from rnnguard.nn import OutputNormGRU
from rnnguard.probe.snapshot import Snapshot, fingerprint, same_bits
from rnnguard.records import Change, Plan
from rnnguard.replay import REMEDY
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.footprint import Footprint
from rnnguard.rewrite.stepguard import guard_of
from rnnguard.rewrite.undolog import UndoLog

STEPS = 12


class Model(nn.Module):
    """A recurrence whose faint input calls for values, structure and a guard alike."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 8, batch_first=True)
        self.batch_norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.batch_norm(self.head(self.dropout(self.rnn(x)[0][:, -1])))
        return output


def change(remedy: str, path: str | None = None, **dose: Any) -> Change:
    tier = REMEDY[remedy].tier
    return Change(remedy=remedy, path=path, tier=tier, dose=dose, scenario="t", why="t")


CHANGES = (
    change("clip_gradient", max_norm=1.0),
    change("amsgrad"),
    change("orthogonal", "rnn", gain=1.0, seed=0),
    change("chrono_bias", "rnn", t_max=20, seed=0),
    change("layer_norm", "rnn"),
)
PLAN, VALUES = Plan(changes=CHANGES), Plan(changes=CHANGES[2:4])
X = 1e-3 * torch.linspace(-1, 1, 6 * STEPS * 3).view(6, STEPS, 3)
STABILIZE: dict[str, Any] = {"inputs": X, "memory": STEPS}


def built() -> tuple[Model, Adam]:
    torch.manual_seed(0)
    model = Model()
    optimizer = Adam(model.named_parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return model, optimizer


def train(model: nn.Module, optimizer: Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def writes_by(
    write: Callable[[Edit, Tensor, Tensor], None],
) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(Edit, "write_", write)


def through_data(edit: Edit, param: Tensor, value: Tensor) -> None:
    param.data.copy_(value)
    param.grad = None


@fooled_by(writes_by(through_data))
def test_trap_35_a_graph_in_flight_is_loud() -> None:
    model, optimizer = built()
    loss = model(X).sum()
    rnnguard.apply(model, optimizer, VALUES)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def keeps_the_gradient(edit: Edit, param: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        param.copy_(value)


@fooled_by(writes_by(keeps_the_gradient))
def test_trap_36_stale_gradients_and_moments() -> None:
    model, _ = built()
    optimizer = SGD(model.parameters(), 0.1)
    gradient = model.rnn.bias_ih_l0.grad
    report = rnnguard.apply(model, optimizer, VALUES)
    fresh = model.rnn.bias_ih_l0.detach().clone()
    optimizer.step()
    assert torch.equal(model.rnn.bias_ih_l0, fresh), "moved by the gradient of the old values"
    assert model.head.bias.grad is not None
    report.undo()
    assert model.rnn.bias_ih_l0.grad is gradient
    # Moments of old values would move the new ones: they are not written any more.
    stepped = Adam(model.parameters())
    stepped.step()
    with pytest.raises(RefusedError, match="RG902"):
        rnnguard.apply(model, stepped, VALUES)


def puts_a_new_parameter(edit: Edit, param: Tensor, value: Tensor) -> None:
    for module in edit._model.modules():
        for name, own in module._parameters.items():
            if own is param:
                module._parameters[name] = nn.Parameter(value.to(param))


@fooled_by(writes_by(puts_a_new_parameter))
def test_trap_37_flat_weights_are_the_parameters() -> None:
    model, optimizer = built()
    held = dict(model.rnn.named_parameters())
    rnnguard.apply(model, optimizer, PLAN)
    flat = dict(zip(model.rnn._flat_weights_names, model.rnn._flat_weights, strict=True))
    assert flat.keys() == held.keys()
    for name, weight in flat.items():
        assert weight is getattr(model.rnn, name) is held[name]


# --- all or nothing ----------------------------------------------------------------------


def restores_the_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that knows of tensors only."""

    @contextmanager
    def transaction(edit: Edit) -> Iterator[Edit]:
        state = copy.deepcopy(edit._model.state_dict())
        try:
            yield edit
        except Exception as error:
            edit._model.load_state_dict(state, strict=False)
            raise RewriteError.of("RG916", "", f"{error}.", "Restored.") from error

    monkeypatch.setattr("rnnguard.pipeline.transaction", transaction)


def fail_after(monkeypatch: pytest.MonkeyPatch, number: int, fault: BaseException) -> None:
    """Raises after so many verbs."""
    left = [number]
    # The rehearsal before has verbs of its own, which are not counted.
    for name in ("write_", "morph_", "adopt_", "hook_", "tune_"):
        monkeypatch.setattr(Edit, name, _failing(getattr(Edit, name), left, fault))


def _failing(verb: Callable[..., Any], left: list[int], fault: BaseException) -> Any:
    def call(self: Edit, *args: Any, **children: Any) -> None:
        verb(self, *args, **children)
        left[0] -= 1
        if left[0] == 0:
            raise fault

    return call


@fooled_by(restores_the_state_dict)
def test_trap_72_a_fault_after_each_verb() -> None:
    model, optimizer = built()
    before, verbs, done = fingerprint(model, optimizer), 0, False
    while not done:
        verbs += 1
        with pytest.MonkeyPatch.context() as patch:
            fail_after(patch, verbs, MemoryError())
            try:
                rnnguard.apply(model, optimizer, PLAN)
                done = True
            except RewriteError:
                assert fingerprint(model, optimizer) == before, f"after verb {verbs}"
    assert verbs == 8
    assert fingerprint(model, optimizer) != before


def catches_exceptions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def transaction(edit: Edit) -> Iterator[Edit]:
        try:
            yield edit
        except Exception:
            edit.rollback_()
            raise

    monkeypatch.setattr("rnnguard.pipeline.transaction", transaction)


@fooled_by(catches_exceptions_only)
def test_trap_73_keyboard_interrupt_in_mid_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = built()
    before = fingerprint(model, optimizer)
    fail_after(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        rnnguard.apply(model, optimizer, PLAN)
    assert fingerprint(model, optimizer) == before


def never_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is run as often as it is asked for, whatever has happened since."""
    monkeypatch.setattr(UndoLog, "_forget", lambda self, inverse: None)
    monkeypatch.setattr(Footprint, "changed", lambda self: [])


@fooled_by(never_forgets)
def test_trap_74_undo_twice() -> None:
    model, optimizer = built()
    before = fingerprint(model, optimizer)
    report = rnnguard.stabilize(model, optimizer, **STABILIZE)
    view = report.only()
    report.undo()
    assert fingerprint(model, optimizer) == before
    train(model, optimizer)
    trained = fingerprint(model, optimizer)
    assert report.undo() == "There is nothing to undo."
    view.undo()
    assert fingerprint(model, optimizer) == trained


def told_by_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change as autograd counts it, which a fused optimizer does not."""
    touch = Footprint.touch
    versions: dict[int, int] = {}

    def noted(self: Footprint, tensor: Tensor) -> None:
        touch(self, tensor)
        versions[id(tensor)] = tensor._version

    def changed(self: Footprint) -> list[str]:
        return ["x" for key, (tensor, _) in self._left.items() if tensor._version != versions[key]]

    monkeypatch.setattr(Footprint, "touch", noted)
    monkeypatch.setattr(Footprint, "changed", changed)


@fooled_by(told_by_the_version)
def test_trap_75_undo_after_training_is_partial_and_says_what_stays() -> None:
    model, _ = built()
    optimizer = Adam(model.parameters(), fused=True)
    report = rnnguard.apply(model, optimizer, PLAN)
    train(model, optimizer)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UndoError) as partial:
        report.undo()
    assert "`rnn.weight_hh_l0`: the written value stays, since" in str(partial.value)
    assert "`rnn`: the class OutputNormGRU stays" in str(partial.value)
    assert guard_of(optimizer) is None
    assert optimizer.param_groups[0]["amsgrad"] is False
    assert "the written value stays" in report.undo(structure=True)
    assert type(model.rnn) is nn.GRU
    assert all(same_bits(value, trained[name]) for name, value in model.state_dict().items())


def finds_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts that are asked of a mark which the guard does not leave."""
    for place in ("request", "rewrite.edit"):
        monkeypatch.setattr(f"rnnguard.{place}.guard_of", lambda optimizer: None)


@fooled_by(finds_no_guard)
def test_trap_76_stabilize_twice() -> None:
    model, optimizer = built()
    before = fingerprint(model, optimizer)
    first = rnnguard.stabilize(model, optimizer, **STABILIZE)
    between = fingerprint(model, optimizer)
    assert {each.tier for each in first.plan} == {"step", "values", "structure"}
    assert between != before
    second = rnnguard.stabilize(model, optimizer, **STABILIZE)
    assert len(second.plan) == 0 and second.changes == ()
    assert fingerprint(model, optimizer) == between


def gives_back_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Snapshot.__init__

    def kept(self: Snapshot, model: nn.Module, *more: Any, **others: Any) -> None:
        start(self, model, *more, **others)
        self.gradients = [(p, p.grad) for p in model.parameters()]

    def restore(self: Snapshot) -> None:
        for param, gradient in self.gradients:
            param.grad = gradient

    monkeypatch.setattr(Snapshot, "__init__", kept)
    monkeypatch.setattr(Snapshot, "restore", restore)


@fooled_by(gives_back_gradients_only)
@pytest.mark.parametrize("door", [rnnguard.audit, rnnguard.plan])
def test_trap_77_batch_norm_and_dropout_after_the_probe(door: Callable[..., Any]) -> None:
    model, optimizer = built()
    before = fingerprint(model, optimizer)
    draw = torch.get_rng_state()
    door(model, optimizer, **STABILIZE)
    assert torch.equal(torch.get_rng_state(), draw)
    assert int(model.batch_norm.num_batches_tracked) == 0
    assert fingerprint(model, optimizer) == before


def stays_in_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def transaction(edit: Edit) -> Iterator[Edit]:
        yield edit

    monkeypatch.setattr("rnnguard.pipeline.transaction", transaction)


@fooled_by(stays_in_the_mode, fails_with=(*FAILED, RuntimeError))
def test_trap_78_no_grad_or_inference_mode_around_the_call() -> None:
    plain, optimizer = built()
    expected = rnnguard.stabilize(plain, optimizer, **STABILIZE)
    for mode in (torch.no_grad, torch.inference_mode):
        model, optimizer = built()
        with mode():
            report = rnnguard.stabilize(model, optimizer, **STABILIZE)
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
            assert not torch.is_grad_enabled()
        assert report.plan == expected.plan
        assert report.before["rnn"].retention == expected.before["rnn"].retention
        assert not any(param.is_inference() for param in model.parameters())
        twin = plain.state_dict()
        assert all(same_bits(value, twin[name]) for name, value in model.state_dict().items())
        assert isinstance(model.rnn, OutputNormGRU)
        values = model.rnn.output_norm.bias.detach().clone()
        train(model, optimizer)
        assert not torch.equal(model.rnn.output_norm.bias, values)
