"""What a recurrence costs by itself: the time of its forward and backward on its own input."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import carries_cell_state
from rnnguard.inspection.sites import FoundSite
from rnnguard.probe.snapshot import untouched

PASSES = 3


def seconds_of(model: nn.Module, found: FoundSite) -> float | None:
    """Seconds of one forward and backward of the site's module, the median of a few passes.

    Dense, on what the site was given; no hook runs and nothing of the model changes. None for a
    single step's cell, and where the module cannot run by itself.
    """
    module, given = found.module, found.input
    if found.record.form != "fused":
        return None
    x = given.x.transpose(0, 1) if found.record.batch_first else given.x
    states = given.hidden, given.cell_state
    hx = states if carries_cell_state(module) else given.hidden
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return None
    taken = []
    try:
        # In evaluation cuDNN has no backward; in training its speed is what counts.
        with untouched(model), torch.backends.cudnn.flags(enabled=module.training):
            for _ in range(PASSES + 1):
                taken.append(_pass(module, x, hx, parameters))
    except (RuntimeError, ValueError):
        return None
    return statistics.median(taken[1:])


def _pass(module: nn.Module, x: Tensor, hx: object, parameters: list[nn.Parameter]) -> float:
    _wait(x.device)
    started = time.perf_counter()
    output, _ = module.forward(x, hx)
    torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    _wait(x.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
