"""Every torch call of a run, looked at for values that are not finite."""

from __future__ import annotations

import inspect
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.inspection.native import Onlooker
from rnnguard.inspection.recording import tensors_in
from rnnguard.probe.seen_call import Key, Place, SeenCall, is_finite, layout_of, watched

_TORCH, _OURS = (str(Path(str(m.__file__)).parent) + os.sep for m in (torch, rnnguard))
# Parts of the package that hold modules of their own, as a user's files do.
_MODULES_OF_OURS = (f"{_OURS}nn{os.sep}", f"{_OURS}demo.py")


class Watch(Onlooker):
    """Inside, every torch call is noted; `origin` then tells where a bad value comes from.

    `suspects` are tensors that are not finite from the start.
    """

    def __init__(self, model: nn.Module, suspects: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._suspects = {id(tensor): tensor for tensor in suspects}
        self.made: dict[Any, SeenCall] = {}
        """The call that made each node of the graph."""
        self._modules = {id(module): path for path, module in model.named_modules()}
        self._seen: Counter[Key] = Counter()
        self._calls: Counter[Key] = Counter()
        # The tensor is kept beside its call, so that no id is used twice during the run.
        self._bad: dict[int, tuple[Tensor, SeenCall]] = {}

    def is_repeated(self, call: SeenCall) -> bool:
        """Whether the call's time says anything: a fused sequence, or one of several calls."""
        return call.layout is not None or self._calls[call.key] > 1

    def maker(self, tensor: Tensor) -> SeenCall | None:
        """The call that gave the tensor a value that is not finite, if one did."""
        known = self._bad.get(id(tensor))
        return None if known is None else known[1]

    def origin(self, call: SeenCall) -> tuple[SeenCall, Tensor | None]:
        """The call that first made a bad value on the way to this one, and the tensor that gave
        it that value, where it was there before the run.

        A mask of -inf that was asked for is only named when nothing behind it went wrong.
        """
        chain: list[SeenCall] = [call]
        while parents := chain[-1].parents:
            oldest = min(parents, key=_age)
            if isinstance(oldest, Tensor):
                return chain[-1], oldest
            chain.append(oldest)
        while len(chain) > 1 and chain[-1].asked:
            chain.pop()
        return chain[-1], None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operation = _operation(func)
        if operation is None:
            return func(*args, **kwargs)
        given = [t for t in tensors_in((args, kwargs))]
        call = self._call(operation, args, kwargs)
        call.parents = [self._bad[id(t)][1] for t in given if id(t) in self._bad]
        call.parents += [t for t in given if id(t) in self._suspects]
        if call.layout is not None:
            args = (watched(args[0], call), *args[1:])
        result = func(*args, **kwargs)
        written = [args[0]] if _writes_in_place(func) and isinstance(args[0], Tensor) else []
        made = [*tensors_in(result), *written]
        self._look(call, made, given, written)
        return result

    def _look(
        self,
        call: SeenCall,
        made: list[Tensor],
        given: list[Tensor],
        written: list[Tensor],
    ) -> None:
        for tensor in made:
            # What gives back its argument, such as `to`, made nothing.
            passed_on = any(tensor is t for t in given) and not written
            if tensor.grad_fn is not None and not passed_on:
                self.made[tensor.grad_fn] = call
            if is_finite(tensor):
                self._bad.pop(id(tensor), None)
            elif not passed_on:
                self._bad[id(tensor)] = (tensor, call)
        if call.layout is not None and id(made[0]) in self._bad:
            call.offset = call.first_bad_step(made[0])

    def _call(self, operation: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SeenCall:
        key = (operation, self._where())
        layout = layout_of(operation, args)
        call = SeenCall(self._calls.total(), *key, self._seen[key], layout)
        call.asked = not all(map(math.isfinite, _numbers((*args, *kwargs.values()))))
        self._calls[key] += 1
        self._seen[key] += 1 if layout is None else layout.length(args[0])
        return call

    def _where(self) -> Place:
        """The innermost known module's path, the user's file:line, and the way there."""
        path: str | None = None
        location: str | None = None
        way: list[int] = []
        frame = inspect.currentframe()
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(_OURS) and not file.startswith(_MODULES_OF_OURS):
                if file != __file__:
                    break  # from here outwards it is the caller of rnnguard, not the model
            elif not file.startswith((_TORCH, _MODULES_OF_OURS[0])) and location is None:
                location = f"{file}:{frame.f_lineno}"
            if path is None and "self" in frame.f_code.co_varnames:
                path = self._modules.get(id(frame.f_locals.get("self")))
            way.append(frame.f_lasti)
            frame = frame.f_back
        return path, location, hash(tuple(way))


def _age(parent: SeenCall | Tensor) -> tuple[bool, int]:
    """What was there before the run is older than every call, and a mask is asked last."""
    if isinstance(parent, Tensor):
        return False, -1
    return parent.asked and not parent.parents, parent.order


def _operation(func: Callable[..., Any]) -> str | None:
    """The call's name; None for questions about a tensor, which make no values."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = str(getattr(getattr(func, "__self__", None), "__name__", name))
        return name if name in ("T", "mT", "H", "mH", "data", "real", "imag") else None
    return None if name in ("size", "dim", "__len__", "numel", "stride", "requires_grad_") else name


def _writes_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)
