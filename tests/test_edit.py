"""Edit: each verb, its way back, and that a fault anywhere leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, lr_scheduler

from rnnguard.errors import RefusedError, RewriteError, UndoError
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.stepguard import GuardSettings, guard_of
from rnnguard.rewrite.transaction import transaction


class NormedLSTM(nn.LSTM):
    """A morph target: the fused recurrence with a norm after it."""

    out_norm: nn.LayerNorm

    def forward(self, *args: Any) -> Any:
        output, state = super().forward(*args)
        return self.out_norm(output), state


class Model(nn.Module):
    """One LSTM under two names and in a plain list, a batch norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(2, 3, batch_first=True)
        self.alias = self.encoder
        self.kept = [self.encoder]
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(inputs)[0][:, -1]))


def two_groups(model: nn.Module) -> Optimizer:
    head = list(model.head.parameters())
    rest = [p for p in model.parameters() if all(p is not h for h in head)]
    return SGD([{"params": head, "lr": 0.5}, {"params": rest}], 0.1, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adam": lambda m: Adam(m.parameters(), 0.01, weight_decay=0.1),
    "named adam": lambda m: Adam(m.named_parameters(), 0.01),
    "fused adamw": lambda m: AdamW(m.parameters(), 0.01, fused=True),
    "sgd in two groups": two_groups,
    "lbfgs": lambda m: LBFGS(m.parameters(), 0.01),
}


def train(model: nn.Module, optimizer: Optimizer, steps: int = 1) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(4, 5, 2)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def put_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)


def adopt_norm(edit: Edit, model: Any) -> None:
    """The verbs of a norm remedy: morph, and let the optimizer train the new parameters."""
    edit.morph_(model.encoder, NormedLSTM, out_norm=nn.LayerNorm(3))
    named = model.encoder.out_norm.named_parameters(prefix="encoder.out_norm")
    edit.adopt_(dict(named), model.encoder.weight_hh_l0)


# Fingerprints


def bits(value: object) -> object:
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().flatten().view(torch.uint8)
        return id(value), value.dtype, bytes(raw.tolist())
    if isinstance(value, dict):
        return [(key, bits(each)) for key, each in value.items()]
    return value


def options_of(group: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        (key, bits(value) if isinstance(value, Tensor) else copy.copy(value))
        for key, value in group.items()
        if key != "params"
    ]


