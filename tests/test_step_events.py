"""Calls of a training step as events: each once, in order, at the user's line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from rnnguard.probe.step_events import Event, StepWatch


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.gru(x)[0])


X = torch.randn(20, 6, 5, generator=torch.Generator().manual_seed(0))


def watch_of(kind: Callable[..., Optimizer] = Adam, **options: Any) -> tuple[Any, Any, StepWatch]:
    model = Tagger()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    return model, optimizer, StepWatch(model, optimizer)


def kinds(watch: StepWatch) -> list[str]:
    return [event.kind for event in watch.events]


class Warm(SGD):
    """An optimizer of the user's, with a step around the step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Warm])
def test_each_call_is_one_event(kind: Callable[..., Optimizer]) -> None:
    model, optimizer, watch = watch_of(kind)
    with watch:
        optimizer.zero_grad()
        model(X).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        model.zero_grad()
    assert kinds(watch) == ["clear", "backward", "clip", "step", "clear"]
    backward, clip, step = watch.events[1:4]
    assert backward.before == 0 < clip.after < backward.after == clip.before
    assert clip.size == pytest.approx(clip.before, rel=1e-5) and clip.threshold == 0.01
    assert step.taken and step.before == pytest.approx(0.01, rel=1e-3)
    lines = [int(str(event.place).rsplit(":", 1)[1]) for event in watch.events]
    assert lines == list(range(lines[0], lines[0] + 5))
    assert all(str(event.place).startswith("tests/test_step_events.py:") for event in watch.events)


def test_learning_rate_schedules_wrap_the_step() -> None:
    model, optimizer, watch = watch_of()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with watch:
        model(X).mean().backward()
        optimizer.step()
    assert kinds(watch) == ["backward", "step"]


def test_another_optimizer_is_not_meant() -> None:
    _, _, watch = watch_of()
    model, optimizer, _ = watch_of()
    with watch:
        optimizer.zero_grad()
        model(X).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    assert kinds(watch) == ["clear", "backward", "clip"]
    assert not any(event.touched for event in watch.events)


def test_a_backward_inside_a_backward_is_none_of_the_steps() -> None:
    model, _, watch = watch_of()
    start = torch.zeros(1, 6, 16, requires_grad=True)
    with watch:
        out = checkpoint(model.gru, X, start, use_reentrant=True)[0]
        model.head(out).mean().backward()
    assert kinds(watch) == ["backward"]


def test_a_clip_inside_a_backward_is_a_hook() -> None:
    def clip(parameter: Tensor) -> None:
        nn.utils.clip_grad_norm_(parameter, 0.1)

    model, _, watch = watch_of()
    bias = model.head.bias
    with watch:
        loss = model(X).mean()
        bias.register_post_accumulate_grad_hook(clip)
        loss.backward()
    assert kinds(watch) == ["backward"] and watch.hooked


def _events_under_scaler(unscale: bool, **options: Any) -> tuple[list[Event], StepWatch]:
    model, optimizer, watch = watch_of(**options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with watch:
        scaler.scale(model(X).mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return watch.events, watch


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_the_unit_of_the_gradients(unscale: bool, options: dict[str, Any]) -> None:
    events, watch = _events_under_scaler(unscale, **options)
    assert [event.kind for event in events] == ["backward", "clip", "step"] and watch.scaled
    backward, clip, step = events
    assert (backward.unit, clip.unit) == (256.0, 1.0 if unscale else 256.0)
    assert step.taken and step.unit == (256.0 if options and not unscale else 1.0)


def test_a_step_that_the_scaler_skips() -> None:
    model, optimizer, watch = watch_of()
    scaler = torch.amp.GradScaler("cpu")
    with watch:
        scaler.scale(model(X).mean() * float("inf")).backward()
        scaler.step(optimizer)
    assert kinds(watch) == ["backward", "step"] and not watch.events[1].taken


def test_a_scaler_that_is_disabled() -> None:
    model, _, watch = watch_of()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with watch:
        scaler.scale(model(X).mean()).backward()
    assert watch.events[0].unit == 1.0 and not watch.scaled


@pytest.mark.parametrize(("frozen", "grad", "half"), [(False, True, True), (True, True, False),
                                                      (False, False, False)])  # fmt: skip
def test_half_precision_where_gradients_flow(frozen: bool, grad: bool, half: bool) -> None:
    model = Tagger()
    model.requires_grad_(not frozen)
    watch = StepWatch(model, SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with watch, torch.autocast("cpu", dtype=torch.float16), torch.set_grad_enabled(grad):
        model(X)
    assert watch.half is half


def test_gradients_are_disturbed_once_per_step() -> None:
    model, optimizer, watch = watch_of()
    seen: list[int] = []
    watch.disturb = lambda parameters: seen.append(len(parameters))
    with watch:
        for _ in range(2):
            model(X).mean().backward()
            model(X).mean().backward()
            optimizer.step()
    assert seen == [6, 6]
    assert [event.disturbed for event in watch.events] == [True, False, False] * 2


def test_the_profile_function_goes_when_the_step_raises() -> None:
    model, _, watch = watch_of()
    with pytest.raises(ZeroDivisionError), watch:
        model(X / 0 if X.numel() == 0 else X).mean().backward()
        _ = 1 / 0
    assert sys.getprofile() is None and kinds(watch) == ["backward"]
