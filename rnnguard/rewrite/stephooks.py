"""Whether an optimizer's step can be guarded at all, and what hangs on it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from rnnguard.errors import Refusal


def refusals_for_clip(optimizer: Optimizer) -> list[Refusal]:
    """Why the gradients of this optimizer cannot be clipped at its step, if so."""
    family = {kind.__name__ for kind in type(optimizer).__mro__}
    if "LBFGS" in family:
        fact = "clipping inside the line search of LBFGS distorts its curvature estimate."
        return [Refusal("RG906", "", fact, "Use another optimizer or leave the clip out.")]
    if "ZeroRedundancyOptimizer" in family:
        fact = "a ZeRO optimizer sees only the gradients of its own shard."
        return [Refusal("RG901", "", fact, "Clip in the training loop, before `step`.")]
    if step_hooks(optimizer) is None:
        fact = f"{type(optimizer).__name__} wraps an optimizer and has no step hooks of its own."
        return [Refusal("RG901", "", fact, "Pass the optimizer that it wraps.")]
    return []


def step_hooks(optimizer: Optimizer) -> dict[int, Any] | None:
    """The hooks before the step of this very optimizer object; None where it has no such list."""
    # torch has no public list of step hooks, and a list or mark of our own would call a
    # deep-copied optimizer guarded: copies keep their group keys and lose their hooks.
    return getattr(optimizer, "_optimizer_step_pre_hooks", None)
