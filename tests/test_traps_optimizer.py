"""Traps 39 to 51 and 53: what an optimizer holds, its learning rate, its steps and its state.

Every test runs a second time against a plausible first implementation, and fails there.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from naive import fooled_by
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed
from torch.optim import LBFGS, SGD, Adam, Optimizer, lr_scheduler

import rnnguard
from rnnguard.errors import Refusal, RefusedError, RewriteError
from rnnguard.inspection import preflight
from rnnguard.probe.snapshot import fingerprint
from rnnguard.records import Change, Dose, Plan
from rnnguard.rewrite import stepguard
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.loan import Loan
from rnnguard.rewrite.stepguard import StepGuard

KEY = StepGuard.GROUP_KEY
WARM: dict[str, Dose] = {"warmup_cosine": {"warmup": 4}}
CLIP: dict[str, Dose] = {"clip_gradient": {"max_norm": 1.0}}


class Net(nn.Module):
    """A recurrence and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3, batch_first=True)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0][:, -1])
        return output


def plan_of(**doses: Dose) -> Plan:
    changes = [
        Change(remedy=name, path=None, tier="step", dose=dose, scenario="test", why="a test")
        for name, dose in doses.items()
    ]
    return Plan(changes=tuple(changes))


NORM = Plan(
    changes=(
        Change(
            remedy="layer_norm",
            path="rnn",
            tier="structure",
            dose={},
            scenario="test",
            why="a test",
        ),
    )
)


def train(model: nn.Module, optimizer: Optimizer, size: float = 1.0) -> None:
    """One step along the same gradient for every entry."""
    optimizer.zero_grad()
    (size * sum(param.sum() for param in model.parameters())).backward()
    optimizer.step()


def every_use(monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any) -> None:
    """Replaces a function wherever the package has imported it."""
    for module in [m for n, m in sys.modules.items() if n.startswith("rnnguard.")]:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, replacement)


# What the optimizer holds


def demand_equal_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusals(model: nn.Module, optimizer: Optimizer) -> Iterator[Refusal]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held != {id(p) for p in model.parameters()}:
            yield Refusal("RG904", "optimizer", "it holds other parameters.", "Build it anew.")

    assert hasattr(preflight, "optimizer_refusals")
    every_use(monkeypatch, "optimizer_refusals", refusals)


@fooled_by(demand_equal_sets, fails_with=RefusedError)
def test_trap_39_an_optimizer_may_hold_a_part_of_the_model() -> None:
    model = Net()
    optimizer = SGD(model.head.parameters(), 1.0)
    report = rnnguard.apply(model, optimizer, plan_of(**CLIP))
    train(model, optimizer, 100.0)
    assert report.live is not None and report.live.clipped == 1


def look_at_the_first_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusals(model: nn.Module, optimizer: Optimizer) -> Iterator[Refusal]:
        first = optimizer.param_groups[0]["params"][0]
        if not any(first is p for p in model.parameters()):
            fact = f"holds 1 that is not this model's: {tuple(first.shape)}."
            yield Refusal("RG904", "optimizer", fact, "Build it anew.")

    every_use(monkeypatch, "optimizer_refusals", refusals)


@fooled_by(look_at_the_first_only)
def test_trap_40_foreign_parameters_are_refused_and_all_listed() -> None:
    model = Net()
    foreign = [nn.Parameter(torch.zeros(7, 5)), nn.Parameter(torch.zeros(11))]
    optimizer = SGD([foreign[0], *model.parameters(), foreign[1]], 1.0)
    before = fingerprint(model, optimizer)
    with pytest.raises(RefusedError) as refused:
        rnnguard.apply(model, optimizer, plan_of(**CLIP))
    assert "(7, 5)" in str(refused.value) and "(11,)" in str(refused.value)
    assert fingerprint(model, optimizer) == before


def adopt_into(monkeypatch: pytest.MonkeyPatch, adopt: Callable[[Any, list[Tensor]], None]) -> None:
    def adopt_(self: Edit, params: dict[str, Tensor], like: Tensor) -> None:
        adopt(self._optimizer, list(params.values()))

    monkeypatch.setattr(Edit, "adopt_", adopt_)


