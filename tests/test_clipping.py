"""Every form of clipping against a loop written by hand, in every way that a step is driven."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from rnnguard.errors import RefusedError
from rnnguard.rewrite.clipping import Gradients, multiply_
from rnnguard.rewrite.engagement import BLOCK
from rnnguard.rewrite.stepguard import GuardSettings, StepGuard

STEPS = 28
FORMS: dict[str, dict[str, Any]] = {
    "norm": {"max_norm": 2.0},
    "group": {"clip": "group", "max_norm": 1.5},
    "value": {"clip": "value", "max_value": 3.0},
    "percentile": {"clip": "percentile", "percentile": 40.0, "window": 6, "max_norm": 3.0},
    "z_score": {"clip": "z_score", "z_score": 0.25, "window": 5},
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda groups: SGD(groups, 0.02, momentum=0.9, weight_decay=0.01),
    "adam": lambda groups: Adam(groups, 0.1),
    "adamw": lambda groups: AdamW(groups, 0.1),
    "fused sgd": lambda groups: SGD(groups, 0.02, momentum=0.9, weight_decay=0.01, fused=True),
    "fused adam": lambda groups: Adam(groups, 0.1, fused=True),
    "fused adamw": lambda groups: AdamW(groups, 0.1, fused=True),
    "fused adagrad": lambda groups: Adagrad(groups, 0.1, fused=True),
}


def fresh(make: Callable[[Any], Optimizer]) -> tuple[list[Tensor], Optimizer]:
    """Three parameters in two groups, always the same ones."""
    generator = torch.Generator().manual_seed(3)
    sizes = (3, 4, 2)
    params: list[Tensor] = [
        nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in sizes
    ]
    return params, make([{"params": params[:2]}, {"params": params[2:]}])


def losses(params: list[Tensor]) -> Iterator[Callable[[], Tensor]]:
    """One loss per step; their gradients differ in size by a factor of up to fifty."""
    generator = torch.Generator().manual_seed(4)
    for step in range(STEPS):
        scale = (0.2, 4.0, 1.0, 10.0, 0.5)[step % 5]
        targets = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
        yield (
            lambda t=targets, s=scale: (
                s
                * sum(  # type: ignore[misc]
                    ((p - q) ** 2).sum() for p, q in zip(params, t, strict=True)
                )
            )
        )


class ByHand:
    """What each form does, written down once more with numpy; `clipped` counts its steps."""

    def __init__(self, form: str, settings: dict[str, Any]) -> None:
        self.form, self.settings, self.norms = form, settings, list[float]()
        self.clipped = 0

    def __call__(self, optimizer: Optimizer) -> None:
        groups = [[p.grad for p in g["params"]] for g in optimizer.param_groups]
        every = [grad for group in groups for grad in group]
        if self.form == "value":
            limit = self.settings["max_value"]
            self.clipped += any(bool((grad.abs() > limit).any()) for grad in every)
            for grad in every:
                grad.clamp_(-limit, limit)
        elif self.form == "group":
            tops = [self._scale(group, self.settings["max_norm"]) for group in groups]
            self.clipped += any(tops)
        else:
            self.clipped += self._scale(every, self._bound(norm_of(every)))

    def _scale(self, grads: list[Tensor], bound: float) -> bool:
        norm = norm_of(grads)
        if norm > bound:
            for grad in grads:
                grad.mul_(bound / norm)
        return norm > bound

    def _bound(self, norm: float) -> float:
        cold: float = self.settings.get("max_norm", math.inf)
        if self.form == "norm":
            return cold
        known = self.norms[: len(self.norms) // BLOCK * BLOCK][-self.settings["window"] :]
        bound = cold
        if known and self.form == "percentile":
            bound = float(numpy.percentile(known, self.settings["percentile"]))
        elif known:
            mean, deviation = float(numpy.mean(known)), float(numpy.std(known))
            limit = self.settings["z_score"]
            z = (norm - mean) / deviation
            bound = mean + deviation * (limit**2 / z if z > limit else limit)
        self.norms.append(norm if self.form == "percentile" else min(norm, bound))
        return bound


def norm_of(grads: list[Tensor]) -> float:
    return math.sqrt(sum(float((grad**2).sum()) for grad in grads))


def trained_by_hand(form: str, make: Callable[[Any], Optimizer]) -> tuple[list[Tensor], int]:
    params, optimizer = fresh(make)
    clip = ByHand(form, FORMS[form])
    for loss in losses(params):
        optimizer.zero_grad()
        loss().backward()
        clip(optimizer)
        optimizer.step()
    return params, clip.clipped


def plainly(optimizer: Optimizer, loss: Callable[[], Tensor], scaler: Any) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def accumulated(optimizer: Optimizer, loss: Callable[[], Tensor], scaler: Any) -> None:
    optimizer.zero_grad()
    for part in (0.25, 0.75):
        (part * loss()).backward()
    optimizer.step()


def by_closure(optimizer: Optimizer, loss: Callable[[], Tensor], scaler: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def by_named_closure(optimizer: Optimizer, loss: Callable[[], Tensor], scaler: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure=closure)


def scaled(optimizer: Optimizer, loss: Callable[[], Tensor], scaler: Any) -> None:
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    scaler.step(optimizer)
    scaler.update()


def unscaled(optimizer: Optimizer, loss: Callable[[], Tensor], scaler: Any) -> None:
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


WAYS = [plainly, accumulated, by_closure, by_named_closure, scaled, unscaled]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_training_equals_a_loop_written_by_hand(form: str, name: str) -> None:
    """Steps taken in each way end in the weights of the hand-written loop, to 1e-6."""
    wanted, clipped = trained_by_hand(form, OPTIMIZERS[name])
    assert 3 <= clipped < STEPS, "the test must see both kinds of steps"
    for way in WAYS:
        params, optimizer = fresh(OPTIMIZERS[name])
        guard = StepGuard(GuardSettings(**FORMS[form]))
        guard.install(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for loss in losses(params):
            way(optimizer, loss, scaler)
        off = [float((p - q).detach().abs().max()) for p, q in zip(params, wanted, strict=True)]
        assert max(off) < 1e-6, way.__name__
        assert guard.engagement().clipped == clipped, way.__name__


class Ascent:
    """Sharpness-aware steps around a base optimizer with the very same groups."""

    def __init__(self, base: Optimizer, radius: float = 0.05) -> None:
        self.base_optimizer, self.param_groups, self.radius = base, base.param_groups, radius

    def step(self, closure: Callable[[], Tensor]) -> None:
        closure()
        every = [p for group in self.param_groups for p in group["params"]]
        norm = norm_of([p.grad for p in every])
        moves = [p.grad * (self.radius / norm) for p in every]
        with torch.no_grad():
            for p, move in zip(every, moves, strict=True):
                p.add_(move)
        closure()
        with torch.no_grad():
            for p, move in zip(every, moves, strict=True):
                p.sub_(move)
        self.base_optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_sharpness_aware_steps_clip_the_second_gradient_only(form: str) -> None:
    def trained(by_hand: ByHand | None) -> tuple[list[Tensor], int]:
        params, base = fresh(OPTIMIZERS["sgd"])
        if by_hand is None:
            guard = StepGuard(GuardSettings(**FORMS[form]))
            guard.install(base)
        else:
            base.register_step_pre_hook(lambda optimizer, *_: by_hand(optimizer))
        sharpness_aware = Ascent(base)
        for loss in losses(params):

            def closure(loss: Callable[[], Tensor] = loss) -> Tensor:
                base.zero_grad()
                value = loss()
                value.backward()
                return value

            sharpness_aware.step(closure)
        return params, by_hand.clipped if by_hand else guard.engagement().steps

    wanted, clipped = trained(ByHand(form, FORMS[form]))
    params, counted = trained(None)
    torch.testing.assert_close(params, wanted, rtol=0, atol=1e-6)
    assert counted == STEPS and clipped >= 3


# No step waits for the device

READS = {"_local_scalar_dense", "is_nonzero", "equal", "item", "nonzero", "masked_select"}


class HostReads(TorchDispatchMode):
    """Notes the operations by which the host learns a value, or its number of values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        target = (kwargs or {}).get("device")
        moved = name == "_to_copy" and target is not None and target != args[0].device
        if name in READS or moved:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [None, "propagate", "skip"])
