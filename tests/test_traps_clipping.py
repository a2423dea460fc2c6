"""Traps 38 and 55 to 64: gradients that a naive clip bounds wrongly, or not at all.

Every test runs a second time against a plausible first implementation, and fails there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive import fooled_by
from test_clipping import HostReads
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import LBFGS, SGD, Optimizer

import rnnguard
from rnnguard.errors import RefusedError
from rnnguard.records import Change, Dose, Plan
from rnnguard.rewrite import clipping
from rnnguard.rewrite.clipping import Gradients
from rnnguard.rewrite.engagement import Engagement
from rnnguard.rewrite.loan import Loan
from rnnguard.rewrite.stepguard import StepGuard, guard_of

FORMS: dict[str, Dose] = {
    "norm": {"max_norm": 1.0},
    "group": {"by": "group", "max_norm": 1.0},
    "value": {"by": "value", "max_value": 0.25},
    "percentile": {"by": "percentile", "window": 8, "max_norm": 1.0},
    "z_score": {"by": "z_score", "window": 8, "max_norm": 1.0},
}


class Net(nn.Module):
    """A recurrence and a head; the loss below gives every entry the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3)
        self.head = nn.Linear(3, 1)


def guarded(model: nn.Module, optimizer: Optimizer, **doses: Dose) -> rnnguard.Report:
    """The step remedies with these doses, replayed from a plan."""
    changes = [
        Change(remedy=name, path=None, tier="step", dose=dose, scenario="test", why="a test")
        for name, dose in doses.items()
    ]
    return rnnguard.apply(model, optimizer, Plan(changes=tuple(changes)))


def live(report: rnnguard.Report) -> Engagement:
    assert report.live is not None
    return report.live


def slope(model: nn.Module, size: float) -> Tensor:
    """A loss whose gradient has norm `size`."""
    params = list(model.parameters())
    count = sum(param.numel() for param in params)
    return sum((param * (size / math.sqrt(count))).sum() for param in params)


def moved(model: nn.Module, step: Callable[[], object]) -> float:
    """The norm by which a step moves all weights."""
    before = [param.detach().clone() for param in model.parameters()]
    step()
    pairs = zip(model.parameters(), before, strict=True)
    return math.sqrt(sum(float((p.detach() - b).square().sum()) for p, b in pairs))


