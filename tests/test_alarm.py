"""The warning after too many non-finite steps in a row: once, soon, and without waiting."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import rnnguard
from rnnguard.rewrite import alarm
from rnnguard.rewrite.alarm import Alarm
from rnnguard.rewrite.engagement import BLOCK
from rnnguard.rewrite.stepguard import GuardSettings, StepGuard


def warned(norms: str, **fields: Any) -> list[tuple[int, str]]:
    """The steps that warned, with their words; x is a step that is not finite.

    The guard looks at the end of every block of steps.
    """
    param = nn.Parameter(torch.zeros(2))
    optimizer = SGD([param], 1e-3, fused=fields.pop("fused", False))
    StepGuard(GuardSettings(**fields)).install(optimizer)
    found = []
    for step, norm in enumerate(norms, 1):
        param.grad = torch.full((2,), math.nan if norm == "x" else 1.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", rnnguard.RNNGuardWarning)
            optimizer.step()
        found += [(step, str(warning.message)) for warning in caught]
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["skip", "propagate"])
def test_it_warns_once_per_row_of_broken_steps(policy: Any, fused: bool) -> None:
    blocks = "xx.xxxxxxxxxxxxx", "xxxxxxxxxxxxxx..", "............xx..", "xx....xxx....xx."
    found = warned("".join(blocks), on_nonfinite=policy, budget=3, fused=fused)
    assert [step for step, _ in found] == [BLOCK, 4 * BLOCK]
    assert "not finite 3 times in a row" in found[0][1]
    assert "lower the learning rate" in found[0][1] and found[0][1].endswith("(RG413)")


def test_the_budget_is_ten_and_nobody_asked_means_no_alarm() -> None:
    assert [step for step, _ in warned("x" * 3 * BLOCK, on_nonfinite="propagate")] == [BLOCK]
    assert warned("x" * 9 + "." * (BLOCK - 9), on_nonfinite="propagate") == []
    assert warned("x" * 3 * BLOCK, max_norm=1.0) == []


def test_where_warnings_are_errors_the_step_is_over_first() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = SGD([param], 1.0)
    guard = StepGuard(GuardSettings(on_nonfinite="skip", budget=1, warmup=4))
    guard.install(optimizer)
    gradient = param.grad = torch.full((2,), math.nan)
    for _ in range(BLOCK - 1):
        optimizer.step()
    with pytest.raises(rnnguard.RNNGuardWarning):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert param.grad is gradient
    assert guard.engagement().skipped == BLOCK


class Event:
    """Stands for a CUDA event: done when told so."""

    done = False

    def query(self) -> bool:
        return self.done


def test_it_looks_at_a_copy_only_when_that_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr(alarm, "_recorded", lambda device: events.append(Event()) or events[-1])
    bell = Alarm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 6):
            bell.look(torch.tensor(1.0), 3, step)
    assert len(events) == 1, "a copy was overwritten before it arrived"
    events[0].done = True
    with pytest.warns(rnnguard.RNNGuardWarning, match=r"by step 6 .* 3 times"):
        bell.look(torch.tensor(1.0), 3, 6)
    assert len(events) == 2


def test_reading_the_copy_asks_torch_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def item(self: Tensor) -> Any:
        raise AssertionError("the host waited")

    bell = Alarm()
    bell.look(torch.tensor(0.0), 1, 1)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(Tensor, name, item)
    with pytest.warns(rnnguard.RNNGuardWarning):
        bell.look(torch.tensor(2.0), 1, 2)


def test_devices_without_events_are_silent() -> None:
    Alarm().look(torch.tensor(99.0, device="meta"), 1, 1)