@pytest.mark.parametrize("form", FORMS)
def test_no_step_waits_for_the_device(form: str, policy: Any) -> None:
    settings = FORMS[form] | {"on_nonfinite": policy, "warmup": 3, "total_steps": 9}
    params, optimizer = fresh(OPTIMIZERS["fused sgd"])
    guard = StepGuard(GuardSettings(**settings))
    guard.install(optimizer)
    functions = list(losses(params))
    for loss in functions[:BLOCK]:
        plainly(optimizer, loss, None)
    reads = HostReads()
    for loss in 2 * functions[:BLOCK]:
        optimizer.zero_grad()
        loss().backward()
        with reads:
            optimizer.step()
    assert reads.seen == []
    assert guard.engagement().steps == 3 * BLOCK


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_rate_and_a_scaler_do_not_make_it_wait(form: str) -> None:
    params, _ = fresh(OPTIMIZERS["sgd"])
    optimizer = Adam(params, torch.tensor(0.1), fused=True)
    StepGuard(GuardSettings(**FORMS[form], warmup=9)).install(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    reads = HostReads()
    for loss in list(losses(params))[:3]:
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        with reads:
            optimizer.step()
    assert reads.seen == []


def test_the_host_reads_are_seen() -> None:
    with HostReads() as reads:
        if torch.ones(1).sum() > 0:
            torch.ones(3)[torch.tensor([True, False, True])]
    assert reads.seen[0] == "_local_scalar_dense"


# Gradients of all kinds


@pytest.mark.parametrize("form", FORMS)
def test_sparse_gradients_are_clipped_like_dense_ones(form: str) -> None:
    """Rows that are looked up twice meet in one entry; the dense head shares the norm."""

    def trained(sparse: bool) -> tuple[list[Tensor], Any]:
        torch.manual_seed(0)
        table, head = nn.Embedding(7, 3, sparse=sparse).double(), nn.Linear(3, 2).double()
        optimizer = SGD([{"params": table.parameters()}, {"params": head.parameters()}], 0.003)
        guard = StepGuard(GuardSettings(**FORMS[form]))
        guard.install(optimizer)
        for step in range(20):
            rows = torch.tensor([1, 1, step % 7, 5])
            optimizer.zero_grad()
            (3 * (step % 4 + 1) * 1.15**step * head(table(rows)) ** 2).sum().backward()
            optimizer.step()
        return [*table.parameters(), *head.parameters()], guard.engagement()

    (sparse, seen), (dense, wanted) = trained(True), trained(False)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    assert seen.clipped == wanted.clipped > 0
    assert seen.median_norm == pytest.approx(wanted.median_norm)


def test_a_sparse_gradient_without_rows_is_passed_over() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = SGD(table.parameters(), 1.0)
    guard = StepGuard(GuardSettings(clip="value", max_value=0.1))
    guard.install(optimizer)
    table(torch.zeros(0, dtype=torch.long)).sum().backward()
    optimizer.step()
    assert guard.engagement().last_norm is None


def test_complex_gradients_count_by_both_parts() -> None:
    param = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = SGD([param], 1.0)
    StepGuard(GuardSettings(max_norm=1.0)).install(optimizer)
    param.grad = torch.tensor([3.0 + 4.0j, 0.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.6 - 0.8j, 0.0]))