def fingerprint(model: nn.Module, optimizer: Optimizer) -> list[object]:
    modules = [
        (name, id(module), type(module), module.training, list(vars(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    values = [(n, bits(t), id(t.grad), t.requires_grad) for n, t in tensors]
    flat = [id(weight) for weight in model.encoder._flat_weights]
    groups = [
        (id(group), id(group["params"]), [id(p) for p in group["params"]], options_of(group))
        for group in optimizer.param_groups
    ]
    state = [(id(param), bits(entry)) for param, entry in optimizer.state.items()]
    hooks = [(n, list(v)) for n, v in vars(optimizer).items() if n.endswith("_hooks")]
    guard = guard_of(optimizer)
    options = [type(optimizer), dict(optimizer.defaults), list(vars(optimizer))]
    settings_ = None if guard is None else guard.settings
    return [modules, values, flat, groups, state, hooks, options, id(guard), settings_]


# write_


def test_write_keeps_the_parameter_and_takes_the_stale_gradient() -> None:
    model = Model()
    weight = model.encoder.weight_hh_l0
    weight.grad = gradient = torch.ones_like(weight)
    before = weight.detach().clone()
    edit = Edit(model, None)
    edit.write_(weight, torch.zeros(12, 3, dtype=torch.float64))
    assert not weight.any() and weight.dtype == torch.float32
    assert weight.grad is None
    assert model.encoder.weight_hh_l0 is weight
    assert any(flat is weight for flat in model.encoder._flat_weights)
    edit.undo_()
    assert torch.equal(weight, before)
    assert weight.grad is gradient


def test_write_casts_to_half_precision() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    Edit(nn.Module(), None).write_(weight, torch.full((3,), 1 / 3))
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, torch.full((3,), 1 / 3).bfloat16())


def test_write_does_not_broadcast() -> None:
    model = Model()
    before = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"a value of shape \(1,\) for \(1, 3\)"):
        Edit(model, None).write_(model.head.weight, torch.zeros(1))
    assert torch.equal(model.head.weight, before)


def test_a_graph_in_flight_raises() -> None:
    model = Model()
    loss = model(torch.randn(4, 5, 2)).sum()
    Edit(model, None).write_(model.head.weight, torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tied_weight_is_written_once_and_stays_tied() -> None:
    model = nn.Sequential(nn.LSTM(2, 3), nn.LSTM(2, 3))
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    edit = Edit(model, None)
    edit.write_(model[0].weight_hh_l0, torch.zeros(12, 3))
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    assert not model[1].weight_hh_l0.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_write_and_undo_across_grad_modes(mode: Any) -> None:
    model = Model()
    before = model.head.weight.detach().clone()
    edit = Edit(model, None)
    with mode():
        edit.write_(model.head.weight, torch.zeros(1, 3))
    model(torch.randn(4, 5, 2)).sum().backward()
    edit.undo_()
    assert torch.equal(model.head.weight, before)


# morph_


def test_morph_keeps_identity_hooks_aliases_and_keys() -> None:
    model = Model()
    encoder, keys, calls = model.encoder, list(model.encoder.state_dict()), []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    inputs = torch.randn(2, 5, 2)
    plain = encoder(inputs)[0]
    Edit(model, None).morph_(encoder, NormedLSTM, out_norm=nn.LayerNorm(3))
    assert model.encoder is model.alias is model.kept[0] is encoder
    assert type(encoder) is NormedLSTM
    assert list(encoder.state_dict()) == [*keys, "out_norm.weight", "out_norm.bias"]
    output = model.kept[0](inputs)[0]
    assert torch.equal(output, nn.functional.layer_norm(plain, (3,)))
    assert len(calls) == 2


def test_the_root_itself_is_morphed() -> None:
    model = nn.LSTM(2, 3)
    Edit(model, None).morph_(model, NormedLSTM, out_norm=nn.LayerNorm(3))
    assert type(model) is NormedLSTM


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_children_get_dtype_device_and_mode(dtype: torch.dtype) -> None:
    model = nn.LSTM(2, 3).to(device="meta", dtype=dtype)
    model.training = False
    child = nn.Sequential(nn.LayerNorm(3), nn.Dropout())
    Edit(model, None).morph_(model, NormedLSTM, out_norm=child)
    assert model.out_norm is child
    assert {(p.dtype, p.device.type) for p in child.parameters()} == {(dtype, "meta")}
    assert not any(module.training for module in child.modules())


def test_morph_does_not_take_a_used_name() -> None:
    model = nn.LSTM(2, 3)
    with pytest.raises(ValueError, match="LSTM has an attribute 'weight_hh_l0' already"):
        Edit(model, None).morph_(model, NormedLSTM, weight_hh_l0=nn.LayerNorm(3))
    assert type(model) is nn.LSTM


def test_undo_of_a_morph_is_bitwise() -> None:
    model = Model()
    inputs = torch.randn(2, 5, 2)
    before, keys = model(inputs), list(model.state_dict())
    edit = Edit(model, None)
    edit.morph_(model.encoder, NormedLSTM, out_norm=nn.LayerNorm(3))
    edit.undo_()
    model.norm.reset_running_stats()
    assert type(model.encoder) is nn.LSTM
    assert list(model.state_dict()) == keys
    assert torch.equal(model(inputs), before)


def test_a_morphed_model_can_be_copied() -> None:
    model = Model()
    Edit(model, None).morph_(model.encoder, NormedLSTM, out_norm=nn.LayerNorm(3))
    twin = copy.deepcopy(model)
    assert type(twin.encoder) is NormedLSTM and twin.encoder is twin.alias


# adopt_


def test_parameters_join_the_group_of_their_sibling() -> None:
    model = Model()
    optimizer = two_groups(model)
    lists = [group["params"] for group in optimizer.param_groups]
    adopt_norm(Edit(model, optimizer), model)
    assert [group["params"] for group in optimizer.param_groups] == lists
    assert all(g["params"] is own for g, own in zip(optimizer.param_groups, lists, strict=True))
    assert lists[1][-2] is model.encoder.out_norm.weight
    assert len(lists[0]) == 2


def test_names_stay_as_long_as_parameters() -> None:
    model = Model()
    optimizer = OPTIMIZERS["named adam"](model)
    edit = Edit(model, optimizer)
    adopt_norm(edit, model)
    group = optimizer.param_groups[0]
    assert group["param_names"][-2:] == ["encoder.out_norm.weight", "encoder.out_norm.bias"]
    assert len(group["param_names"]) == len(group["params"])
    edit.undo_()
    assert len(group["param_names"]) == len(group["params"]) == 8


def test_adopting_twice_adopts_once() -> None:
    model = Model()
    optimizer = OPTIMIZERS["adam"](model)
    edit = Edit(model, optimizer)
    before = len(optimizer.param_groups[0]["params"])
    edit.adopt_({"head.weight": model.head.weight}, model.head.bias)
    assert len(optimizer.param_groups[0]["params"]) == before
    assert edit.mark() == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_what_the_optimizer_does_not_train_brings_in_nothing(frozen: bool) -> None:
    model = Model()
    optimizer = SGD(model.head.parameters(), 0.1)
    model.encoder.requires_grad_(not frozen)
    adopt_norm(Edit(model, optimizer), model)
    assert len(optimizer.param_groups[0]["params"]) == 2
    adopt_norm(Edit(Model(), None), Model())


def test_lbfgs_adopts_before_its_first_step_and_refuses_after() -> None:
    model = Model()
    model.norm = nn.Identity()  # a batch norm would take the gain back
    optimizer = OPTIMIZERS["lbfgs"](model)
    edit = Edit(model, optimizer)
    adopt_norm(edit, model)
    assert optimizer._params[-1] is model.encoder.out_norm.bias
    before = model.encoder.out_norm.weight.detach().clone()
    train(model, optimizer)
    assert not torch.equal(model.encoder.out_norm.weight, before)
    mark, held = edit.mark(), len(optimizer.param_groups[0]["params"])
    with pytest.raises(RefusedError) as refusal:
        edit.adopt_({"late": nn.Parameter(torch.zeros(1))}, model.head.weight)
    assert str(refusal.value) == (
        "LBFGS has taken a step and cannot take up parameters any more. "
        "Stabilize before the first step. (RG906)"
    )
    assert (edit.mark(), len(optimizer.param_groups[0]["params"])) == (mark, held)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    ],
)
def test_a_scheduler_built_before_goes_on(make: Any) -> None:
    model = Model()
    optimizer = OPTIMIZERS["adam"](model)
    scheduler = make(optimizer)
    adopt_norm(Edit(model, optimizer), model)
    before = model.encoder.out_norm.weight.detach().clone()
    for _ in range(2):
        train(model, optimizer)
        scheduler.step()
    assert not torch.equal(model.encoder.out_norm.weight, before)


def test_undo_takes_the_adopted_state_too() -> None:
    model = Model()
    optimizer = OPTIMIZERS["adam"](model)
    late = nn.Parameter(torch.zeros(1))
    edit = Edit(model, optimizer)
    edit.adopt_({"late": late}, model.head.weight)
    late.grad = torch.ones(1)
    optimizer.step()
    assert late in optimizer.state
    edit.undo_()
    assert late not in optimizer.state


# hook_


def test_one_guard_per_optimizer_and_each_request_adds_to_it() -> None:
    optimizer = SGD(Model().parameters(), 0.1)
    edit = Edit(Model(), optimizer)
    guard = edit.hook_(GuardSettings(max_norm=1.0))
    mark = edit.mark()
    assert edit.hook_(GuardSettings(warmup=5)) is guard
    assert guard.settings == GuardSettings(max_norm=1.0, warmup=5)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    edit.rollback_(mark)
    assert guard.settings == GuardSettings(max_norm=1.0)
    assert guard_of(optimizer) is guard
    edit.undo_()
    assert guard_of(optimizer) is None
    assert "rnnguard_step" not in optimizer.param_groups[0]


def test_a_second_edit_gives_the_first_ones_guard_back() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), 0.1)
    guard = Edit(model, optimizer).hook_(GuardSettings(max_norm=1.0))
    second = Edit(model, optimizer)
    second.hook_(GuardSettings(max_norm=0.5))
    assert guard.settings.max_norm == 0.5
    second.undo_()
    assert guard_of(optimizer) is guard
    assert guard.settings.max_norm == 1.0