def adopt_into_the_first_group(monkeypatch: pytest.MonkeyPatch) -> None:
    adopt_into(monkeypatch, lambda optimizer, new: optimizer.param_groups[0]["params"].extend(new))


@fooled_by(adopt_into_the_first_group)
def test_trap_41_new_parameters_join_the_group_of_their_sibling() -> None:
    """The recurrence is split over two groups; the norm goes where its first weight is."""
    model = Net()
    weights = [p for p in model.rnn.parameters() if p.dim() > 1]
    biases = [p for p in model.rnn.parameters() if p.dim() == 1]
    groups = [
        {"params": [*model.head.parameters(), *biases]},
        {"params": weights, "weight_decay": 0.1},
    ]
    optimizer = SGD(groups, 1.0)
    rnnguard.apply(model, optimizer, NORM)
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    new = {id(p) for p in model.rnn.output_norm.parameters()}
    assert new <= held[1] and not new & held[0]


@fooled_by(adopt_into_the_first_group, fails_with=RewriteError)
def test_trap_42_parameters_and_their_names_stay_in_step() -> None:
    model = Net()
    optimizer = SGD(model.named_parameters(), 1.0)
    rnnguard.apply(model, optimizer, NORM)
    (group,) = optimizer.param_groups
    named = dict(model.named_parameters())
    assert len(group["param_names"]) == len(group["params"]) == len(named)
    pairs = zip(group["param_names"], group["params"], strict=True)
    assert all(named[name] is param for name, param in pairs)


def rebind_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def adopt(optimizer: Optimizer, new: list[Tensor]) -> None:
        group = optimizer.param_groups[0]
        group["params"] = [*group["params"], *new]

    adopt_into(monkeypatch, adopt)


@fooled_by(rebind_the_list)
def test_trap_43_lbfgs_takes_new_parameters_before_its_first_step_only() -> None:
    model = Net()
    optimizer = LBFGS(model.parameters())
    rnnguard.apply(model, optimizer, NORM)
    assert optimizer._params is optimizer.param_groups[0]["params"]
    assert any(p is model.rnn.output_norm.weight for p in optimizer._params)
    model = Net()
    optimizer = LBFGS(model.parameters())
    optimizer.step(lambda: sum(p.square().sum() for p in model.parameters()))
    before = fingerprint(model, optimizer)
    with pytest.raises(RefusedError):
        rnnguard.apply(model, optimizer, NORM)
    assert fingerprint(model, optimizer) == before


# Its learning rate


SCHEDULERS: list[Callable[[Optimizer], Any]] = [
    lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=10),
    lambda o: lr_scheduler.StepLR(o, 2),
    lambda o: lr_scheduler.ExponentialLR(o, 0.9),
]


