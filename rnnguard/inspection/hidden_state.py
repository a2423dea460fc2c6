"""Which part of a native module's final state is read, where layers, directions and samples meet.

The state is (D, B, H), with D the layers times the directions. Each of its numbers is followed by
the row and the sample that it belongs to: the recorded views are made again on these, so that
what arrives where something is computed is known exactly.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from rnnguard.inspection.arguments import is_bidirectional, is_cell
from rnnguard.inspection.written import relative
from rnnguard.usage import StateIndex

_RESHAPES = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
_MOVES = _RESHAPES | {
    *("squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "permute", "movedim", "T", "mT"),
    *("t", "__getitem__", "select", "narrow", "index_select", "unbind", "__iter__", "chunk"),
    *("split", "tensor_split", "flip", "roll", "expand", "expand_as", "repeat", "tile"),
    *("repeat_interleave", "cat", "concat", "concatenate", "stack", "hstack", "vstack"),
}
# Each number of the result is made from the one at its place.
_PLACEWISE = {
    *("contiguous", "clone", "dropout", "relu", "tanh", "sigmoid", "leaky_relu", "gelu", "elu"),
    *("selu", "silu", "softplus", "detach", "data", "float", "double", "half", "to", "cpu", "cuda"),
    *("type", "type_as", "neg", "add", "__add__", "__radd__", "sub", "__sub__", "mul", "__mul__"),
    *("__rmul__", "div", "__truediv__"),
}
_IN_ANY_MEMORY = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
_INDEXES = {"__getitem__", "select", "narrow", "index_select"}
_FOREIGN = -1


@dataclass(frozen=True)
class _Followed:
    """Of each number its row times B plus its sample, FOREIGN for those from elsewhere.

    `taken`: where rows were left out, `mixed`: where a view put several samples in one place.
    """

    numbers: Tensor | tuple[Tensor, ...]
    taken: fx.Node | None = None
    mixed: fx.Node | None = None

    @property
    def all(self) -> tuple[Tensor, ...]:
        return self.numbers if isinstance(self.numbers, tuple) else (self.numbers,)


@dataclass
class _Reads:
    """What is read of the final states: their rows, and the places of note."""

    rows: set[int] = field(default_factory=set)
    taken: list[fx.Node] = field(default_factory=list)
    mixed: list[fx.Node] = field(default_factory=list)


def state_index(calls: Collection[fx.Node]) -> tuple[StateIndex, str | None]:
    """Which part of the final state is read at a site, and the user's file:line of it.

    `calls` are the site's native calls. "sound" also where each part of the state is read, where
    the output is read beside it, and for cells, whose states have no such axis.
    """
    ordered = sorted(calls, key=lambda node: int(node.meta["order"]))
    shape = _state_shape(ordered[0]) if ordered else ()
    if len(shape) != 3 or shape[0] == 1:
        return "sound", None
    live, reads = _live(ordered[0].graph, calls), _Reads()
    for call in ordered:
        for state in _parts(call, 1, 2):
            _follow(state, calls, live, reads)
    if reads.mixed:
        return "mixed axes", _first(reads.mixed)
    if live.intersection(part for call in ordered for part in _parts(call, 0)):
        return "sound", None
    label = _label(reads.rows, shape[0], 2 if is_bidirectional(ordered[0]) else 1)
    return label, None if label == "sound" else _first(reads.taken)


def _label(rows: set[int], count: int, ways: int) -> StateIndex:
    """What is missing among the rows that are read, where the output is not."""
    read = [{row for row in rows if row % ways == way} for way in range(ways)]
    if ways == 2 and len([each for each in read if each]) == 1:
        return "one direction"
    below = any(each and count - ways + way not in each for way, each in enumerate(read))
    return "first layer" if below else "sound"


def _state_shape(call: fx.Node) -> tuple[int, ...]:
    if is_cell(call):
        return ()
    return next((tuple(part.meta["shape"]) for part in _parts(call, 1)), ())


def _parts(call: fx.Node, *positions: int) -> list[fx.Node]:
    """The call's results at these positions: its output, h_n, and an LSTM's c_n."""
    return [part for part in call.users if part.meta.get("part") in positions]


def _first(places: list[fx.Node]) -> str | None:
    if not places:
        return None
    return relative(min(places, key=lambda node: int(node.meta["order"])).meta.get("location"))


def _live(graph: fx.Graph, calls: Collection[fx.Node]) -> set[fx.Node]:
    """What the run's result is made of; the state that one of the calls hands on is not read."""
    pending = [node for node in graph.nodes if node.op == "output"]
    found = set(pending)
    while pending:
        node = pending.pop()
        sources = [node.args[0]] if node in calls else node.all_input_nodes
        fresh = [n for n in sources if isinstance(n, fx.Node) and n not in found]
        found.update(fresh)
        pending += fresh
    return found