def test_each_device_gets_its_own_copy_of_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand for those of a second device: they have a place and no values."""
    here, there = torch.full((3,), 4.0), torch.empty(3, device="meta")
    double = torch.full((2,), 2.0, dtype=torch.float64)
    multiply, calls = torch._foreach_mul_, []

    def noting(those: list[Tensor], factor: Tensor) -> None:
        calls.append(({(t.device.type, t.dtype) for t in those}, factor.device.type))
        multiply(those, factor)

    monkeypatch.setattr(torch, "_foreach_mul_", noting)
    multiply_([here, there, double, here[:1]], torch.tensor(0.5))
    assert calls == [
        ({("cpu", torch.float32)}, "cpu"),
        ({("meta", torch.float32)}, "meta"),
        ({("cpu", torch.float64)}, "cpu"),
    ]
    assert (here.tolist(), double.tolist()) == ([1.0, 2.0, 2.0], [1.0, 1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("form", FORMS)
def test_parameters_on_two_devices_share_one_norm(form: str) -> None:
    params, optimizer = fresh(OPTIMIZERS["sgd"])
    wanted, _ = trained_by_hand(form, OPTIMIZERS["sgd"])
    moved = [nn.Parameter(params[0].detach().cuda()), *params[1:]]
    optimizer = OPTIMIZERS["sgd"]([{"params": moved[:2]}, {"params": moved[2:]}])
    StepGuard(GuardSettings(**FORMS[form])).install(optimizer)
    for loss in losses([moved[0].cpu(), *moved[1:]]):
        plainly(optimizer, loss, None)
    torch.testing.assert_close([p.cpu() for p in moved], wanted, rtol=0, atol=1e-6)


def test_the_global_norm_factor_is_bit_for_bit_that_of_torch() -> None:
    torch.manual_seed(1)
    params = [nn.Parameter(torch.zeros(50)) for _ in range(3)]
    optimizer = SGD(params, 1.0)
    for param in params:
        param.grad = torch.randn(50)
    twins = [param.grad.clone() for param in params]
    gradients = Gradients.of(optimizer)
    gradients.limit_("norm", gradients.sizes("norm"), 0.7)
    for param, twin in zip(params, twins, strict=True):
        param.grad, ours = twin, param.grad
        param.ours = ours
    nn.utils.clip_grad_norm_(params, 0.7)
    assert all(torch.equal(param.grad, param.ours) for param in params)


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clip": "nrom"}, "did you mean 'norm'?"),
        ({"clip": "value"}, "Give max_value."),
        ({"clip": "group"}, "Give max_norm."),
        ({"max_norm": 0.0}, "0.0 cannot be meant"),
        ({"clip": "percentile", "percentile": 101.0}, "from 0 to 100"),
        ({"clip": "z_score", "z_score": 0.0}, "above 0"),
        ({"clip": "percentile", "window": 1}, "2 or more"),
        ({"on_nonfinite": "skp"}, "did you mean 'skip'?"),
        ({"on_nonfinite": "skip", "budget": 0}, "1 or more"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match="RG914") as refused:
        GuardSettings(**settings)
    assert said in str(refused.value)


def test_all_that_cannot_be_meant_is_told_at_once() -> None:
    with pytest.raises(RefusedError) as refused:
        GuardSettings(max_norm=-1.0, window=0, budget=0)
    assert [reason.path for reason in refused.value.reasons] == ["max_norm", "window", "budget"]


def test_a_second_request_changes_the_form_and_keeps_the_rest() -> None:
    first = GuardSettings(max_norm=5.0, on_nonfinite="skip")
    second = first.merged(GuardSettings(clip="percentile", percentile=90.0))
    assert (second.clip, second.percentile, second.max_norm) == ("percentile", 90.0, 5.0)
    assert second.on_nonfinite == "skip"
    assert second.merged(GuardSettings(max_norm=1.0)).clip == "norm"
    assert second.merged(GuardSettings(warmup=3)).clip == "percentile"
