"""Calls of torch's native recurrent kernels, with the tensors that they were given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

NATIVE = {
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
}


class Onlooker(TorchFunctionMode):
    """A mode to which a recurrence of rnnguard shows itself as one native call."""


def looked_at() -> bool:
    """Whether an onlooker is there."""
    depth = torch._C._len_torch_function_stack()
    return any(isinstance(torch._C._get_function_stack_at(i), Onlooker) for i in range(depth))


@dataclass(frozen=True)
class NativeCall:
    """One call of a native recurrent kernel, with the tensors that it was given."""

    node: fx.Node
    order: int
    kind: str
    module: nn.Module | None
    input: Tensor
    batch_sizes: Tensor | None
    state: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    batch_first: bool
    location: str | None


def native_call(
    node: fx.Node,
    order: int,
    kind: str,
    module: nn.Module | None,
    args: tuple[Any, ...],
    location: str | None,
) -> NativeCall:
    """What the arguments of a recorded call of `kind` mean."""
    if kind.endswith("_cell"):
        state = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        weights = tuple(a for a in args[2:] if isinstance(a, Tensor))
        return NativeCall(
            node, order, kind, module, args[0], None, tuple(state), weights, False, location
        )
    packed = isinstance(args[3], tuple | list)
    batch_sizes, hx, weights = (args[1], args[2], args[3]) if packed else (None, args[1], args[2])
    state = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
    batch_first = not packed and bool(args[8])
    return NativeCall(
        node,
        order,
        kind,
        module,
        args[0],
        batch_sizes,
        state,
        tuple(weights),
        batch_first,
        location,
    )
