"""One pass through the recorded graph that follows what each value holds of a recurrence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from rnnguard.inspection.arguments import axes_of, axis_of, entry_of, is_fixed
from rnnguard.inspection.dataflow import BLANKS, CUTS
from rnnguard.inspection.native import NATIVE
from rnnguard.inspection.timeaxis import (
    NOTHING,
    WHOLE,
    Held,
    Shape,
    carried,
    filled,
    indexed,
    joined,
    reduced,
    turned,
    viewed,
)

_POOLS = {"mean", "sum", "max", "amax", "min", "amin", "logsumexp", "std", "median", "argmax",
          "argmin", "var", "std_mean", "var_mean", "norm", "vector_norm", "nanmean", "nansum",
          "prod", "quantile"}  # fmt: skip
_RUNNING = {"cumsum", "cummax", "cummin", "cumprod", "logcumsumexp"}
_GATHERS = {"gather", "index_select", "take_along_dim"}
_MIXES = {"matmul", "bmm", "__matmul__", "__rmatmul__", "einsum", "scaled_dot_product_attention",
          "multi_head_attention_forward"}  # fmt: skip
_JOINS = {"stack": 0, "cat": 0, "concat": 0, "concatenate": 0, "hstack": 1, "vstack": 0}
_PARTS = {"unbind", "chunk", "split", "tensor_split"}
_TURNS = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "T", "mT", "t"}
_VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"}


@dataclass(frozen=True)
class Source:
    """Where a recurrence's values enter the graph.

    `total` steps, what each value holds of them, the first position; `loop` are the places
    between its calls; `both_ways` where a step has seen those behind it too; `closed` are
    values that lead nowhere.
    """

    total: int
    start: int
    held: dict[fx.Node, Held]
    loop: set[tuple[Any, Any]]
    both_ways: bool
    closed: frozenset[fx.Node] = frozenset()


class Walk:
    """Passes through the graph once and keeps what each node holds of one recurrence."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held: dict[fx.Node, Held] = {}
        self._shapes: dict[fx.Node, Shape] = {}
        self._output: list[Held] = []
        self._ends: list[Held] = []
        self._pass()

    @property
    def total(self) -> int:
        """How many steps the recurrence has."""
        return self._source.total

    def results(self) -> list[Held]:
        """What the model gives out, or, where that holds nothing, what is computed last."""
        return self._output or self._ends

    def _pass(self) -> None:
        for node in next(iter(self._source.held)).graph.nodes:
            if node.meta["order"] < self._source.start:
                continue
            if node.op == "output":
                self._output = [self._held[n] for n in node.args[0] if n in self._held]
                continue
            held = self._of(node)
            if held is None:
                continue
            self._held[node] = held
            source = node.args[0] if node.meta.get("name") == "item" else node
            ends = source.meta.get("name") not in NATIVE | CUTS
            if not node.users and ends:
                self._ends.append(held)

    def _of(self, node: fx.Node) -> Held | None:
        name = node.meta.get("name", node.op)
        if node in self._source.closed:
            return None
        if node in self._source.held:
            return self._source.held[node]
        if name == "item":
            return self._item(node)
        inputs = [n for n in node.all_input_nodes if n in self._held]
        if not inputs or name in BLANKS:
            return None
        if name in NATIVE:
            return self._seen_by(node)
        if name in CUTS and self._held[inputs[0]].state:
            return None
        held = self._through(node, name, inputs)
        if held.placed and held.axis is not None and held.axis >= len(self._shape(node)):
            # Writing into an input, say, whose shape was not recorded.
            held = held.anywhere()
        if place(node) in self._source.loop and len(held.known) > 1 and held.axis is None:
            # An update under a mask, say, holds the state before beside the new one.
            return replace(held, steps=(max(held.known),))
        return held

    def _shape(self, node: fx.Node) -> Shape:
        """The shape that a node gives; writing into a part of a tensor gives that tensor."""
        source = node
        while source not in self._shapes and source.meta.get("name") == "__setitem__":
            target = source.args[0]
            assert isinstance(target, fx.Node)
            source = target
        shape: Shape = self._shapes.get(source, source.meta.get("shape", ()))
        self._shapes[node] = shape
        return shape

    def _item(self, node: fx.Node) -> Held | None:
        source, part = node.args
        assert isinstance(source, fx.Node) and isinstance(part, int)
        name = source.meta.get("name")
        held = self._held.get(source)
        if held is None:
            return None
        if name in NATIVE:
            return held if part == 0 or not held.is_sequence else held.taken(held.steps[-1:], None)
        if name == "_pad_packed_sequence":
            return replace(held, axis=1 if source.args[2] else 0, inner=1) if part == 0 else None
        if name == "_pack_padded_sequence":
            return replace(held, axis=0, inner=1) if part == 0 else None
        if name in _PARTS and source.args:
            return self._slice(node, source, part)
        return carried(held, self._shape(source), self._shape(node))

    def _slice(self, node: fx.Node, source: fx.Node, part: int) -> Held:
        """One of the slices that a tensor was taken apart into."""
        tensor = source.args[0]
        assert isinstance(tensor, fx.Node)
        before, after = self._shape(tensor), self._shape(node)
        axis = axis_of(source, len(before)) or 0
        if source.meta["name"] == "unbind":
            entry: Any = part
        else:
            siblings = [n for n in source.users if n.meta.get("part", part) < part]
            start = sum(self._shape(n)[axis] for n in siblings)
            entry = slice(start, start + after[axis])
        index = (*[WHOLE] * axis, entry)
        return indexed(self._held[source], index, before, after)

    def _seen_by(self, node: fx.Node) -> Held:
        """Behind another recurrence: its steps see those of its input, or all see one state."""
        data = node.args[0]
        held = self._held.get(data) if isinstance(data, fx.Node) else None
        if held is None:
            states = joined([self._held[n] for n in node.all_input_nodes if n in self._held])
            return states.mixed() if states.is_sequence else replace(states, axis=None)
        blurred = held.blurred or (self._source.both_ways and not held.state)
        return replace(held, halves=frozenset(), blurred=blurred)

    def _through(self, node: fx.Node, name: str, inputs: list[fx.Node]) -> Held:
        """What one call makes of the values that it is given."""
        if name in _JOINS:
            return self._joined(node, name, inputs)
        if name == "__setitem__":
            return self._written(node, inputs)
        source = node.args[0] if node.args else None
        if name in _MIXES or (name == "linear" and self._along_time(source)):
            return self._mixed(node, name, inputs)
        if isinstance(source, fx.Node) and source in self._held:
            held = self._alone(node, name, source)
            if held is not None:
                return held
        after = self._shape(node)
        return joined([carried(self._held[n], self._shape(n), after) for n in inputs], not after)

    def _alone(self, node: fx.Node, name: str, source: fx.Node) -> Held | None:
        """Behind a call that works on one tensor and moves or removes axes; None for others."""
        held, before, after = self._held[source], self._shape(source), self._shape(node)
        if name in _PARTS or name in ("_pack_padded_sequence", "_pad_packed_sequence"):
            return held
        if name == "__getitem__":
            return indexed(held, node.args[1], before, after)
        if name in _VIEWS:
            return viewed(held, before, after)
        if name in _TURNS:
            return turned(held, name, [*node.args[1:], *node.kwargs.values()], before)
        if name in ("select", "narrow"):
            place = axis_of(node, len(before)) or 0
            return indexed(held, (*[WHOLE] * place, entry_of(node)), before, after)
        axis = axis_of(node, len(before))
        if name in _RUNNING and axis == held.axis:
            return replace(held, blurred=True)
        if name in _GATHERS and axis is not None and axis == held.axis and held.is_sequence:
            if after[axis] == 1:
                return replace(held.taken(held.steps[-1:], axis), picked=True)
            return held.taken(tuple(range(after[axis])), axis)
        elementwise = len(node.args) > 1 and isinstance(node.args[1], fx.Node)
        if name in _POOLS and not elementwise:
            return reduced(held, axes_of(node), before, after)
        return None

    def _along_time(self, source: Any) -> bool:
        held = self._held.get(source) if isinstance(source, fx.Node) else None
        return held is not None and held.is_sequence and held.axis == len(self._shape(source)) - 1

    def _mixed(self, node: fx.Node, name: str, inputs: list[fx.Node]) -> Held:
        """A product sums over steps, unless it is one with weights along the features."""
        (source, *others), after = inputs, self._shape(node)
        held, before = self._held[source], self._shape(source)
        fixed = not others and all(is_fixed(n) for n in node.all_input_nodes if n is not source)
        contracted = len(before) - (1 if source in node.args[:1] else 2)
        kept = held.axis is not None and after[: held.axis + 1] == before[: held.axis + 1]
        if fixed and (contracted != held.axis if "matmul" in name else name == "einsum" and kept):
            return carried(held, before, after)
        return joined([self._held[n].mixed() for n in inputs])

    def _joined(self, node: fx.Node, name: str, inputs: list[fx.Node]) -> Held:
        """Stacked or put end to end: single steps side by side are a sequence again."""
        given = node.args[0] if node.args else node.kwargs.get("tensors")
        after = self._shape(node)
        parts = [self._held[n] for n in inputs]
        named = None if name in ("hstack", "vstack") else axis_of(node, len(after))
        axis = _JOINS[name] if named is None else named
        axis = min(axis, len(after) - 1)
        if name == "stack":
            parts = [replace(p, axis=p.axis + (axis <= p.axis)) if p.placed and p.axis is not None
                     else p for p in parts]  # fmt: skip
        elif any(p.axis == axis and p.is_sequence for p in parts):
            steps = tuple(s for p in parts for s in p.steps)
            return replace(next(p for p in parts if p.axis == axis), steps=steps, inner=1)
        several = len({s for p in parts for s in p.known}) > 1
        single = all(len(p.known) == 1 and not p.halves for p in parts)
        if not (several and single):
            return joined(parts)
        listed = given if isinstance(given, tuple | list) else ()
        steps = tuple(self._held[n].steps[0] if n in self._held else NOTHING
                      for n in listed if isinstance(n, fx.Node))  # fmt: skip
        if name == "stack" or after[axis] == len(steps):
            return Held(steps, axis)
        return Held(steps, 0, after[0] // len(steps)) if axis == 0 else joined(parts)

    def _written(self, node: fx.Node, inputs: list[fx.Node]) -> Held:
        """Behind an assignment to a part of a tensor: single steps fill an axis one by one."""
        target, index, value = node.args
        shape = self._shape(node)
        known = self._held.get(target) if isinstance(target, fx.Node) else None
        new = self._held.get(value) if isinstance(value, fx.Node) else None
        result = None if new is None else filled(known, new, index, shape)
        if result is None:
            return joined([carried(self._held[n], self._shape(n), shape) for n in inputs])
        return result


def place(node: fx.Node) -> tuple[Any, Any]:
    """What the same call of another step has in common: its name and file:line."""
    return node.meta.get("name"), node.meta.get("location")