def every_parameter(optimizer: Optimizer) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def clip_by_ratio_to_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adaptive gradient clipping without a floor under the norm of the weights."""

    def clip(self: StepGuard, optimizer: Optimizer) -> None:
        for param in every_parameter(optimizer):
            if param.grad is not None:
                largest = 0.01 * param.detach().norm() / (param.grad.norm() + 1e-6)
                param.grad.mul_(largest.clamp(max=1.0))

    monkeypatch.setattr(StepGuard, "_clip", clip)


@fooled_by(clip_by_ratio_to_the_weights)
def test_trap_38_weights_of_norm_zero_train_under_every_form() -> None:
    for dose in FORMS.values():
        model = Net()
        with torch.no_grad():
            model.head.bias.zero_()
        optimizer = SGD(model.parameters(), 0.1)
        guarded(model, optimizer, clip_gradient=dose)
        for _ in range(10):
            optimizer.zero_grad()
            slope(model, 30.0).backward()
            optimizer.step()
        assert model.head.bias.abs().min() > 0.01, dose


def forget_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Gradients.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Gradients], optimizer: Optimizer) -> Gradients:
        return cls(original(cls, optimizer).groups, None)

    monkeypatch.setattr(Gradients, "of", classmethod(of))


@fooled_by(forget_the_scale)
def test_trap_55_update_norm_is_the_same_under_every_kind_of_scaler() -> None:
    for form, dose in FORMS.items():
        found = []
        for fused in (False, True):
            for unscaled in (False, True):
                model = Net()
                optimizer = SGD(model.parameters(), 1.0, fused=fused)
                guarded(model, optimizer, clip_gradient=dose)
                scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
                scaler.scale(slope(model, 1000.0)).backward()
                if unscaled:
                    scaler.unscale_(optimizer)
                found.append(moved(model, lambda s=scaler, o=optimizer: s.step(o)))
        count = sum(param.numel() for param in Net().parameters())
        wanted = 0.25 * math.sqrt(count) if form == "value" else 1.0
        assert found == pytest.approx([wanted] * 4, rel=1e-4), form


def count_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress that advances whenever a post hook runs."""

    def after(self: StepGuard, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._end_step()
        for group in optimizer.param_groups:
            group[self.GROUP_KEY] += 1

    monkeypatch.setattr(StepGuard, "_after_step", after)


@fooled_by(count_every_call)
def test_trap_56_a_skipped_step_does_not_advance_the_warm_up() -> None:
    """By the guard or by a scaler; a fused kernel skips by itself, and there it advances."""
    reached = []
    for fused in (False, True):
        for scaled in (False, True):
            model = Net()
            optimizer = SGD(model.parameters(), 1.0, fused=fused)
            doses: dict[str, Dose] = {"nonfinite_guard": {"on_nonfinite": "skip"}}
            report = guarded(model, optimizer, warmup_cosine={"warmup": 4}, **doses)
            scaler = torch.amp.GradScaler("cpu", enabled=scaled)
            scaler.scale(slope(model, 1.0) * math.inf).backward()
            assert moved(model, lambda s=scaler, o=optimizer: s.step(o)) == 0.0
            assert live(report).steps == 0
            reached.append(optimizer.param_groups[0][StepGuard.GROUP_KEY])
    assert reached == [0, 0, 1, 1]


def clip_before_the_closure(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_clip(self: StepGuard, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._clip(optimizer)

    monkeypatch.setattr(StepGuard, "_with_clip", with_clip)


@fooled_by(clip_before_the_closure)
def test_trap_57_closures_are_clipped_after_their_backward_and_lbfgs_is_refused() -> None:
    for by_name in (False, True):
        model = Net()
        optimizer = SGD(model.parameters(), 1.0)
        guarded(model, optimizer, clip_gradient={"max_norm": 1.0})

        def closure(model: Net = model, optimizer: SGD = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = slope(model, 1000.0)
            loss.backward()
            return loss

        how = {"closure": closure} if by_name else {}
        positional = () if by_name else (closure,)
        step = lambda o=optimizer, p=positional, h=how: o.step(*p, **h)  # noqa: E731
        assert moved(model, step) == pytest.approx(1.0, rel=1e-4)
    model = Net()
    with pytest.raises(RefusedError, match="RG906"):
        guarded(model, LBFGS(model.parameters()), clip_gradient={"max_norm": 1.0})


def bring_every_norm_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "_factor", lambda size, bound: bound / (size + 1e-6))


@fooled_by(bring_every_norm_to_the_bound)
def test_trap_58_the_users_own_clip_is_not_doubled_and_shows() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), 1.0)
    report = guarded(model, optimizer, clip_gradient={"max_norm": 1.0})
    for _ in range(3):
        optimizer.zero_grad()
        slope(model, 1000.0).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        assert moved(model, optimizer.step) == pytest.approx(0.5, rel=1e-4)
    assert live(report).share_clipped == 0.0
    assert live(report).last_norm == pytest.approx(0.5, rel=1e-4)


def clip_at_every_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(self: StepGuard, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        for param in every_parameter(optimizer):
            param.register_hook(lambda grad: grad / max(1.0, float(grad.norm())))

    monkeypatch.setattr(StepGuard, "install", install)


@fooled_by(clip_at_every_backward)
def test_trap_59_accumulated_gradients_are_clipped_once_as_a_sum() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), 1.0)
    guarded(model, optimizer, clip_gradient={"max_norm": 1.0})
    for size in (100.0, -99.5):  # whose sum is small enough to pass untouched
        slope(model, size).backward()
    assert moved(model, optimizer.step) == pytest.approx(0.5, rel=1e-4)