def test_an_optimizer_verb_without_an_optimizer_says_so() -> None:
    with pytest.raises(ValueError, match="there is no optimizer to change"):
        Edit(Model(), None).hook_(GuardSettings())


# tune_


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("foreach", [False, True])
def test_amsgrad_starts_from_the_present_moments(kind: type[Adam], foreach: bool) -> None:
    model = Model()
    optimizer = kind(model.parameters(), 0.01, foreach=foreach)
    train(model, optimizer)
    before = fingerprint(model, optimizer)
    edit = Edit(model, optimizer)
    edit.tune_("amsgrad", True)
    assert optimizer.param_groups[0]["amsgrad"] is True
    moments = optimizer.state[model.head.weight]
    assert torch.equal(moments["max_exp_avg_sq"], moments["exp_avg_sq"])
    assert moments["max_exp_avg_sq"] is not moments["exp_avg_sq"]
    edit.undo_()
    assert fingerprint(model, optimizer) == before
    edit.tune_("amsgrad", True)
    train(model, optimizer)
    edit.undo_()
    assert set(optimizer.state[model.head.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_amsgrad_on_a_fresh_optimizer_and_on_one_that_has_it() -> None:
    model = Model()
    optimizer = Adam(model.parameters(), 0.01, amsgrad=True)
    train(model, optimizer)
    before = fingerprint(model, optimizer)
    edit = Edit(model, optimizer)
    edit.tune_("amsgrad", True)
    edit.undo_()
    assert fingerprint(model, optimizer) == before
    fresh = Adam(model.parameters(), 0.01)
    edit = Edit(model, fresh)
    edit.tune_("amsgrad", True)
    assert not fresh.state
    train(model, fresh)
    edit.undo_()
    assert "max_exp_avg_sq" not in fresh.state[model.head.weight]


def test_amsgrad_keeps_the_largest_moments_of_an_earlier_time() -> None:
    model = Model()
    optimizer = Adam(model.parameters(), 0.01, amsgrad=True)
    train(model, optimizer, steps=2)
    optimizer.param_groups[0]["amsgrad"] = False
    before = fingerprint(model, optimizer)
    edit = Edit(model, optimizer)
    edit.tune_("amsgrad", True)
    edit.undo_()
    assert fingerprint(model, optimizer) == before


def test_tune_sets_only_groups_that_have_the_option() -> None:
    model = Model()
    optimizer = two_groups(model)
    optimizer.param_groups[0]["extra"] = 1
    edit = Edit(model, optimizer)
    edit.tune_("extra", 2)
    assert optimizer.param_groups[0]["extra"] == 2
    assert "extra" not in optimizer.param_groups[1]


def test_undo_leaves_an_option_that_the_user_set_since() -> None:
    model = Model()
    optimizer = two_groups(model)
    edit = Edit(model, optimizer)
    edit.tune_("momentum", 0.5)
    optimizer.param_groups[0]["momentum"] = 0.8
    edit.undo_()
    assert [group["momentum"] for group in optimizer.param_groups] == [0.8, 0.9]


def test_undo_finds_groups_that_loading_replaced() -> None:
    model = Model()
    optimizer = two_groups(model)
    edit = Edit(model, optimizer)
    edit.tune_("momentum", 0.5)
    edit.hook_(GuardSettings(warmup=3))
    optimizer.load_state_dict(optimizer.state_dict())
    edit.undo_()
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    assert all("rnnguard_step" not in group for group in optimizer.param_groups)


# retype_


@pytest.mark.parametrize("scheduled", [False, True])
def test_retyped_adam_steps_like_adamw_with_the_same_state(scheduled: bool) -> None:
    model = Model()
    optimizer = Adam(model.parameters(), 0.01, weight_decay=0.5)
    if scheduled:
        lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    train(model, optimizer)
    twin = copy.deepcopy(model)
    expected = AdamW(twin.parameters(), 0.01, weight_decay=0.5)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    edit = Edit(model, optimizer)
    edit.retype_(AdamW)
    assert type(optimizer) is AdamW
    guard = edit.hook_(GuardSettings(max_norm=100.0))
    put_gradients(model)
    put_gradients(twin)
    optimizer.step()
    expected.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert guard.engagement().steps == 1
    edit.undo_()
    assert type(optimizer) is Adam
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is False
    assert optimizer.defaults["decoupled_weight_decay"] is False


def test_hooks_fire_on_a_class_that_was_never_built() -> None:
    class NeverBuilt(Optimizer):
        """An unrelated optimizer class of which no instance exists when it is first needed."""

        def __init__(self, params: Any, lr: float = 1e-3) -> None:
            super().__init__(params, {"lr": lr, "its_own": 5})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    param.data.sub_(group["lr"] * param.grad)

    assert not hasattr(NeverBuilt.step, "hooked")
    model = Model()
    optimizer = SGD(model.parameters(), 1.0)
    before = fingerprint(model, optimizer)
    edit = Edit(model, optimizer)
    edit.retype_(NeverBuilt)
    guard = edit.hook_(GuardSettings(max_norm=1e-3))
    put_gradients(model)
    weight = model.head.weight.detach().clone()
    optimizer.step()
    assert guard.engagement().steps == guard.engagement().clipped == 1
    assert float((model.head.weight.detach() - weight).norm()) < 1e-3
    assert optimizer.param_groups[0]["its_own"] == optimizer.defaults["its_own"] == 5
    edit.undo_()
    after = fingerprint(model, optimizer)
    assert after[5:] == before[5:]
    assert [list(group) for group in optimizer.param_groups] == [
        list(group) for group in SGD(Model().parameters(), 1.0).param_groups
    ]


def test_a_schedule_does_not_stop_retyping_within_one_step_function() -> None:
    class Base(SGD):
        def step(self, closure: Any = None) -> None:
            raise NotImplementedError

    class Heir(Base):
        pass

    Heir(Model().parameters())  # gets its own hooked copy of Base.step
    model = Model()
    optimizer = Base(model.parameters())
    assert Heir.step != Base.step
    lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    Edit(model, optimizer).retype_(Heir)
    assert type(optimizer) is Heir


def test_retype_is_refused_where_a_schedule_holds_the_old_step() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), 1.0)
    lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    edit = Edit(model, optimizer)
    with pytest.raises(RefusedError) as refusal:
        edit.retype_(AdamW)
    assert str(refusal.value) == (
        "a schedule has bound SGD.step to the optimizer. "
        "Build the schedule after stabilizing. (RG906)"
    )
    assert type(optimizer) is SGD and edit.mark() == 0


