"""How each mutable object that a model holds is given back, and what tells that it is the same."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from rnnguard.probe.reachable import RANDOM, contents_of, is_leaf

_EMPTY: Mapping[Any, Any] = {}


def keeper(held: Any) -> Callable[[], None]:
    """What gives the object its present content back, in place."""
    if isinstance(held, dict):
        # Most dicts of a module are empty, and there are many.
        return partial(_refill, held, dict(held) if held else _EMPTY)
    if isinstance(held, list | deque):
        return _sequence_keeper(held)
    if isinstance(held, set):
        return _set_keeper(held)
    if isinstance(held, Tensor):
        return _tensor_keeper(held)
    if isinstance(held, numpy.ndarray):
        return partial(held.__setitem__, ..., held.copy())
    if isinstance(held, RANDOM):
        return partial(_set_state, held, _state(held))
    if isinstance(held, CellType):
        return _cell_keeper(held)
    return _nothing


def _nothing() -> None:
    """Plain objects hold all they have in their dict, which is kept by itself."""


def _state(generator: Any) -> Any:
    if isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _cell_keeper(cell: CellType) -> Callable[[], None]:
    content = contents_of(cell)

    def restore() -> None:
        if content and not _same(contents_of(cell), content):
            cell.cell_contents = content[0]
        elif not content and contents_of(cell):
            del cell.cell_contents

    return restore


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


def _same(held: Any, items: Any) -> bool:
    return len(held) == len(items) and all(a is b for a, b in zip(held, items, strict=True))


def _refill(held: dict[Any, Any], items: Mapping[Any, Any]) -> None:
    # Tensors are keys in an optimizer's state, and have no plain equality.
    if _same(held, items) and _same(held.values(), items.values()):
        return
    held.clear()
    held.update(items)


def _tensor_keeper(tensor: Tensor) -> Callable[[], None]:
    leaf = is_leaf(tensor)
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


def has_bits(tensor: Tensor) -> bool:
    """Whether the tensor has plain memory: neither lazy, nor meta, nor sparse, nor freed."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return False
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    # Sharding frees the memory of a whole weight while only a part of it is needed.
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


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
        if is_leaf(held):
            yield f"{held.requires_grad} {id(held.grad)}".encode()
        if has_bits(held):
            yield _bits(held).cpu().numpy().tobytes()
    elif isinstance(held, numpy.ndarray):
        yield held.tobytes()
    elif isinstance(held, torch.Generator):
        yield held.get_state().numpy().tobytes()
    elif isinstance(held, RANDOM):
        yield repr(_state(held)).encode()
    elif isinstance(held, CellType):
        yield " ".join(map(_word, contents_of(held))).encode()


def _word(value: Any) -> str:
    plain = isinstance(value, int | float | complex | str | bytes | bool | type(None))
    return repr(value) if plain else str(id(value))
