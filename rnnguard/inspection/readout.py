"""Which part of a recurrence's output the rest of the model reads, from the recorded graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import fx

from rnnguard.inspection.dataflow import CUTS, TRANSPARENT, state_path
from rnnguard.inspection.recording import NATIVE, NativeCall
from rnnguard.records import Readout

_POOLS = {"mean", "sum", "max", "amax", "min", "amin", "logsumexp", "std", "median", "argmax"}
_GATHERS = {"gather", "index_select", "take_along_dim"}
_MIXES = {"matmul", "bmm", "__matmul__", "__rmatmul__", "einsum", "scaled_dot_product_attention",
          "multi_head_attention_forward"}  # fmt: skip
_JOINS = {"stack", "cat", "hstack", "vstack"}
_PARTS = {"narrow", "chunk", "split", "tensor_split"}
_DROPS = {"select", "unbind"}
_TURNS = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "T", "mT", "t"}
_VIEWS = {"view", "reshape", "flatten", "unflatten"}
_AXIS_IS_THIRD = {"chunk", "split", "tensor_split", "take_along_dim"}
_WHOLE = slice(None)


@dataclass(frozen=True)
class _Sequence:
    """A node that still holds one value per time step, and the axis of time in it.

    A single step has lost that axis and has -1. `part` says that only some of the features
    are left, as of two directions taken apart.
    """

    node: fx.Node
    axis: int
    part: bool = False

    @property
    def rank(self) -> int:
        return max(1, _rank(self.node))

    def is_feature(self, axis: int) -> bool:
        """Whether the axis is neither time nor the samples, which lie in front."""
        return axis not in (self.axis, 1 if self.axis == 0 else 0)

    def splits_features(self, entries: list[Any]) -> bool:
        """Whether an index with one entry per axis takes only some of the features."""
        return any(e != _WHOLE and self.is_feature(axis) for axis, e in enumerate(entries))


def readout_of(calls: Sequence[NativeCall]) -> Readout:
    """Which part of the recurrence's output the rest of the model reads."""
    if calls[0].kind.endswith("_cell"):
        found = _readouts_of_steps(calls)
    else:
        found = {kind for call in calls for kind in _readouts_of_sequence(call)}
    order: tuple[Readout, ...] = ("all_steps", "last_step", "pooled", "final_state")
    return next((kind for kind in order if kind in found), "unknown")


def _readouts_of_sequence(call: NativeCall) -> Iterator[Readout]:
    for part in call.node.users:
        if part.meta.get("part") == 0:
            yield from _readouts(_Sequence(part, 1 if call.batch_first else 0))
        elif _is_computed_with(part):
            yield "final_state"


def _readouts_of_steps(calls: Sequence[NativeCall]) -> set[Readout]:
    """For cells in a loop: what reads the states beside the loop itself and other recurrences."""
    loop = set[fx.Node]().union(*(state_path(a, b) for a, b in pairwise(calls)))
    readers = [
        [user for state in _states(call) for user in state.users
         if user not in loop and user.meta.get("name") not in NATIVE | CUTS]
        for call in calls
    ]  # fmt: skip
    if sum(map(bool, readers)) <= len(calls) // 2 or len(calls) == 1:
        return {"final_state"} if readers[-1] else set()
    joined = [user for users in readers for user in users if user.meta.get("name") in _JOINS]
    if not joined:
        return {"all_steps"}
    return {kind for node in set(joined) for kind in _readouts(_Sequence(node, _axis(node) or 0))}


def _states(call: NativeCall) -> list[fx.Node]:
    parts = [user for user in call.node.users if user.meta.get("name") == "item"]
    return parts or [call.node]


def _is_computed_with(node: fx.Node) -> bool:
    """Whether a state is used in a computation, not only handed out or fed to the next call."""
    return any(
        user.op != "output"
        and user.meta.get("name") not in NATIVE | CUTS
        and (_is_computed_with(user) if _reshapes(user) else True)
        for user in node.users
    )