# Nothing to do


def test_a_second_round_of_the_same_verbs_does_nothing() -> None:
    model = Model()
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer)

    def verbs(edit: Edit) -> None:
        edit.write_(model.head.weight, torch.zeros(1, 3, dtype=torch.float64))
        edit.hook_(GuardSettings(max_norm=1.0))
        edit.tune_("amsgrad", True)
        edit.retype_(AdamW)

    first, second = Edit(model, optimizer), Edit(model, optimizer)
    verbs(first)
    put_gradients(model)
    before = fingerprint(model, optimizer)
    verbs(second)
    assert first.mark() > 0
    assert second.mark() == 0
    assert fingerprint(model, optimizer) == before


# undo_


def test_undo_twice_is_harmless() -> None:
    model = Model()
    optimizer = OPTIMIZERS["adam"](model)
    before = fingerprint(model, optimizer)
    edit = Edit(model, optimizer)
    adopt_norm(edit, model)
    edit.write_(model.encoder.weight_hh_l0, torch.zeros(12, 3))
    edit.hook_(GuardSettings(max_norm=1.0))
    edit.undo_()
    assert fingerprint(model, optimizer) == before
    train(model, optimizer)
    trained = fingerprint(model, optimizer)
    edit.undo_()
    assert fingerprint(model, optimizer) == trained