def _follow(state: fx.Node, calls: Collection[fx.Node], live: set[fx.Node], reads: _Reads) -> None:
    """Follows a final state to where something is computed from it."""
    count, batch, size = state.meta["shape"]
    start = torch.arange(count * batch).view(count, batch, 1).expand(count, batch, size)
    known = {state: _Followed(start)}
    pending: list[tuple[int, fx.Node]] = []
    queued: set[fx.Node] = set()

    def queue(node: fx.Node) -> None:
        for user in node.users.keys() - queued:
            # As a state of the next call it is handed on, not read.
            if user in live and not (user in calls and user.args[0] is not node):
                queued.add(user)
                heapq.heappush(pending, (int(user.meta["order"]), user))

    queue(state)
    while pending:
        node = heapq.heappop(pending)[1]
        passed = _passed(node, known, batch)
        if passed is not None:
            known[node] = passed
            queue(node)
            continue
        for source in node.all_input_nodes:
            if source in known:
                _read(known[source], batch, node, reads)


def _read(value: _Followed, batch: int, by: fx.Node, reads: _Reads) -> None:
    """Notes what arrives where something is computed; what the model gives out may go on."""
    reads.rows.update(_rows(value.all, batch))
    if value.taken is not None:
        reads.taken.append(value.taken)
    if value.mixed is not None and by.op != "output":
        reads.mixed.append(value.mixed)


def _passed(node: fx.Node, known: dict[fx.Node, _Followed], batch: int) -> _Followed | None:
    """The value behind a call that only moves numbers; None where it computes something."""
    name = node.meta.get("name")
    inputs = [known[n] for n in node.all_input_nodes if n in known]
    before = replace(
        inputs[0],
        taken=next((each.taken for each in inputs if each.taken is not None), None),
        mixed=next((each.mixed for each in inputs if each.mixed is not None), None),
    )
    if name == "item":
        assert isinstance(before.numbers, tuple)
        numbers: Any = before.numbers[node.meta["part"]]
        return _noted(node, before, numbers, _rows(before.numbers, batch), batch)
    if name in _PLACEWISE and len(inputs) == 1 and isinstance(before.numbers, Tensor):
        same = tuple(before.numbers.shape) == tuple(node.meta["shape"])
        return before if same else None
    if name not in _MOVES or not callable(node.target):
        return None
    # How the numbers lie in memory is not followed.
    again: Any = _IN_ANY_MEMORY.get(str(name), node.target)
    try:
        numbers = again(*_again(node, known, node.args), **_again(node, known, node.kwargs))
    except (IndexError, RuntimeError, TypeError, ValueError, _UnknownError):
        return None
    if not isinstance(numbers, Tensor):
        return replace(before, numbers=tuple(numbers))
    given = [tensor for each in inputs for tensor in each.all]
    return _noted(node, before, numbers, _rows(given, batch), batch)


class _UnknownError(Exception):
    """An index whose values were not recorded."""


def _again(node: fx.Node, known: dict[fx.Node, _Followed], arguments: Any) -> Any:
    """The arguments of a call, with numbers in place of what is followed."""
    picks = node.meta.get("picks")

    def value(source: fx.Node) -> Any:
        if source in known:
            return known[source].numbers
        if node.meta["name"] in _INDEXES:
            if picks is None:
                raise _UnknownError
            return picks.cpu()
        return torch.full(tuple(source.meta["shape"]), _FOREIGN)

    return fx.node.map_arg(arguments, value)


def _noted(
    node: fx.Node, before: _Followed, numbers: Tensor, rows: set[int], batch: int
) -> _Followed:
    """The numbers behind a call, and whether it left out rows or put samples together."""
    fewer = _rows([numbers], batch) < rows
    mixed = before.mixed
    if _is_apart(numbers, batch):
        mixed = None
    elif mixed is None and node.meta["name"] in _RESHAPES:
        mixed = node
    return _Followed(numbers, node if fewer and before.taken is None else before.taken, mixed)


def _rows(values: Collection[Tensor], batch: int) -> set[int]:
    found = torch.cat([value.flatten() for value in values])
    present = torch.bincount(found[found != _FOREIGN] // batch).nonzero()
    return set(present.flatten().tolist())


def _is_apart(numbers: Tensor, batch: int) -> bool:
    """Whether each sample has a place of its own, if the shape says that samples have one."""
    shape = tuple(numbers.shape)
    in_front = len(shape) > 1 and shape[0] == batch
    # Directions joined to one vector, with the layers still in front.
    joined = len(shape) == 3 and shape[1] == batch
    if not in_front and not joined:
        return True
    return any(
        _is_own(numbers.movedim(axis, 0).reshape(batch, -1), batch)
        for axis, length in enumerate(shape)
        if length == batch
    )


def _is_own(places: Tensor, batch: int) -> bool:
    """Whether each of the places (B, n) holds numbers of one sample only."""
    samples, foreign = places % batch, places == _FOREIGN
    highest = samples.masked_fill(foreign, -1).amax(1)
    lowest = samples.masked_fill(foreign, batch).amin(1)
    return bool((highest <= lowest).all())
