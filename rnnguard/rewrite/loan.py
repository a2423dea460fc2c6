"""What a step borrows from the optimizer, and the way back at its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rnnguard.rewrite.schedule import GuardSettings, beside_a_schedule, learning_rate_factor


@dataclass
class Loan:
    """Rates that are scaled, gradients that are hidden, a flag that is set while a step runs."""

    rates: list[tuple[dict[str, Any], Any, Tensor | None]] = field(default_factory=list)
    """Group, its own learning rate, and that rate's value where it is scaled in place."""
    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    flags: list[tuple[Any, Tensor, Tensor | None]] = field(default_factory=list)
    """Optimizer, the `found_inf` that it was lent, and its own where it had one."""

    def scale_rates_(self, optimizer: Optimizer, settings: GuardSettings, progress: str) -> None:
        """Multiplies each group's learning rate by its factor at step `group[progress]`."""
        # The user's own schedule leaves `initial_lr`.
        if any("initial_lr" in group for group in optimizer.param_groups):
            settings = beside_a_schedule(settings)
        scaled_tensors: set[int] = set()
        for group in optimizer.param_groups:
            rate = group.get("lr")
            factor = learning_rate_factor(settings, group.get(progress, 0))
            if factor == 1.0 or not isinstance(rate, (float, int, Tensor)):
                continue
            if not isinstance(rate, Tensor) or rate.requires_grad:
                self.rates.append((group, rate, None))
                group["lr"] = rate * factor
            elif id(rate) not in scaled_tensors:  # groups may share one tensor
                # In place, since a captured CUDA graph would not see a new tensor.
                scaled_tensors.add(id(rate))
                self.rates.append((group, rate, rate.clone()))
                rate.mul_(factor)

    def hide_gradients_(self, params: Iterable[Tensor]) -> None:
        """Makes the step leave `params` and their state alone.

        The one true skip: with zeroed gradients momentum and weight decay still move
        the weights, and a learning rate of 0 makes nan of a nan.
        """
        for param in params:
            if param.grad is not None:
                self.gradients.append((param, param.grad))
                param.grad = None

    def leave_out_(self, optimizer: Optimizer, broken: Tensor) -> Tensor | None:
        """Makes the step do nothing where `broken` holds.

        A fused kernel is told so without waiting for the device; gives the flag that it sees,
        which is also 1 where a GradScaler's own is. Otherwise waits, and hides the gradients.
        """
        fused = getattr(optimizer, "_step_supports_amp_scaling", False) and all(
            group.get("fused") for group in optimizer.param_groups
        )
        if fused and not _momentum_is_missing(optimizer):
            return self.flag_(optimizer, broken)
        own: Tensor | None = getattr(optimizer, "found_inf", None)
        if own is not None and not fused:
            return own  # the optimizer's own kernel skips
        if bool(broken) or (own is not None and bool(own)):
            every = (param for group in optimizer.param_groups for param in group["params"])
            self.hide_gradients_(every)
        return None

    def flag_(self, optimizer: Any, broken: Tensor) -> Tensor:
        """Sets the optimizer's `found_inf` where `broken` holds or it was set; gives the flag."""
        own = getattr(optimizer, "found_inf", None)
        flag = broken.float()
        if own is not None:
            flag = flag.maximum(own.reshape(()).to(flag.device))
        self.flags.append((optimizer, flag, own))
        optimizer.found_inf = flag
        return flag

    def return_gradients_(self) -> None:
        """What `hide_gradients_` and `flag_` took; the closure of a step may run again."""
        while self.gradients:
            param, grad = self.gradients[-1]
            if param.grad is None:
                param.grad = grad
            self.gradients.pop()
        while self.flags:
            optimizer, flag, own = self.flags[-1]
            # A GradScaler may have set its own since a step that raised.
            if getattr(optimizer, "found_inf", None) is flag:
                optimizer.found_inf = own
                if own is None:
                    del optimizer.found_inf
            self.flags.pop()

    def return_all_(self) -> None:
        self.return_gradients_()
        while self.rates:
            group, rate, value = self.rates[-1]
            if value is not None:
                rate.copy_(value)
            group["lr"] = rate
            self.rates.pop()


def every_rate_is_zero(optimizer: Optimizer) -> bool:
    """Whether all learning rates are 0, as far as that can be read without waiting."""
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    return bool(rates) and all(_is_zero(rate) for rate in rates)


def _is_zero(rate: float | Tensor) -> bool:
    if isinstance(rate, Tensor):
        # Reading a tensor that lies on an accelerator would make the host wait for it.
        return rate.device.type == "cpu" and not rate.detach().float().numpy().any()
    return rate == 0


def _momentum_is_missing(optimizer: Optimizer) -> bool:
    # The kernel that skips the very first step leaves a buffer that nobody has filled.
    return any(
        group.get("momentum") and optimizer.state.get(param, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for param in group["params"]
        if param.grad is not None
    )