@pytest.mark.parametrize("name", ["adam", "fused adamw"])
def test_undo_after_training_says_what_stays(name: str) -> None:
    model = Model()
    optimizer = OPTIMIZERS[name](model)
    edit = Edit(model, optimizer)
    adopt_norm(edit, model)
    edit.write_(model.encoder.weight_hh_l0, torch.zeros(12, 3))
    edit.hook_(GuardSettings(max_norm=1.0))
    edit.tune_("amsgrad", True)
    train(model, optimizer)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UndoError) as partial:
        edit.undo_()
    why = (
        "stays, since encoder.weight_ih_l0, encoder.weight_hh_l0, encoder.bias_ih_l0 and 3 more "
        "changed afterwards."
    )
    on_request = "`report.undo(structure=True)` takes it back all the same. (RG917)"
    assert str(partial.value).splitlines() == [
        f"`encoder`: the class NormedLSTM {why} {on_request}",
        f"the training of encoder.out_norm.weight, encoder.out_norm.bias {why} {on_request}",
        f"`encoder.weight_hh_l0`: the written value {why} "
        "Build the model anew to be without it. (RG917)",
    ]
    assert guard_of(optimizer) is None
    assert optimizer.param_groups[0]["amsgrad"] is False
    assert type(model.encoder) is NormedLSTM
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    held = fingerprint(model, optimizer)
    with pytest.raises(UndoError):
        edit.undo_()
    assert fingerprint(model, optimizer) == held


