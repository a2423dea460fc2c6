"""The step guard: what it does inside a step, and that nothing of it is left at rest."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from rnnguard.rewrite import clipping
from rnnguard.rewrite.stepguard import (
    GuardSettings,
    StepGuard,
    guard_of,
    refusals_for_clip,
)

KEY = StepGuard.GROUP_KEY
EVERY_OPTIMIZER: list[Callable[[list[Tensor]], Optimizer]] = [
    lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
    lambda p: Adam(p, 0.1, weight_decay=0.1, foreach=False),
    lambda p: AdamW(p, 0.1, foreach=True),
    lambda p: AdamW(p, 0.1, fused=True),
    lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1),
    lambda p: torch.optim.NAdam(p, 0.1, weight_decay=0.1),
    lambda p: torch.optim.RAdam(p, 0.1, weight_decay=0.1),
    lambda p: torch.optim.Adamax(p, 0.1, weight_decay=0.1),
    lambda p: torch.optim.Adadelta(p, 0.1, weight_decay=0.1),
    lambda p: torch.optim.Rprop(p, 0.1),
    lambda p: torch.optim.ASGD(p, 0.1, weight_decay=0.1),
]


def weights(*shapes: int) -> list[Tensor]:
    return [nn.Parameter(torch.zeros(n)) for n in shapes or (3, 4)]


def guarded(optimizer: Optimizer, **settings: Any) -> StepGuard:
    guard = StepGuard(GuardSettings(**settings))
    guard.install(optimizer)
    return guard


def fill_gradients(optimizer: Optimizer, value: float = 100.0) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, value)


def whole_norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).norm())


class Watching(SGD):
    """SGD that notes the learning rate it steps with, and raises when told to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates: list[float] = []
        self.rate_objects: list[Any] = []
        self.fails = False

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        rate = self.param_groups[0]["lr"]
        self.rates.append(rate.item() if isinstance(rate, Tensor) else rate)
        self.rate_objects.append(rate)
        if self.fails:
            raise RuntimeError("out of memory")
        super().step()
        return loss


