"""What a training step does with gradients, seen from outside, call by call; nothing is patched."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.inspection.own_code import is_own
from rnnguard.inspection.written import relative
from rnnguard.probe.training import gradient_norm

Kind = Literal["backward", "grad", "clip", "clear", "step"]


@dataclass
class Event:
    """One such call: in which call of the training step, where, and the gradients around it.

    `before` and `after` are their norms, for a step `before` is what it works on. `unit`: what
    they were multiplied by. `touched`: it concerned this optimizer's parameters. Of a clip,
    `threshold` and the `size` that it was compared with; of a step, whether it was `taken`, and
    whether the gradients came from a `closure` that it called.
    """

    kind: Kind
    call: int
    place: str | None
    before: float
    unit: float = 1.0
    after: float = math.nan
    touched: bool = True
    threshold: float | None = None
    size: float = math.nan
    retained: bool = False
    taken: bool = False
    closure: bool = False
    disturbed: bool = False


class StepWatch:
    """Inside, every call is seen by a profile function, and those that matter become events.

    optimizer: the one whose steps count. A profiler that runs already pauses. `disturb` changes
    the gradients after a backward, once per step, where it is set.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.events: list[Event] = []
        self.call = 0
        self.scaled = False
        self.half = any(p.dtype is torch.float16 for p in self.parameters)
        """Whether gradients flow through half precision (float16)."""
        self.hooked = _has_hooks(model, self.parameters)
        """Whether hooks change gradients on their way, perhaps."""
        self.disturb: Callable[[list[Tensor]], None] | None = None
        self._model, self._optimizer = model, optimizer
        self._trained = {id(module) for module in model.modules() if _is_trained(module)}
        self._device = self.parameters[0].device.type if self.parameters else "cpu"
        self._codes = _CODES | _codes_of(optimizer)
        self._open: dict[FrameType, tuple[str, Event | None]] = {}
        self._trace: list[tuple[int, int]] = []
        self._unit = 1.0
        self._disturbed = False
        self._previous: Any = None

    def __enter__(self) -> StepWatch:
        self._previous = sys.getprofile()
        # cProfile's, up to Python 3.11, cannot be put back by setprofile.
        if hasattr(self._previous, "disable"):
            self._previous.disable()
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self._previous, "enable"):
            sys.setprofile(None)
            self._previous.enable()
        else:
            sys.setprofile(self._previous)
        self._open.clear()

    def _look(self, frame: FrameType, what: str, result: Any) -> None:
        if what == "call":
            name = self._codes.get(frame.f_code)
            if name is not None:
                self._begins(name, frame)
        elif what == "return" and frame in self._open:
            name, event = self._open.pop(frame)
            self._ends(name, event, frame, result)

    def _begins(self, name: str, frame: FrameType) -> None:
        given = frame.f_locals
        first = given.get(frame.f_code.co_varnames[0])
        if name == "module":
            self.half |= id(first) in self._trained and self._casts_to_half()
        elif name == "hook":
            self.hooked |= frame.f_back is not None and is_own(frame.f_back.f_code.co_filename)
        elif name in ("scale", "unscale"):
            self._open[frame] = name, None
        elif name in ("step", "scaler step"):
            self._step_begins(first if name == "step" else given.get("optimizer"), name, frame)
        elif self._is_inside("backward"):
            # In a hook, or a backward of a part: nothing that the training step itself does.
            self.hooked |= name == "clip"
        elif not (name == "clip" and self._is_inside("clip")):
            self._open[frame] = name, self._event(name, frame, given)

    def _event(self, name: Any, frame: FrameType, given: dict[str, Any]) -> Event:
        event = Event(name, self.call, place_of(frame.f_back), self._norm(), self._unit)
        if name == "backward":
            self._trace = self._versions()
            event.retained = bool(given.get("retain_graph")) and not given.get("create_graph")
        elif name == "clip":
            event.threshold = float(given.get("max_norm", given.get("clip_value", math.inf)))
            event.size = self._largest() if "clip_value" in given else math.nan
        return event

    def _step_begins(self, optimizer: Any, name: str, frame: FrameType) -> None:
        if optimizer is not self._optimizer or self._is_inside("backward"):
            return
        outer = next((e for n, e in self._open.values() if n == "scaler step"), None)
        if outer is None:
            event = Event("step", self.call, place_of(frame.f_back), self._norm(), self._unit)
            event.taken = name == "step"
            self._open[frame] = name, event
        elif name == "step":
            outer.taken, outer.before, outer.unit = True, self._norm(), self._unit

    def _ends(self, name: str, event: Event | None, frame: FrameType, result: Any) -> None:
        given = frame.f_locals
        if name == "scale" and given["self"].is_enabled():
            self._unit, self.scaled = float(given["self"].get_scale()), True
        elif name == "unscale" and given.get("optimizer") is self._optimizer:
            self._unit = 1.0
        if event is None:
            return
        if event.kind == "backward":
            event.touched = self._versions() != self._trace
            self._disturb(event)
            if (step := self._current("step")) is not None:
                step.closure = True
        elif event.kind == "clip":
            event.touched = self._concerns(given)
            found = given.get("total_norm", result)
            event.size = float(found) if isinstance(found, Tensor) else event.size
        event.after = self._norm()
        if event.kind == "clear":
            mine = given.get("self") in (self._optimizer, self._model)
            event.touched = mine or event.after < event.before
        elif event.kind == "step":
            event.before = event.after if event.closure else event.before
            self._unit, self._disturbed = 1.0, False
        self.events.append(event)

    def _disturb(self, event: Event) -> None:
        if self.disturb is not None and event.touched and not self._disturbed:
            self._disturbed = event.disturbed = True
            self.disturb(self.parameters)

    def _concerns(self, given: dict[str, Any]) -> bool:
        """Whether a clip was given any of the parameters; unknown counts as yes."""
        mine = {id(p) for p in self.parameters}
        known = given.get("parameters")
        if isinstance(known, list | tuple):
            return any(id(p) in mine for p in known)
        gradients = {id(p.grad) for p in self.parameters if p.grad is not None}
        grads = given.get("grads") or ()
        return not grads or any(id(g) in gradients for g in grads)

    def _is_inside(self, name: str) -> bool:
        return any(opened == name for opened, _ in self._open.values())

    def _current(self, kind: Kind) -> Event | None:
        return next((e for _, e in self._open.values() if e is not None and e.kind == kind), None)

    def _casts_to_half(self) -> bool:
        half = torch.get_autocast_dtype(self._device) is torch.float16
        return half and torch.is_autocast_enabled(self._device) and torch.is_grad_enabled()

    def _norm(self) -> float:
        return gradient_norm(self.parameters)

    def _largest(self) -> float:
        found = [p.grad.detach().abs().max() for p in self.parameters if p.grad is not None]
        return max(map(float, found), default=0.0)

    def _versions(self) -> list[tuple[int, int]]:
        return [(id(p.grad), -1 if p.grad is None else p.grad._version) for p in self.parameters]