def test_training_under_a_morph_without_written_values_keeps_it() -> None:
    model = Model()
    optimizer = SGD([model.encoder.weight_hh_l0], 0.1)
    edit = Edit(model, optimizer)
    edit.morph_(model.encoder, NormedLSTM, out_norm=nn.LayerNorm(3))
    train(model, optimizer)
    with pytest.raises(UndoError, match=r"since encoder\.weight_hh_l0 changed afterwards"):
        edit.undo_()
    assert type(model.encoder) is NormedLSTM


@pytest.mark.parametrize(("written", "later"), [(0.0, -0.0), (float("nan"), 1.0)])
def test_change_is_told_by_the_bits(written: float, later: float) -> None:
    model = nn.Linear(1, 1)
    before = model.weight.item()
    edit = Edit(model, None)
    edit.write_(model.weight, torch.tensor([[written]]))
    with torch.no_grad():
        model.weight.fill_(later)
    with pytest.raises(UndoError):
        edit.undo_()
    with torch.no_grad():
        model.weight.fill_(written)
    edit.undo_()
    assert model.weight.item() == before


def test_a_parameter_that_was_replaced_counts_as_changed() -> None:
    model = nn.Linear(2, 1)
    edit = Edit(model, None)
    edit.write_(model.weight, torch.zeros(1, 2))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(UndoError, match=r"`weight`: the written value stays"):
        edit.undo_()


def test_a_model_moved_to_another_dtype_counts_as_changed() -> None:
    model = nn.Linear(2, 1).half()
    edit = Edit(model, None)
    edit.write_(model.weight, torch.zeros(1, 2))
    model.bfloat16()
    with pytest.raises(UndoError):
        edit.undo_()


# Faults


