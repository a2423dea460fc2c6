"""What a recorded call says in its arguments: along which axis, over how many steps."""

from __future__ import annotations

from typing import Any

from torch import fx

from rnnguard.inspection.native import NativeCall

_AXIS_IS_THIRD = {"chunk", "split", "tensor_split", "take_along_dim", "norm", "vector_norm",
                  "quantile"}  # fmt: skip


def given_axis(node: fx.Node) -> Any:
    """The axis, or the axes, as the call names them; None when it names none."""
    position = 2 if node.meta.get("name") in _AXIS_IS_THIRD else 1
    positional = node.args[position] if len(node.args) > position else None
    return node.kwargs.get("dim", node.kwargs.get("axis", positional))


def axis_of(node: fx.Node, rank: int) -> int | None:
    """The one axis that the call works along, counted from the front; None when not given."""
    axis = given_axis(node)
    return axis % max(1, rank) if isinstance(axis, int) else None


def axes_of(node: fx.Node) -> list[int]:
    """All axes that the call works along, as given."""
    axis = given_axis(node)
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    return [a for a in axes if isinstance(a, int)]


def entry_of(node: fx.Node) -> Any:
    """What `select` or `narrow` takes along its axis, as an index."""
    rest = [*node.args[2:], *(node.kwargs[k] for k in ("index", "start", "length")
                              if k in node.kwargs)]  # fmt: skip
    if node.meta["name"] == "select":
        return rest[0]
    start, length = rest
    if isinstance(start, int) and isinstance(length, int):
        return slice(start, start + length)
    return slice(start, None)


def is_fixed(node: fx.Node) -> bool:
    """Whether the node is a weight, or a weight turned."""
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.meta.get("name") in ("parameter", "constant")


def is_packed(node: fx.Node) -> bool:
    """Whether a native call works on a packed sequence: its weights come one place later."""
    return len(node.args) > 3 and isinstance(node.args[3], tuple | list)


def is_cell(node: fx.Node) -> bool:
    """Whether a native call is that of a cell, a single step."""
    return str(node.meta.get("name")).endswith("_cell")


def is_bidirectional(node: fx.Node) -> bool:
    """Whether a native call runs in both directions."""
    return not is_cell(node) and bool(node.args[8 if is_packed(node) else 7])


def steps_of(call: NativeCall) -> int:
    """How many steps a native call makes."""
    if is_cell(call.node):
        return 1
    if call.batch_sizes is not None:
        return len(call.batch_sizes)
    return int(call.input.shape[1 if call.batch_first else 0])