class Watching(SGD):
    """Notes the learning rate that a step really uses."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        self.used = [*getattr(self, "used", []), float(self.param_groups[0]["lr"])]
        self.object = self.param_groups[0]["lr"]
        if self.fails:
            raise RuntimeError("out of memory")
        return super().step(closure)


def rates(make: Any, guard: str) -> tuple[list[float], list[float], Any]:
    """At rest and in use over six steps, with the guard before, after or without."""
    model = Net()
    optimizer = Watching(model.parameters(), 1.0)
    if guard == "before":
        rnnguard.apply(model, optimizer, plan_of(**WARM))
    scheduler = make(optimizer)
    if guard == "after":
        rnnguard.apply(model, optimizer, plan_of(**WARM))
    at_rest = []
    for _ in range(6):
        train(model, optimizer)
        at_rest.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return at_rest, optimizer.used, scheduler


def leave_the_scaled_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loan, "return_all_", lambda self: self.rates.clear())


@fooled_by(leave_the_scaled_rate)
def test_trap_44_a_scheduler_built_before_sees_the_users_rate() -> None:
    for make in SCHEDULERS:
        rest, used, _ = rates(make, "after")
        plain_rest, plain_used, _ = rates(make, "without")
        assert rest == plain_rest
        factors = [0.25, 0.5, 0.75, 1, 1, 1]
        assert used == pytest.approx([r * f for r, f in zip(plain_used, factors, strict=True)])


def lower_the_rate_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install = StepGuard.install

    def installed(self: StepGuard, optimizer: Optimizer) -> None:
        install(self, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / max(self.settings.warmup, 1)

    monkeypatch.setattr(StepGuard, "install", installed)


@fooled_by(lower_the_rate_at_once)
def test_trap_45_a_scheduler_built_after_starts_from_the_users_rate() -> None:
    for make in SCHEDULERS:
        rest, _, scheduler = rates(make, "before")
        plain_rest, _, plain = rates(make, "without")
        assert scheduler.base_lrs == plain.base_lrs
        assert rest == plain_rest


def bind_a_new_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(self: Loan, optimizer: Optimizer, settings: Any, progress: str) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.25

    def back(self: Loan) -> None:
        return None

    after = StepGuard._after_step

    def give_back(self: StepGuard, optimizer: Optimizer, *rest: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 0.25
        after(self, optimizer, *rest)

    monkeypatch.setattr(Loan, "scale_rates_", scale)
    monkeypatch.setattr(Loan, "return_all_", back)
    monkeypatch.setattr(StepGuard, "_after_step", give_back)


@fooled_by(bind_a_new_rate)
def test_trap_46_a_tensor_rate_is_the_same_object_in_and_after_the_step() -> None:
    rate = torch.tensor(1.0)
    model = Net()
    optimizer = Watching(model.parameters(), rate)
    rnnguard.apply(model, optimizer, plan_of(**WARM))
    train(model, optimizer)
    assert optimizer.used == [0.25]
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 1.0
    assert optimizer.object is rate


def forget_what_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    before = StepGuard._before_step

    def anew(self: StepGuard, *args: Any) -> Any:
        self._loan = Loan()
        return before(self, *args)

    monkeypatch.setattr(StepGuard, "_before_step", anew)


@fooled_by(forget_what_is_lent)
def test_trap_47_a_step_that_raised_is_healed_by_the_next() -> None:
    model = Net()
    optimizer = Watching(model.parameters(), 1.0)
    rnnguard.apply(model, optimizer, plan_of(**WARM))
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, optimizer)
    optimizer.fails = False
    train(model, optimizer)
    assert optimizer.used == [0.25, 0.25]
    assert optimizer.param_groups[0]["lr"] == 1.0


class Nested(SGD):
    """A subclass whose step calls its parent's, for which torch runs the hooks again."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def count_every_post_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(self: StepGuard, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._end_step()
        for group in optimizer.param_groups:
            group[KEY] += 1

    monkeypatch.setattr(StepGuard, "_after_step", after)


@fooled_by(count_every_post_hook)
def test_trap_48_a_step_inside_a_step_counts_once() -> None:
    SGD([torch.zeros(1)], 1.0)  # only now does Nested run the hooks twice
    model = Net()
    optimizer = Nested(model.parameters(), 1.0)
    report = rnnguard.apply(model, optimizer, plan_of(**WARM, **CLIP))
    for step in range(1, 4):
        train(model, optimizer, 100.0)
        assert optimizer.param_groups[0][KEY] == step
    assert report.live is not None
    assert (report.live.steps, report.live.clipped) == (3, 3)
    assert report.live.last_norm > 100.0  # before the clip


# Copies and checkpoints


def believe_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(optimizer: Optimizer) -> Any:
        return object() if KEY in optimizer.param_groups[0] else None

    every_use(monkeypatch, "guard_of", marked)


@fooled_by(believe_the_key)
def test_trap_49_a_copied_optimizer_is_reported_as_unguarded() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), 1.0)
    rnnguard.apply(model, optimizer, plan_of(**CLIP))
    twin, copied = copy.deepcopy((model, optimizer))
    data = torch.randn(4, 6, 2)
    codes = {
        name: {f.code for f in rnnguard.audit(m, o, inputs=data).findings}
        for name, m, o in (("guarded", model, optimizer), ("copy", twin, copied))
    }
    assert "RG501" in codes["copy"] and "RG501" not in codes["guarded"]
    assert KEY in copied.param_groups[0]