def test_a_fault_becomes_one_error_that_says_all_is_restored() -> None:
    model = Model()
    optimizer = OPTIMIZERS["adam"](model)
    put_gradients(model)
    before = fingerprint(model, optimizer)
    edit = Edit(model, optimizer)
    with pytest.raises(RewriteError) as failure, transaction(edit):
        adopt_norm(edit, model)
        edit.hook_(GuardSettings(max_norm=1.0))
        edit.write_(model.head.weight, torch.zeros(7, 7))
    assert str(failure.value) == (
        "ValueError while rewriting: a value of shape (7, 7) for (1, 3). "
        "The model and optimizer were restored. (RG916)"
    )
    assert isinstance(failure.value.__cause__, ValueError)
    assert fingerprint(model, optimizer) == before


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), SystemExit(3), RefusedError.of("RG906", "", "no", "so")],
    ids=lambda error: type(error).__name__,
)
def test_interrupts_and_refusals_pass_through_unchanged(error: BaseException) -> None:
    model = Model()
    optimizer = OPTIMIZERS["adam"](model)
    before = fingerprint(model, optimizer)
    edit = Edit(model, optimizer)
    with pytest.raises(type(error)) as raised, transaction(edit):
        adopt_norm(edit, model)
        raise error
    assert raised.value is error
    assert fingerprint(model, optimizer) == before


def test_a_transaction_keeps_what_was_done_before_it() -> None:
    model = Model()
    edit = Edit(model, None)
    edit.write_(model.head.weight, torch.zeros(1, 3))
    with pytest.raises(RewriteError), transaction(edit):
        edit.write_(model.head.bias, torch.zeros(1))
        raise OSError
    assert not model.head.weight.any()
    assert model.head.bias.any()


def test_one_inverse_that_fails_does_not_keep_the_others_from_running() -> None:
    model = Model()
    bias = model.head.bias.detach().clone()
    edit = Edit(model, None)
    edit.write_(model.head.bias, torch.zeros(1))
    edit.write_(model.head.weight, torch.zeros(1, 3))
    model.head.weight.data = torch.zeros(5)
    with pytest.raises(UndoError, match=r"`head\.weight`: the written value could not be taken"):
        edit.rollback_()
    assert torch.equal(model.head.bias, bias)


@dataclass(frozen=True)
class Verb:
    """One call of one verb, on a model and optimizer that are given to it."""

    name: str
    number: int

    def __call__(self, edit: Edit, model: Any, optimizer: Optimizer) -> None:
        params = list(model.parameters())
        param = params[self.number % len(params)]
        match self.name:
            case "write":
                edit.write_(param, torch.full_like(param, float(self.number)))
            case "morph" if type(model.encoder) is nn.LSTM:
                adopt_norm(edit, model)
            case "adopt":
                new = nn.Parameter(torch.zeros(2))
                edit.adopt_({f"new.{self.number}": new}, param)
            case "hook":
                edit.hook_(GuardSettings(max_norm=1.0 + self.number, warmup=self.number))
            case "tune":
                key = "amsgrad" if "amsgrad" in optimizer.defaults else "lr"
                edit.tune_(key, bool(self.number % 2))
            case "retype" if isinstance(optimizer, Adam):
                edit.retype_(AdamW)


VERBS = st.builds(
    Verb, st.sampled_from(["write", "morph", "adopt", "hook", "tune", "retype"]), st.integers(0, 9)
)


def prepared(name: str, trained: bool, guarded: bool) -> tuple[Model, Optimizer]:
    torch.manual_seed(0)
    model = Model()
    optimizer = OPTIMIZERS[name](model)
    if guarded:
        Edit(model, optimizer).hook_(GuardSettings(max_norm=5.0))
    if trained and name != "lbfgs":
        train(model, optimizer)
    put_gradients(model)
    return model, optimizer


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    trained=st.booleans(),
    guarded=st.booleans(),
    verbs=st.lists(VERBS, min_size=1, max_size=6),
)
def test_a_fault_after_each_verb_leaves_an_equal_fingerprint(
    name: str, trained: bool, guarded: bool, verbs: list[Verb]
) -> None:
    model, optimizer = prepared(name, trained, guarded)
    before = fingerprint(model, optimizer)
    for last in range(len(verbs)):
        edit = Edit(model, optimizer)
        with pytest.raises(RewriteError), transaction(edit):
            for verb in verbs[: last + 1]:
                verb(edit, model, optimizer)
            raise RuntimeError("injected")
        assert fingerprint(model, optimizer) == before
        assert edit.mark() == 0
    edit = Edit(model, optimizer)
    for verb in verbs:
        verb(edit, model, optimizer)
    edit.undo_()
    assert fingerprint(model, optimizer) == before
