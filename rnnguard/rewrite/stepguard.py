"""One guard per optimizer: clips and schedules inside the step and leaves nothing behind it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rnnguard.errors import Refusal
from rnnguard.rewrite.loan import Loan, every_rate_is_zero
from rnnguard.rewrite.schedule import GuardSettings, learning_rate_factor

__all__ = [
    "GuardSettings",
    "StepGuard",
    "guard_of",
    "learning_rate_factor",
    "refusals_for_clip",
]

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class StepGuard:
    """Clips by the global norm and scales the learning rate, both only inside a step.

    At rest every learning rate and every gradient is the user's own. Progress is
    the group key `GROUP_KEY`, so that it travels with every kind of checkpoint.
    A step that a GradScaler skips does not count, except with a fused optimizer,
    whose hooks run although its kernel skips. When a whole step is replayed as a
    CUDA graph no hook runs.
    """

    GROUP_KEY = "rnnguard_step"

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.steps = 0
        """Steps taken under this guard, without skipped ones."""
        self.skipped = 0
        """Steps left out because the norm was not finite."""
        self.last_norm: Tensor | None = None
        """Norm at the last step, before the clip and without a scaler's factor."""
        self._clipped: Tensor | None = None
        self._nonfinite: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._had_key: list[bool] = []
        self._in_step = False
        self._counts = True
        self._norm: Tensor | None = None
        self._loan = Loan()

    @property
    def clipped(self) -> int:
        """Steps whose norm was above `max_norm`; reading it waits for the device."""
        return 0 if self._clipped is None else int(self._clipped)

    @property
    def nonfinite(self) -> int:
        """Steps whose norm was not finite; counted when `on_nonfinite` is set."""
        return 0 if self._nonfinite is None else int(self._nonfinite)

    def install(self, optimizer: Optimizer) -> None:
        """Adds the hooks and the group key to `optimizer`, which must not have a guard."""
        self._had_key = [self.GROUP_KEY in group for group in optimizer.param_groups]
        self._add_key(optimizer)
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._handles.append(optimizer.register_load_state_dict_post_hook(self._after_load))
        # A step that raised leaves the scaled learning rate in the groups until the
        # next step; a checkpoint saved in that gap would keep it for good.
        self._handles.append(optimizer.register_state_dict_pre_hook(self._before_save))

    def remove(self, optimizer: Optimizer) -> None:
        """Takes hooks and group key away and gives back what a failed step left."""
        self._end_step()
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()
        if not self._had_key:
            return  # never installed
        for group, had_key in zip_longest(optimizer.param_groups, self._had_key):
            if group and not had_key:
                group.pop(self.GROUP_KEY, None)

    def _add_key(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group.setdefault(self.GROUP_KEY, 0)

    def _before_step(
        self, optimizer: Optimizer, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        # A nested super().step() and the remains of a step that raised look the same
        # here. Starting anew from the restored state is right for both; a depth
        # counter would stick, because post hooks do not run when a step raises.
        self._loan.return_all_()
        self._in_step = True
        self._counts = not every_rate_is_zero(optimizer)
        try:
            self._loan.scale_rates_(optimizer, self.settings, self.GROUP_KEY)
            return self._with_clip(optimizer, args, kwargs)
        except BaseException:
            self._end_step()
            raise

    def _with_clip(
        self, optimizer: Optimizer, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        """Clips now, or gives the arguments with a closure that clips after its backward pass."""
        by_name = "closure" in kwargs
        closure = kwargs["closure"] if by_name else args[1] if len(args) > 1 else None
        if not callable(closure):
            self._clip(optimizer)
            return None
        if isinstance(closure, _ClippingClosure):
            return None
        clipping = _ClippingClosure(self, optimizer, closure)
        if by_name:
            return args, {**kwargs, "closure": clipping}
        return (args[0], clipping, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        if not self._in_step:
            return  # settled by the post hook of a nested step
        skips, norm = bool(self._loan.gradients), self._norm
        self._end_step()
        # torch.distributed.checkpoint makes state appear by a step with every rate at 0.
        if not self._counts:
            return
        if norm is not None:
            self._tally(norm, skips)
        if skips:
            self.skipped += 1
            return
        self.steps += 1
        for group in optimizer.param_groups:
            group[self.GROUP_KEY] = group.get(self.GROUP_KEY, 0) + 1

    def _after_load(self, optimizer: Optimizer) -> None:
        # An older checkpoint takes unknown group keys away. What a failed step has scaled
        # goes back to groups that are gone: the loaded ones are new and keep their rates.
        self._end_step()
        self._add_key(optimizer)

    def _before_save(self, optimizer: Optimizer) -> None:
        self._end_step()

    def _end_step(self) -> None:
        self._loan.return_all_()
        self._in_step = False
        self._norm = None

    def _clip(self, optimizer: Optimizer) -> None:
        settings = self.settings
        if settings.max_norm is None and settings.on_nonfinite is None:
            return
        every = (param for group in optimizer.param_groups for param in group["params"])
        params: list[Tensor] = [param for param in every if param.grad is not None]
        if not params:
            return
        norm = get_total_norm([param.grad for param in params if param.grad is not None])
        # Divide the norm, not the gradients: clipping is homogeneous, and a fused
        # optimizer under GradScaler still holds scaled gradients here (trap 55).
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            norm = norm / scale.to(norm.device)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # A nested step sees clipped gradients, so the larger norm is the true one.
        self._norm = whole if self._norm is None else torch.maximum(self._norm, whole)
        # `found_inf` says that a fused kernel skips by itself: no need to wait for the norm.
        kernel_skips = getattr(optimizer, "found_inf", None) is not None
        if settings.on_nonfinite == "skip" and not kernel_skips and not whole.isfinite():
            self._loan.hide_gradients_(params)
        elif settings.max_norm is not None:
            clip_grads_with_norm_(params, settings.max_norm, norm)

    def _tally(self, norm: Tensor, skips: bool) -> None:
        self.last_norm = norm
        if self.settings.on_nonfinite is not None:
            self._nonfinite = _plus(self._nonfinite, ~norm.isfinite())
        if self.settings.max_norm is not None and not skips:
            self._clipped = _plus(self._clipped, norm > self.settings.max_norm)


class _ClippingClosure:
    """The user's closure, followed by the clip; a nested step knows it by its type."""

    def __init__(self, guard: StepGuard, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        self._guard = guard
        self._optimizer = optimizer
        self._closure = closure

    def __call__(self) -> Any:
        self._guard._loan.return_gradients_()
        try:
            loss = self._closure()
            self._guard._clip(self._optimizer)
        except BaseException:
            # Healing here leaves no gap in which a scheduler could see the scaled rate.
            self._guard._end_step()
            raise
        return loss


def guard_of(optimizer: Optimizer) -> StepGuard | None:
    """The guard whose hooks this very optimizer object has, if any."""
    for hook in (_step_hooks(optimizer) or {}).values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, StepGuard):
            return owner
    return None


def refusals_for_clip(optimizer: Optimizer) -> list[Refusal]:
    """Why the gradients of this optimizer cannot be clipped at its step, if so.

    Sparse gradients show only after a backward pass and are not looked for here.
    """
    family = {kind.__name__ for kind in type(optimizer).__mro__}
    if "LBFGS" in family:
        fact = "clipping inside the line search of LBFGS distorts its curvature estimate."
        return [Refusal("RG906", "", fact, "Use another optimizer or leave the clip out.")]
    if "ZeroRedundancyOptimizer" in family:
        fact = "a ZeRO optimizer sees only the gradients of its own shard."
        return [Refusal("RG901", "", fact, "Clip in the training loop, before `step`.")]
    if _step_hooks(optimizer) is None:
        fact = f"{type(optimizer).__name__} wraps an optimizer and has no step hooks of its own."
        return [Refusal("RG901", "", fact, "Pass the optimizer that it wraps.")]
    return []


def _step_hooks(optimizer: Optimizer) -> dict[int, Any] | None:
    # torch has no public list of step hooks, and a list or mark of our own would call a
    # deep-copied optimizer guarded: copies keep their group keys and lose their hooks.
    return getattr(optimizer, "_optimizer_step_pre_hooks", None)


def _plus(total: Tensor | None, flag: Tensor) -> Tensor:
    return flag.long() if total is None else total.to(flag.device).add_(flag)