def place_of(frame: FrameType | None) -> str | None:
    """The file:line from which the user's code made the call."""
    while frame is not None:
        file = frame.f_code.co_filename
        if is_own(file):
            return relative(f"{file}:{frame.f_lineno}")
        if Path(file).name == "training_step.py":
            return None  # from here outwards it is the caller of rnnguard
        frame = frame.f_back
    return None


def _code(function: Any) -> CodeType:
    found: CodeType = inspect.unwrap(function).__code__
    return found


def _codes_of(optimizer: Optimizer) -> dict[CodeType, str]:
    kind = type(optimizer)
    return {_code(kind.step): "step", _code(kind.zero_grad): "clear"}


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _has_hooks(model: nn.Module, parameters: list[Tensor]) -> bool:
    on_parameters = any(
        p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters
    )
    return on_parameters or any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())


_CODES: dict[CodeType, str] = {
    _code(torch.nn.utils.clip_grad_norm_): "clip",
    _code(torch.nn.utils.clip_grad_value_): "clip",
    _code(torch.nn.utils.clip_grads_with_norm_): "clip",
    _code(torch.autograd.backward): "backward",
    _code(torch.autograd.grad): "grad",
    _code(Optimizer.zero_grad): "clear",
    _code(nn.Module.zero_grad): "clear",
    _code(torch.amp.GradScaler.scale): "scale",
    _code(torch.amp.GradScaler.unscale_): "unscale",
    _code(torch.amp.GradScaler.step): "scaler step",
    _code(nn.Module._call_impl): "module",
    _code(Tensor.register_hook): "hook",
}