class Nested(SGD):
    """A subclass whose step calls its parent's, which torch makes call the hooks again."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


# Installed or not, by the facts


def test_guard_is_found_by_its_hooks() -> None:
    optimizer = SGD(weights(), 1.0)
    assert guard_of(optimizer) is None
    guard = guarded(optimizer, max_norm=1.0)
    assert guard_of(optimizer) is guard


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_a_copied_optimizer_has_the_key_but_no_guard(copied: Any) -> None:
    optimizer = SGD(weights(), 1.0)
    guarded(optimizer, max_norm=1.0)
    twin = copied(optimizer)
    assert KEY in twin.param_groups[0]
    assert guard_of(twin) is None


def test_remove_leaves_no_trace() -> None:
    optimizer = SGD(weights(), 1.0)
    before = [list(group) for group in optimizer.param_groups]
    guard = guarded(optimizer, max_norm=1.0)
    assert before != [list(group) for group in optimizer.param_groups]
    optimizer.add_param_group({"params": weights(2)})
    fill_gradients(optimizer)
    optimizer.step()
    assert optimizer.param_groups[1][KEY] == 1
    guard.remove(optimizer)
    guard.remove(optimizer)
    assert [list(group) for group in optimizer.param_groups] == before * 2
    hooks = [value for name, value in vars(optimizer).items() if name.endswith("_hooks")]
    assert len(hooks) == 6 and not any(hooks)


def test_remove_keeps_progress_that_was_there_before() -> None:
    optimizer = SGD(weights(), 1.0)
    optimizer.param_groups[0][KEY] = 7
    guard = guarded(optimizer, warmup=10)
    guard.remove(optimizer)
    assert optimizer.param_groups[0][KEY] == 7


def test_removing_a_guard_that_was_never_installed_keeps_the_key() -> None:
    optimizer = SGD(weights(), 1.0)
    optimizer.param_groups[0][KEY] = 7
    StepGuard(GuardSettings()).remove(optimizer)
    assert optimizer.param_groups[0][KEY] == 7


def test_remove_heals_after_a_step_that_raised() -> None:
    optimizer = Watching(weights(), 1.0)
    guard = guarded(optimizer, warmup=10)
    optimizer.fails = True
    with pytest.raises(RuntimeError):
        optimizer.step()
    guard.remove(optimizer)
    assert optimizer.param_groups[0]["lr"] == 1.0


# The clip


def test_clips_by_the_norm_over_all_groups() -> None:
    params = weights(3, 4)
    optimizer = SGD([{"params": params[:1]}, {"params": params[1:]}], 1.0)
    guard = guarded(optimizer, max_norm=1.0)
    fill_gradients(optimizer)
    optimizer.step()
    assert whole_norm(params) == pytest.approx(1.0, abs=1e-4)
    assert float(guard.engagement().last_norm) == pytest.approx(100 * 7**0.5)
    seen = guard.engagement()
    assert (seen.steps, seen.clipped) == (1, 1)


def test_small_gradients_pass_untouched() -> None:
    optimizer = SGD(weights(), 1.0)
    guard = guarded(optimizer, max_norm=1.0)
    fill_gradients(optimizer, 0.01)
    optimizer.step()
    assert all(bool((p == -0.01).all()) for p in optimizer.param_groups[0]["params"])
    assert guard.engagement().clipped == 0


def test_the_users_own_clip_leaves_nothing_to_do() -> None:
    optimizer = SGD(weights(), 1.0)
    guard = guarded(optimizer, max_norm=1.0)
    fill_gradients(optimizer)
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    assert guard.engagement().clipped == 0
    assert whole_norm(optimizer.param_groups[0]["params"]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_update_norm_is_one_under_a_scaler(fused: bool, unscaled: bool) -> None:
    params = weights()
    optimizer = SGD(params, 1.0, fused=fused)
    guard = guarded(optimizer, max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(sum(1000 * p.sum() for p in params)).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert whole_norm(params) == pytest.approx(1.0, rel=1e-4)
    assert float(guard.engagement().last_norm) == pytest.approx(1000 * 7**0.5)


@pytest.mark.parametrize("on_nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_moves_nothing(fused: bool, on_nonfinite: str) -> None:
    params = weights()
    optimizer = SGD(params, 1.0, fused=fused, weight_decay=0.1)
    guard = guarded(optimizer, max_norm=1.0, warmup=4, on_nonfinite=on_nonfinite)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum(p.sum() for p in params) * float("inf")).backward()
    scaler.step(optimizer)
    assert whole_norm(params) == 0.0
    seen = guard.engagement()
    assert (seen.steps, seen.skipped, seen.nonfinite, seen.in_a_row) == (0, 0, 0, 0)
    # A fused optimizer's hooks run although its kernel skips: documented, the warm-up goes on.
    assert optimizer.param_groups[0][KEY] == int(fused)


def closure_over(optimizer: Optimizer, scale: float = 1000.0) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(scale * p.sum() for g in optimizer.param_groups for p in g["params"])
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", [SGD, Nested])
def test_clips_after_the_closures_backward(kind: type[SGD], by_name: bool) -> None:
    SGD(weights(), 1.0)
    params = weights()
    optimizer = kind(params, 1.0)
    guard = guarded(optimizer, max_norm=1.0)
    closure = closure_over(optimizer)
    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert loss.item() == 0.0
    assert whole_norm(params) == pytest.approx(1.0, abs=1e-4)
    assert float(guard.engagement().last_norm) == pytest.approx(1000 * 7**0.5)
    seen = guard.engagement()
    assert (seen.steps, seen.clipped) == (1, 1)


def test_a_nested_step_does_not_wrap_the_closure_again(monkeypatch: pytest.MonkeyPatch) -> None:
    SGD(weights(), 1.0)
    optimizer = Nested(weights(), 1.0)
    guarded(optimizer, max_norm=1.0)
    norms = []
    measure = clipping._norm
    monkeypatch.setattr(clipping, "_norm", lambda g: norms.append(measure(g)) or norms[0])
    optimizer.step(closure_over(optimizer))
    assert len(norms) == 1


def test_closure_none_by_name_clips_at_once() -> None:
    params = weights()
    optimizer = SGD(params, 1.0)
    guarded(optimizer, max_norm=1.0)
    fill_gradients(optimizer)
    optimizer.step(closure=None)
    assert whole_norm(params) == pytest.approx(1.0, abs=1e-4)


def test_a_raising_closure_leaves_no_gap() -> None:
    optimizer = SGD(weights(), 1.0)
    guard = guarded(optimizer, max_norm=1.0, warmup=10)

    def closure() -> float:
        assert optimizer.param_groups[0]["lr"] == 0.1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert guard.engagement().steps == 0


def test_a_clip_that_cannot_be_done_leaves_no_gap() -> None:
    params = weights()
    optimizer = SGD(params, 1.0)
    guarded(optimizer, max_norm=1.0, warmup=10)
    fill_gradients(optimizer)
    optimizer.grad_scale = "no scale"
    with pytest.raises(AttributeError):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_no_gradients_at_all() -> None:
    params = weights()
    optimizer = SGD(params, 1.0)
    guard = guarded(optimizer, max_norm=1.0, on_nonfinite="skip")
    optimizer.step()
    assert guard.engagement().last_norm is None
    seen = guard.engagement()
    assert (seen.steps, seen.clipped, seen.nonfinite) == (1, 0, 0)


def test_accumulated_gradients_are_clipped_once() -> None:
    params = weights()
    optimizer = SGD(params, 1.0)
    guard = guarded(optimizer, max_norm=1.0)
    for _ in range(3):
        sum(1000 * p.sum() for p in params).backward()
    optimizer.step()
    assert float(guard.engagement().last_norm) == pytest.approx(3000 * 7**0.5)
    assert whole_norm(params) == pytest.approx(1.0, abs=1e-4)


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_clips_sharded_parameters(one_rank: None) -> None:
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [0])
    param = nn.Parameter(distribute_tensor(torch.zeros(7), mesh, [Shard(0)]))
    optimizer = SGD([param], 1.0)
    guard = guarded(optimizer, max_norm=1.0, on_nonfinite="skip")
    param.grad = distribute_tensor(torch.full((7,), 100.0), mesh, [Shard(0)])
    optimizer.step()
    assert isinstance(param, DTensor)
    assert whole_norm([param.full_tensor()]) == pytest.approx(1.0, abs=1e-4)
    assert not isinstance(guard.engagement().last_norm, DTensor)
    assert guard.engagement().clipped == 1


# The learning rate


SCHEDULERS: list[Callable[[Optimizer], Any]] = [
    lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=10),
    lambda o: lr_scheduler.StepLR(o, 2),
    lambda o: lr_scheduler.ExponentialLR(o, 0.9),
]


@pytest.mark.parametrize("guard_first", [False, True])
@pytest.mark.parametrize("make", SCHEDULERS)
def test_schedulers_see_the_users_rate(make: Any, guard_first: bool) -> None:
    def rates_at_rest(settings: dict[str, Any] | None) -> tuple[list[float], list[float]]:
        optimizer = Watching(weights(), 1.0)
        if settings and guard_first:
            guarded(optimizer, **settings)
        scheduler = make(optimizer)
        if settings and not guard_first:
            guarded(optimizer, **settings)
        at_rest = []
        for _ in range(6):
            fill_gradients(optimizer)
            optimizer.step()
            at_rest.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        return at_rest, optimizer.rates

    plain, plain_inside = rates_at_rest(None)
    rest, inside = rates_at_rest({"warmup": 3, "total_steps": 6})
    assert rest == plain
    # Warm-up only: a cosine on top of the user's schedule would decay twice.
    factors = [1 / 3, 2 / 3, 1, 1, 1, 1]
    assert inside == pytest.approx([r * f for r, f in zip(plain_inside, factors, strict=True)])


def test_cosine_runs_where_the_user_has_no_schedule() -> None:
    optimizer = Watching(weights(), 1.0)
    guarded(optimizer, warmup=2, total_steps=4, final_factor=0.2)
    for _ in range(4):
        optimizer.step()
    assert optimizer.rates == pytest.approx([0.5, 1.0, 0.6, 0.2])


def test_a_group_added_later_warms_up_by_itself() -> None:
    optimizer = SGD(weights(), 1.0)
    guarded(optimizer, warmup=2)
    optimizer.step()
    optimizer.step()
    late = weights(1)
    optimizer.add_param_group({"params": late})
    fill_gradients(optimizer, 1.0)
    optimizer.step()
    assert late[0].item() == -0.5


def test_tensor_rate_is_scaled_in_place_and_given_back() -> None:
    rate = torch.tensor(1.0)
    optimizer = Watching(weights(), rate)
    guarded(optimizer, warmup=4)
    optimizer.step()
    assert optimizer.rates == [0.25]
    assert optimizer.rate_objects[0] is rate
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 1.0


def test_a_tensor_rate_shared_by_groups_is_scaled_once() -> None:
    rate = torch.tensor(1.0)
    params = weights()
    optimizer = Watching([{"params": [p], "lr": rate} for p in params], rate)
    guarded(optimizer, warmup=4)
    optimizer.step()
    assert optimizer.rates == [0.25]
    assert float(rate) == 1.0


def test_a_learned_rate_keeps_its_graph_and_value() -> None:
    rate = torch.tensor(1.0, requires_grad=True)
    optimizer = Watching(weights(), rate)
    guarded(optimizer, warmup=4)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.rate_objects[0].requires_grad
    assert rate._version == 0
    optimizer.state_dict()
    assert optimizer.param_groups[0]["lr"] is rate


# Steps that nest, raise or are none


def test_a_nested_step_counts_once() -> None:
    SGD(weights(), 1.0)  # only now does Nested call the hooks twice per step
    params = weights(1)
    optimizer = Nested(params, 1.0)
    guard = guarded(optimizer, warmup=10, max_norm=1.0, on_nonfinite="propagate")
    moves, counts = [], []
    for _ in range(3):
        before = params[0].item()
        fill_gradients(optimizer)
        optimizer.step()
        moves.append(before - params[0].item())
        counts.append(optimizer.param_groups[0][KEY])
    assert counts == [1, 2, 3]
    assert moves == pytest.approx([0.1, 0.2, 0.3], abs=1e-5)
    seen = guard.engagement()
    assert (seen.steps, seen.clipped) == (3, 3)
    assert float(guard.engagement().last_norm) == 100.0


def test_a_step_that_raised_is_healed_and_not_counted() -> None:
    optimizer = Watching(weights(), 1.0)
    guard = guarded(optimizer, warmup=10)
    optimizer.fails = True
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert optimizer.rates == [0.1, 0.1]
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert guard.engagement().steps == optimizer.param_groups[0][KEY] == 1


def test_a_checkpoint_saved_after_a_failed_step_holds_the_users_rate() -> None:
    optimizer = Watching(weights(), 1.0)
    guarded(optimizer, warmup=10)
    optimizer.fails = True
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 1.0


def test_a_checkpoint_loaded_after_a_failed_step_keeps_its_own_rate() -> None:
    optimizer = Watching(weights(), 1.0)
    guarded(optimizer, warmup=10)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.fails = True
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.fails = False
    optimizer.step()
    assert optimizer.rates[-1] == 0.05
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("rate", [1.0, torch.tensor(1.0)])
def test_the_phantom_step_of_a_distributed_checkpoint_counts_nothing(rate: Any) -> None:
    model = nn.Linear(2, 2)
    optimizer = Adam(model.parameters(), rate, foreach=False, capturable=False)
    guard = guarded(optimizer, max_norm=1.0, warmup=10, on_nonfinite="skip")
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state, "no phantom step happened"
    assert guard.engagement().steps == optimizer.param_groups[0][KEY] == 0
    assert guard.engagement().last_norm is None
    assert float(optimizer.param_groups[0]["lr"]) == 1.0


# Checkpoints


def test_progress_travels_into_a_fresh_optimizer() -> None:
    optimizer = SGD(weights(), 1.0)
    guarded(optimizer, warmup=10)
    for _ in range(3):
        optimizer.step()
    fresh = Watching(weights(), 1.0)
    guarded(fresh, warmup=10)
    fresh.load_state_dict(optimizer.state_dict())
    fresh.step()
    assert fresh.rates == [pytest.approx(0.4)]


def test_progress_travels_through_a_distributed_checkpoint() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer, fresh = (Adam(m.parameters(), 1.0) for m in (model, other))
    guarded(optimizer, warmup=10)
    guarded(fresh, warmup=10)
    fill_gradients(optimizer)
    optimizer.step()
    set_optimizer_state_dict(other, fresh, get_optimizer_state_dict(model, optimizer))
    assert fresh.param_groups[0][KEY] == 1


def test_an_older_checkpoint_does_not_take_the_key_away() -> None:
    optimizer = Watching(weights(), 1.0)
    older = optimizer.state_dict()
    guarded(optimizer, warmup=10)
    optimizer.step()
    optimizer.load_state_dict(older)
    assert optimizer.param_groups[0][KEY] == 0
    optimizer.step()
    assert optimizer.rates == [0.1, 0.1]


# Non-finite norms


@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_skip_changes_nothing_at_all(make: Any, by_closure: bool) -> None:
    params = [nn.Parameter(torch.ones(n)) for n in (3, 4)]
    optimizer = make(params)
    guard = guarded(optimizer, max_norm=1.0, warmup=5, on_nonfinite="skip")
    fill_gradients(optimizer)
    optimizer.step()
    before = copy.deepcopy([params, dict(optimizer.state_dict()["state"])])
    fill_gradients(optimizer, float("inf"))
    gradients = [param.grad for param in params]
    optimizer.step((lambda: 0.0) if by_closure else None)
    after = [params, dict(optimizer.state_dict()["state"])]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(params, gradients, strict=True))
    seen = guard.engagement()
    assert (seen.steps, seen.skipped, seen.nonfinite, seen.clipped) == (1, 1, 1, 1)
    # A fused kernel skips by itself, so that the host cannot know: the warm-up goes on.
    assert optimizer.param_groups[0][KEY] == 1 + bool(optimizer.param_groups[0].get("fused"))


def test_propagate_only_counts() -> None:
    params = weights()
    optimizer = SGD(params, 1.0)
    guard = guarded(optimizer, on_nonfinite="propagate")
    fill_gradients(optimizer, float("inf"))
    optimizer.step()
    assert all(bool(param.isinf().all()) for param in params)
    seen = guard.engagement()
    assert (seen.steps, seen.skipped, seen.nonfinite) == (1, 0, 1)


def test_gradients_hidden_by_a_failed_step_do_not_replace_new_ones() -> None:
    optimizer = Watching(weights(), 1.0)
    guard = guarded(optimizer, on_nonfinite="skip")
    fill_gradients(optimizer, float("nan"))
    optimizer.fails = True
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.fails = False
    fill_gradients(optimizer, 1.0)
    optimizer.step()
    assert all(bool((p == -1).all()) for p in optimizer.param_groups[0]["params"])
    seen = guard.engagement()
    assert (seen.steps, seen.skipped) == (1, 0)


def test_a_skipped_nested_step_is_one_skip() -> None:
    SGD(weights(), 1.0)
    params = weights()
    optimizer = Nested(params, 1.0)
    guard = guarded(optimizer, on_nonfinite="skip")
    fill_gradients(optimizer, float("nan"))
    gradient = params[0].grad
    optimizer.step()
    assert whole_norm(params) == 0.0
    assert params[0].grad is gradient
    seen = guard.engagement()
    assert (seen.steps, seen.skipped, seen.nonfinite) == (0, 1, 1)


def test_a_closure_called_again_sees_its_gradients_again() -> None:
    class Twice(SGD):
        def step(self, closure: Any = None) -> None:
            closure()
            closure()

    param = nn.Parameter(torch.zeros(2))
    optimizer = Twice([param], 1.0)
    guarded(optimizer, on_nonfinite="skip")
    seen: list[Tensor | None] = []

    def closure() -> None:
        seen.append(param.grad)
        param.grad = torch.full((2,), float("nan"))

    optimizer.step(closure)
    assert seen[0] is None and seen[1] is not None
    assert param.grad is not None


# Refusals


class ZeroRedundancyOptimizer(SGD):
    """Stands for torch's own by its name."""


class Wrapper(Optimizer):
    """A wrapper in the manner of Accelerate: an Optimizer without Optimizer's own hooks."""

    def __init__(self) -> None:
        pass


def test_refusals_are_said_whole() -> None:
    assert [str(refusal) for refusal in refusals_for_clip(torch.optim.LBFGS(weights(), 1.0))] == [
        "clipping inside the line search of LBFGS distorts its curvature estimate. "
        "Use another optimizer or leave the clip out. (RG906)"
    ]
    assert [str(refusal) for refusal in refusals_for_clip(ZeroRedundancyOptimizer(weights()))] == [
        "a ZeRO optimizer sees only the gradients of its own shard. "
        "Clip in the training loop, before `step`. (RG901)"
    ]
    assert [str(refusal) for refusal in refusals_for_clip(Wrapper())] == [
        "Wrapper wraps an optimizer and has no step hooks of its own. "
        "Pass the optimizer that it wraps. (RG901)"
    ]
    assert guard_of(Wrapper()) is None
    assert refusals_for_clip(AdamW(weights())) == []
