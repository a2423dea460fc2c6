"""Everything mutable that hangs on a model or an optimizer, however deep.

States live on attributes, in nested lists, in dicts, on plain helper objects; what a run
may change in place must be found wherever it is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import DataLoader, Dataset

# Code is not state; data sets are read, not written, and may be larger than memory.
_LEFT_OUT = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, DataLoader, Dataset)


def mutables(*roots: object) -> Iterator[Any]:
    """Each mutable object that can be reached from the roots, once, owners before held."""
    pending, seen = deque(roots), set[int]()
    while pending:
        held = pending.popleft()
        if id(held) in seen or isinstance(held, _LEFT_OUT):
            continue
        seen.add(id(held))
        if isinstance(held, tuple):
            pending.extend(held)
        elif isinstance(held, dict):
            yield held
            pending.extend(held.values())
        elif isinstance(held, list | set | deque):
            yield held
            pending.extend(held)
        elif isinstance(held, Tensor):
            yield held
            if _is_leaf(held) and held.grad is not None:
                pending.append(held.grad)
        elif isinstance(held, numpy.ndarray | torch.Generator):
            yield held
        elif isinstance(getattr(held, "__dict__", None), dict):
            yield held
            pending.append(vars(held))


def keeper(held: Any) -> Callable[[], None]:
    """What gives the object its present content back, in place."""
    if isinstance(held, dict):
        return _dict_keeper(held)
    if isinstance(held, list | deque):
        return _sequence_keeper(held)
    if isinstance(held, set):
        return _set_keeper(held)
    if isinstance(held, Tensor):
        return _tensor_keeper(held)
    if isinstance(held, numpy.ndarray):
        return partial(held.__setitem__, ..., held.copy())
    if isinstance(held, torch.Generator):
        return partial(_set_state, held, held.get_state())
    return _nothing


def _nothing() -> None:
    """Plain objects hold all they have in their dict, which is kept by itself."""


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _sequence_keeper(held: list[Any] | deque[Any]) -> Callable[[], None]:
    items = list(held)

    def restore() -> None:
        if not _same(held, items):
            held.clear()
            held.extend(items)

    return restore


def _set_keeper(held: set[Any]) -> Callable[[], None]:
    members = set(held)

    def restore() -> None:
        if held != members:
            held.clear()
            held.update(members)

    return restore


def _same(held: Any, items: list[Any]) -> bool:
    return len(held) == len(items) and all(a is b for a, b in zip(held, items, strict=True))


def _dict_keeper(held: dict[Any, Any]) -> Callable[[], None]:
    items = dict(held)

    def restore() -> None:
        if list(held) == list(items) and all(held[key] is items[key] for key in items):
            return
        held.clear()
        held.update(items)

    return restore


def _tensor_keeper(tensor: Tensor) -> Callable[[], None]:
    leaf = _is_leaf(tensor)
    grad, requires_grad = (tensor.grad, tensor.requires_grad) if leaf else (None, False)
    values = tensor.detach().clone() if has_bits(tensor) else None

    def restore() -> None:
        if leaf and tensor.is_leaf:
            if tensor.requires_grad is not requires_grad:
                tensor.requires_grad_(requires_grad)
            tensor.grad = grad
        if values is not None and not same_bits(tensor, values):
            with torch.no_grad():
                tensor.copy_(values)

    return restore


def _is_leaf(tensor: Tensor) -> bool:
    return not isinstance(tensor, UninitializedParameter | UninitializedBuffer) and tensor.is_leaf


def has_bits(tensor: Tensor) -> bool:
    """Whether the tensor has plain memory of its own: neither lazy, nor meta, nor sparse."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return False
    return tensor.layout is torch.strided and not tensor.is_meta


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, so that NaN equals NaN and 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b.to(a.device)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def fact(held: Any) -> Iterator[bytes]:
    """What tells whether the object is still the same with the same content."""
    yield f"{id(held)} {type(held)}".encode()
    if isinstance(held, dict):
        yield " ".join(f"{_word(k)}={_word(v)}" for k, v in held.items()).encode()
    elif isinstance(held, list | deque):
        yield " ".join(map(_word, held)).encode()
    elif isinstance(held, set):
        yield " ".join(sorted(map(_word, held))).encode()
    elif isinstance(held, Tensor):
        if _is_leaf(held):
            yield f"{held.requires_grad} {id(held.grad)}".encode()
        if has_bits(held):
            yield _bits(held).cpu().numpy().tobytes()
    elif isinstance(held, numpy.ndarray):
        yield held.tobytes()
    elif isinstance(held, torch.Generator):
        yield held.get_state().numpy().tobytes()


def _word(value: Any) -> str:
    plain = isinstance(value, int | float | complex | str | bytes | bool | type(None))
    return repr(value) if plain else str(id(value))