def _reshapes(node: fx.Node) -> bool:
    return node.meta.get("name") in ("item", "index_select", "contiguous", "clone", "view")


def _readouts(start: _Sequence) -> Iterator[Readout]:
    """Follows the sequence through everything that keeps one value per step."""
    pending, seen = [start], set()
    while pending:
        sequence = pending.pop()
        if sequence.node in seen:
            continue
        seen.add(sequence.node)
        for user in sequence.node.users:
            step = _through(sequence, user)
            if isinstance(step, _Sequence):
                pending.append(step)
            elif step is not None:
                yield step


def _through(sequence: _Sequence, user: fx.Node) -> _Sequence | Readout | None:
    """What one user makes of the sequence: still a sequence, or a way of reading it."""
    name = user.meta.get("name", user.op)
    if user.op == "output":
        return "all_steps"
    if name in NATIVE or name in ("__setitem__", "_pack_padded_sequence"):
        return None
    if name == "__getitem__":
        return _indexed(sequence, user)
    if name in _POOLS:
        return _reduced(sequence, user)
    if name in _GATHERS:
        along_time = _axis(user) in (sequence.axis, None)
        if along_time:
            return _one_step(_Sequence(user, sequence.axis, sequence.part))
        return replace(sequence, node=user)
    if name in _MIXES:
        return _mixed(sequence, user, name)
    if name == "_pad_packed_sequence":
        padded = next((part for part in user.users if part.meta.get("part") == 0), None)
        return None if padded is None else _Sequence(padded, 1 if user.args[2] else 0)
    if name in _DROPS | _PARTS:
        return _picked(sequence, user, name)
    if name in _TURNS:
        return replace(sequence, node=user, axis=_turned(sequence, user, name))
    return _carried(sequence, user, name)


def _carried(sequence: _Sequence, user: fx.Node, name: str) -> _Sequence | Readout:
    """Any other call: step by step, unless its shape shows that time was merged or pooled."""
    before, after = sequence.node.meta.get("shape", ()), user.meta.get("shape", ())
    leading = slice(sequence.axis + 1)
    if before[leading] != after[leading]:
        if not after or name in _VIEWS or len(before) != len(after):
            return "all_steps"
        if after[sequence.axis] == 1:
            return "pooled"
    part = sequence.part and name in TRANSPARENT
    return replace(sequence, node=user, part=part)


def _rank(node: fx.Node) -> int:
    return len(node.meta.get("shape", ()))


def _axis(user: fx.Node) -> int | None:
    """The one axis that the call works along, counted from the front; None when not given."""
    position = 2 if user.meta.get("name") in _AXIS_IS_THIRD else 1
    positional = user.args[position] if len(user.args) > position else None
    axis = user.kwargs.get("dim", user.kwargs.get("axis", positional))
    if not isinstance(axis, int):
        return None
    source = user.args[0]
    return axis % max(1, _rank(source)) if isinstance(source, fx.Node) else axis


def _reduced(sequence: _Sequence, user: fx.Node) -> _Sequence | Readout:
    positional = user.args[1] if len(user.args) > 1 else None
    axis = user.kwargs.get("dim", user.kwargs.get("axis", positional))
    if axis is None:
        return "all_steps"
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    dropped = [a % sequence.rank for a in axes if isinstance(a, int)]
    if sequence.axis in dropped:
        return "pooled"
    gone = 0 if _rank(user) == sequence.rank else sum(a < sequence.axis for a in dropped)
    return replace(sequence, node=user, axis=sequence.axis - gone)


def _mixed(sequence: _Sequence, user: fx.Node, name: str) -> _Sequence | Readout:
    """A product sums over steps, unless it is one with weights along the features."""
    others = [other for other in user.all_input_nodes if other is not sequence.node]
    contracted = sequence.rank - (1 if user.args[0] is sequence.node else 2)
    if "matmul" in name and all(map(_is_fixed, others)) and contracted != sequence.axis:
        return replace(sequence, node=user, part=False)
    return "pooled"