class Words(nn.Module):
    """A table whose gradient is sparse, and the head that reads it."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 3, sparse=sparse)
        self.head = nn.Linear(3, 1)


def leave_sparse_gradients_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = clipping._entries
    monkeypatch.setattr(
        clipping,
        "_entries",
        lambda params: original([p for p in params if p.grad is not None and not p.grad.is_sparse]),
    )


@fooled_by(leave_sparse_gradients_out)
def test_trap_60_sparse_gradients_count_and_are_scaled_like_dense_ones() -> None:
    for dose in FORMS.values():
        ends = []
        for sparse in (True, False):
            model = Words(sparse)
            optimizer = SGD(model.parameters(), 0.1)
            report = guarded(model, optimizer, clip_gradient=dose)
            for step in range(9):
                optimizer.zero_grad()
                rows = torch.tensor([1, 1, step % 5])
                (50 * model.head(model.table(rows))).sum().backward()
                optimizer.step()
            ends.append([*model.parameters()])
            assert live(report).clipped > 0
        torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def skip_by_zeroing(monkeypatch: pytest.MonkeyPatch) -> None:
    def hide(self: Loan, params: Any) -> None:
        for param in params:
            param.grad.zero_()

    monkeypatch.setattr(Loan, "hide_gradients_", hide)


@fooled_by(skip_by_zeroing)
def test_trap_61_a_broken_gradient_is_skipped_or_passed_on_as_asked() -> None:
    moves = {}
    for policy in ("skip", "propagate"):
        model = Net()
        optimizer = SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        report = guarded(model, optimizer, nonfinite_guard={"on_nonfinite": policy})
        slope(model, 1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
        slope(model, math.inf).backward()
        moves[policy] = moved(model, optimizer.step)
        assert (live(report).nonfinite, live(report).skipped) == (1, int(policy == "skip"))
    assert moves["skip"] == 0.0
    assert not math.isfinite(moves["propagate"])


def stack_all_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(self: StepGuard, optimizer: Optimizer) -> None:
        grads = [param.grad for param in every_parameter(optimizer) if param.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for grad in grads:
            grad.mul_((1 / norm).clamp(max=1))

    monkeypatch.setattr(StepGuard, "_clip", clip)


@fooled_by(stack_all_norms, fails_with=RuntimeError)
def test_trap_62_a_step_without_gradients_is_a_step() -> None:
    for dose in FORMS.values():
        model = Net()
        optimizer = SGD(model.parameters(), 1.0)
        report = guarded(model, optimizer, clip_gradient=dose)
        assert moved(model, optimizer.step) == 0.0
        assert (live(report).steps, live(report).last_norm) == (1, None)


def ask_whether_to_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Gradients.limit_

    def limit(self: Gradients, clip: Any, sizes: list[Tensor], bound: Any) -> None:
        if any(size > bound for size in sizes):
            original(self, clip, sizes, bound)

    monkeypatch.setattr(Gradients, "limit_", limit)


@fooled_by(ask_whether_to_clip)
def test_trap_63_no_step_waits_for_the_device() -> None:
    """Counted among the operations on the CPU; on CUDA torch itself watches as well."""
    cuda = torch.cuda.is_available()
    for dose in FORMS.values():
        model = Net().to("cuda" if cuda else "cpu")
        optimizer = SGD(model.parameters(), 0.1, fused=True)
        doses: dict[str, Dose] = {
            "nonfinite_guard": {"on_nonfinite": "skip"},
            "warmup_cosine": {"warmup": 3, "total_steps": 9},
        }
        report = guarded(model, optimizer, clip_gradient=dose, **doses)
        reads = HostReads()
        for step in range(20):
            optimizer.zero_grad()
            slope(model, 1.0 + step).backward()
            if cuda and step:
                torch.cuda.set_sync_debug_mode("error")
            try:
                with reads:
                    optimizer.step()
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
        assert reads.seen == [], dose
        assert live(report).steps == 20


def multiply_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "multiply_", lambda those, by: torch._foreach_mul_([*those], by))


@fooled_by(multiply_all_at_once)
def test_trap_64_each_device_is_scaled_by_a_factor_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Meta tensors stand for those of a second device, which the machine may not have."""
    multiply, devices = torch._foreach_mul_, []

    def noting(those: list[Tensor], factor: Tensor) -> None:
        devices.append(({each.device.type for each in those}, factor.device.type))
        multiply(those, factor)

    monkeypatch.setattr(torch, "_foreach_mul_", noting)
    here, there = torch.full((4,), 3.0), torch.empty(2, device="meta")
    gradients = Gradients([[here, there]], None)
    gradients.limit_("norm", [torch.tensor(6.0)], 2.0)
    assert devices == [({"cpu"}, "cpu"), ({"meta"}, "meta")]
    assert here.tolist() == pytest.approx([1.0] * 4)


def test_the_guard_of_a_plan_is_the_optimizers_own() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), 1.0)
    report = guarded(model, optimizer, clip_gradient={"max_norm": 1.0})
    guard = guard_of(optimizer)
    assert guard is not None and live(report) == guard.engagement()
    report.undo()
    assert report.live is None