def load_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGuard, "_before_load", lambda *_: None)
    monkeypatch.setattr(StepGuard, "_after_load", lambda *_: None)


@fooled_by(load_as_it_comes, fails_with=(AssertionError, KeyError, pytest.fail.Exception))
def test_trap_50_an_older_or_permuted_checkpoint_is_mended_or_refused() -> None:
    model = Net()
    older = Adam(model.parameters()).state_dict()
    optimizer = Adam(model.parameters())
    rnnguard.apply(model, optimizer, plan_of(**WARM, **CLIP))
    train(model, optimizer)
    optimizer.load_state_dict(older)
    assert optimizer.param_groups[0][KEY] == 0
    train(model, optimizer)
    assert optimizer.param_groups[0][KEY] == 1

    grown = Net()
    adopting = Adam(grown.parameters())
    rnnguard.apply(grown, adopting, NORM)
    train(grown, adopting)
    other = Net()
    rnnguard.apply(other, SGD(other.parameters(), 1.0), NORM)
    fresh = Adam(other.parameters())  # built on the rewritten model: another order
    rnnguard.apply(other, fresh, plan_of(**CLIP))
    before = fingerprint(other, fresh)
    with pytest.raises(RefusedError, match=r"checkpoint.s state 4 has shape.*rnnguard.apply"):
        fresh.load_state_dict(adopting.state_dict())
    assert fingerprint(other, fresh) == before


def count_the_phantom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepguard, "every_rate_is_zero", lambda optimizer: False)


@fooled_by(count_the_phantom)
def test_trap_51_distributed_checkpoints_carry_progress_and_count_no_phantom_step() -> None:
    for flat in (False, True):
        options = distributed.StateDictOptions(flatten_optimizer_state_dict=flat)
        model, other = Net(), Net()
        optimizer, fresh = Adam(model.parameters()), Adam(other.parameters())
        plan = plan_of(**WARM, clip_gradient={"by": "percentile", "window": 8})
        reports = rnnguard.apply(model, optimizer, plan), rnnguard.apply(other, fresh, plan)
        distributed.get_optimizer_state_dict(model, optimizer, options=options)
        assert optimizer.state, "no phantom step happened"
        assert optimizer.param_groups[0][KEY] == 0
        for size in range(1, 20):
            train(model, optimizer, float(size))
        saved = distributed.get_optimizer_state_dict(model, optimizer, options=options)
        distributed.set_optimizer_state_dict(other, fresh, saved, options=options)
        assert fresh.param_groups[0][KEY] == 19
        train(model, optimizer, 50.0)
        train(other, fresh, 50.0)
        assert reports[0].live == reports[1].live
        assert reports[0].live.clipped > 0


# Sharpness-aware steps


class Sharpness(Optimizer):
    """Two phases around a base optimizer that shares its groups, as the usual SAM code has it."""

    def __init__(self, params: Any, base: type[Optimizer], **options: Any) -> None:
        super().__init__(params, dict(rho=0.05, **options))
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def _every(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self._every()]).norm()
        for p in self._every():
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * (0.05 / norm))

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self._every():
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def hook_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    every_use(monkeypatch, "stepping", lambda optimizer: optimizer)


@fooled_by(hook_the_wrapper)
def test_trap_53_both_phases_of_a_sharpness_aware_step_and_one_clip() -> None:
    for by_closure in (False, True):
        model = Net()
        optimizer = Sharpness(model.parameters(), SGD, lr=1.0)
        report = rnnguard.apply(model, optimizer, plan_of(**CLIP))
        start = [p.detach().clone() for p in model.parameters()]

        def closure(model: Net = model, optimizer: Optimizer = optimizer) -> Tensor:
            for p in model.parameters():
                p.grad = None
            loss = 100 * sum(((p - 3) ** 2).sum() for p in model.parameters())
            loss.backward()
            return loss

        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
        uphill = torch.cat([(p - 3).flatten() for p in start])
        second = uphill + 0.05 * uphill / uphill.norm()
        wanted = torch.cat([p.flatten() for p in start]) - second / second.norm()
        found = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert report.live is not None
        assert (report.live.steps, report.live.clipped) == (1, 1)