def _is_fixed(node: fx.Node) -> bool:
    """Whether the node is a weight, or a weight turned."""
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.meta.get("name") in ("parameter", "constant")


def _picked(sequence: _Sequence, user: fx.Node, name: str) -> _Sequence | Readout:
    """One or several slices along an axis."""
    axis = _axis(user) or 0
    if axis != sequence.axis:
        gone = 1 if name in _DROPS and axis < sequence.axis else 0
        part = sequence.part or sequence.is_feature(axis)
        return _Sequence(user, sequence.axis - gone, part)
    if name not in _DROPS:
        return _narrowed(replace(sequence, node=user), sequence)
    read = [part for part in user.users if part.users] if name == "unbind" else [user]
    return _one_step(_Sequence(read[0], -1, sequence.part)) if len(read) == 1 else "all_steps"


def _indexed(sequence: _Sequence, user: fx.Node) -> _Sequence | Readout:
    if user.args[0] is not sequence.node:
        return "all_steps"
    entries = _entries(user.args[1], sequence.rank)
    own = [entry for entry in entries if entry is not None]
    chosen = own[sequence.axis]
    part = sequence.part or sequence.splits_features(own)
    if not isinstance(chosen, slice):
        return _one_step(_Sequence(user, -1, part))
    if any(isinstance(entry, fx.Node) and _rank(entry) > 1 for entry in own):
        return "all_steps"
    place = [i for i, entry in enumerate(entries) if entry is not None][sequence.axis]
    axis = sum(not isinstance(entry, int) for entry in entries[:place])
    return _narrowed(_Sequence(user, axis, part), sequence)


def _entries(index: Any, rank: int) -> list[Any]:
    """An index written out: one entry per axis, and a None for each new one."""
    entries = list(index) if isinstance(index, tuple) else [index]
    missing = rank - sum(entry is not None and entry is not ... for entry in entries)
    place = next((i for i, entry in enumerate(entries) if entry is ...), len(entries))
    entries[place : place + 1] = [_WHOLE] * missing
    return entries


def _narrowed(sequence: _Sequence, source: _Sequence) -> _Sequence | Readout:
    """A stretch of time, which may be a single step."""
    left, before = (s.node.meta["shape"][s.axis] for s in (sequence, source))
    return _one_step(sequence) if left == 1 < before else sequence


def _one_step(step: _Sequence) -> Readout:
    """A single step of all features, or of some: then it is one direction's final state."""
    return "final_state" if step.part or _is_parted(step) else "last_step"


def _is_parted(step: _Sequence) -> bool:
    """Whether every reader of the step takes only some of its features."""
    readers = list(step.node.users)
    return bool(readers) and all(_takes_part(step, reader) for reader in readers)


def _takes_part(step: _Sequence, reader: fx.Node) -> bool:
    name = reader.meta.get("name")
    if name == "__getitem__":
        entries = _entries(reader.args[1], step.rank)
        return step.splits_features([entry for entry in entries if entry is not None])
    if name in _DROPS | _PARTS:
        return step.is_feature(_axis(reader) or 0)
    return name in _VIEWS and _is_parted(replace(step, node=reader))


def _turned(sequence: _Sequence, user: fx.Node, name: str) -> int:
    """Where time lies after a permutation of the axes."""
    order = list(range(sequence.rank))
    given = [*user.args[1:], *user.kwargs.values()]
    dims = [d for g in given for d in (g if isinstance(g, tuple | list) else [g])]
    places: list[int] = [d % sequence.rank for d in dims if isinstance(d, int)]
    if name == "permute":
        order = places
    elif name == "movedim":
        order.insert(places[1], order.pop(places[0]))
    elif name == "T":
        order.reverse()
    else:
        one, other = places or (sequence.rank - 2, sequence.rank - 1)
        order[one], order[other] = order[other], order[one]
    return order.index(sequence.axis)
