"""One guard per optimizer: clips and schedules inside the step and leaves nothing behind it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rnnguard.errors import refuse
from rnnguard.rewrite.alarm import Alarm
from rnnguard.rewrite.checkpoints import order_refusals
from rnnguard.rewrite.clipping import Gradients, Trace, trace, untouched_since, whole_and_largest
from rnnguard.rewrite.engagement import (
    ALARMS,
    BLOCK,
    COLUMNS,
    Constants,
    Engagement,
    bound_of,
    fitted,
    folded,
    new_tally,
    statistics,
    written,
)
from rnnguard.rewrite.loan import Loan, every_rate_is_zero
from rnnguard.rewrite.schedule import GuardSettings, learning_rate_factor
from rnnguard.rewrite.stephooks import refusals_for_clip, step_hooks

__all__ = [
    "Engagement",
    "GuardSettings",
    "StepGuard",
    "engagement_of",
    "guard_of",
    "learning_rate_factor",
    "refusals_for_clip",
]

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class StepGuard:
    """Clips gradients and scales the learning rate, both only inside a step.

    At rest every learning rate and every gradient is the user's own. Progress and the recent
    norms are the group keys `KEYS`, so that they travel with every kind of checkpoint. No step
    waits for the device, except one that may have to be left out (`on_nonfinite="skip"`) by an
    optimizer that is not fused. A step that a GradScaler skips does not count, except for the
    warm-up of a fused optimizer, whose hooks run although its kernel skips. When a whole step
    is replayed as a CUDA graph no hook runs.
    """

    GROUP_KEY = "rnnguard_step"
    SEEN_KEY = "rnnguard_seen"
    TALLY_KEY = "rnnguard_tally"
    KEYS = frozenset({GROUP_KEY, SEEN_KEY, TALLY_KEY})

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self._optimizer: Optimizer | None = None
        self._handles: list[RemovableHandle] = []
        self._had_keys: list[set[str]] = []
        self._in_step = False
        self._counts = True
        self._row: list[Tensor] = []
        self._left: Trace | None = None
        self._rows: list[Tensor] = []
        self._loan = Loan()
        self._known: tuple[Tensor, ...] = ()
        self._known_for: object = None
        self._constants = Constants()
        self._alarm = Alarm()

    def engagement(self) -> Engagement:
        """What the guard has seen and done so far; reading it waits for the device."""
        if self._optimizer is not None:
            self._write_down(self._optimizer)
        group = self._optimizer.param_groups[0] if self._optimizer is not None else {}
        counts = group.get(self.SEEN_KEY, 0), group.get(self.GROUP_KEY, 0)
        tally = group.get(self.TALLY_KEY, new_tally(2, torch.device("cpu")))
        return Engagement.read(tally, *counts, self.settings)

    def install(self, optimizer: Optimizer) -> None:
        """Adds the hooks and the group keys to `optimizer`, which must not have a guard."""
        self._had_keys = [set(group) & self.KEYS for group in optimizer.param_groups]
        self._optimizer = optimizer
        self._add_keys(optimizer)
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._handles.append(optimizer.register_load_state_dict_pre_hook(self._before_load))
        self._handles.append(optimizer.register_load_state_dict_post_hook(self._after_load))
        # A step that raised leaves the scaled learning rate in the groups until the
        # next step; a checkpoint saved in that gap would keep it for good.
        self._handles.append(optimizer.register_state_dict_pre_hook(self._before_save))

    def remove(self, optimizer: Optimizer) -> None:
        """Takes hooks and group keys away and gives back what a failed step left."""
        self._end_step()
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()
        if self._optimizer is None:
            return  # never installed
        earlier = chain(self._had_keys, repeat(set[str]()))
        for group, had in zip(optimizer.param_groups, earlier, strict=False):
            for key in self.KEYS - had:
                group.pop(key, None)

    def _add_keys(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group.setdefault(self.GROUP_KEY, 0)
        if not set(optimizer.param_groups[0]) >= self.KEYS:
            params = (param for group in optimizer.param_groups for param in group["params"])
            # Distributed checkpoints demand that all tensors lie on one device.
            device = next((param.device for param in params), torch.device("cpu"))
            tally = new_tally(self.settings.window, device)
            optimizer.param_groups[0].update({self.TALLY_KEY: tally, self.SEEN_KEY: 0})

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
        row, hidden = self._row, bool(self._loan.gradients)
        self._end_step()
        # torch.distributed.checkpoint makes state appear by a step with every rate at 0.
        if not self._counts:
            return
        if not hidden:
            for group in optimizer.param_groups:
                group[self.GROUP_KEY] = group.get(self.GROUP_KEY, 0) + 1
        if row and self._rows and row[0].device != self._rows[0].device:
            self._write_down(optimizer)
        self._rows += row
        if (
            row
            and (optimizer.param_groups[0][self.SEEN_KEY] + len(self._rows) // COLUMNS) % BLOCK == 0
        ):
            self._close_block(optimizer)

    def _close_block(self, optimizer: Optimizer) -> None:
        self._write_down(optimizer)
        first = optimizer.param_groups[0]
        first[self.TALLY_KEY] = tally = folded(first[self.TALLY_KEY], BLOCK, self.settings)
        # Last, when all is at rest again: where warnings are errors this raises.
        if self.settings.on_nonfinite is not None:
            self._alarm.look(tally[ALARMS], self.settings.budget, first[self.GROUP_KEY])

    def _write_down(self, optimizer: Optimizer) -> None:
        """Moves the rows of the last steps into the group, where checkpoints find them."""
        if not self._rows:
            return
        first, rows = optimizer.param_groups[0], self._rows
        tally = self._tally(optimizer, rows[0].device)
        first[self.TALLY_KEY] = written(tally, first[self.SEEN_KEY] % BLOCK, rows)
        first[self.SEEN_KEY] += len(rows) // COLUMNS
        self._rows = []

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        refuse(order_refusals(optimizer, state_dict))

    def _after_load(self, optimizer: Optimizer) -> None:
        # An older checkpoint takes unknown group keys away. What a failed step has scaled
        # goes back to groups that are gone: the loaded ones are new and keep their rates.
        self._end_step()
        self._add_keys(optimizer)
        self._rows, self._known_for = [], None

    def _before_save(self, optimizer: Optimizer) -> None:
        self._end_step()
        self._write_down(optimizer)

    def _end_step(self) -> None:
        self._loan.return_all_()
        self._in_step = False
        self._row = []

    def _tally(self, optimizer: Optimizer, device: torch.device) -> Tensor:
        return fitted(optimizer.param_groups[0][self.TALLY_KEY], self.settings.window, device)

    @torch.no_grad()
    def _clip(self, optimizer: Optimizer) -> None:
        settings = self.settings
        if settings.clip is None and settings.on_nonfinite is None:
            return
        # A nested step sees what the outer one has clipped: its size was the true one.
        if self._row and self._left and untouched_since(self._left, optimizer):
            self._row[4:] = [self._left_out(optimizer, self._row[0])]
            return
        self._row = []
        gradients = Gradients.of(optimizer)
        if not gradients.groups:
            return
        sizes = gradients.sizes(settings.clip)
        size, peak = whole_and_largest(sizes)
        bound = self._bound(optimizer, size)
        written = self._constants.full(bound, size)
        passed = self._constants.flag(getattr(optimizer, "found_inf", None), size)
        row = [size, peak, written, passed, self._left_out(optimizer, size)]
        if settings.clip is not None and not self._loan.gradients:
            gradients.limit_(settings.clip, sizes, bound)
        self._row, self._left = row, trace(optimizer)

    def _bound(self, optimizer: Optimizer, size: Tensor) -> float | Tensor:
        settings = self.settings
        if settings.clip in ("percentile", "z_score"):
            # The window changes with every block, and what is asked of it with every request.
            key = (settings, optimizer.param_groups[0][self.SEEN_KEY] // BLOCK, size.device)
            if self._known_for != key:
                known = statistics(self._tally(optimizer, size.device), settings)
                self._known, self._known_for = known, key
                if settings.clip == "percentile":  # used as it is at every step
                    self._known = (known[0].to(size.dtype),)
            return bound_of(self._known, size, settings)
        fixed = settings.max_value if settings.clip == "value" else settings.max_norm
        return torch.inf if fixed is None else fixed

    def _left_out(self, optimizer: Optimizer, size: Tensor) -> Tensor:
        """Skips a broken step where that is asked for; not 0 where a kernel does it by itself."""
        if self.settings.on_nonfinite != "skip":
            return self._constants.flag(getattr(optimizer, "found_inf", None), size)
        return self._constants.flag(self._loan.leave_out_(optimizer, ~(size < torch.inf)), size)


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
    for hook in (step_hooks(optimizer) or {}).values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, StepGuard):
            return owner
    return None


def engagement_of(optimizer: Optimizer | None) -> Engagement | None:
    """How the guard of this optimizer has engaged so far, if there is one."""
    guard = None if optimizer is None else guard_of(optimizer)
    return None if guard is None else guard.engagement()
