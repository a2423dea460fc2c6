"""How a hand-written cell uses its weights, read from one of its steps in the recorded graph.

Where the state enters each recurrent matrix, and which biases open the gates that keep and
write it: users order gates and lay out weights as they like, so nothing goes by position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from rnnguard.inspection.arguments import axis_of
from rnnguard.inspection.chains import PLUMBING
from rnnguard.inspection.loops import Loop

_TURNS = {"t", "T", "mT", "transpose"}
_STATE_FIRST = {"matmul", "__matmul__", "mm"}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
_DIFFERENCES = {"sub", "__sub__", "rsub", "__rsub__"}
_SIGMOIDS = {"sigmoid", "sigmoid_", "hardsigmoid"}
_AROUND_FEATURES = {"select", "squeeze", "transpose"}
_PARTS = {"chunk", "split", "tensor_split", "unbind"}


@dataclass(frozen=True)
class Entry:
    """The places start..stop along `axis` of a matrix that multiply the state."""

    weight: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class GateBias:
    """The places start..stop of a bias inside a gate; a `sign` of -1 where it closes the gate."""

    bias: str
    start: int
    stop: int
    sign: int


@dataclass(frozen=True)
class Gate:
    """A gate that keeps a carried value: the biases added up in it, and in the one that writes."""

    keep: tuple[GateBias, ...]
    write: tuple[GateBias, ...]


@dataclass(frozen=True)
class Wiring:
    """Where the state enters the weights of a cell, and the gates that keep it."""

    entries: tuple[Entry, ...]
    gates: tuple[Gate, ...]


def wiring_of(loop: Loop) -> Wiring:
    """The wiring of one step in the middle of the loop; parts that are not understood are left out.

    A gate keeps if it multiplies a carried value and the product is only added to on its way to
    the next one; the gate that writes is in what is added there.
    """
    step = _Step(loop)
    found = (entry for node in step.nodes for entry in step.entries(node))
    entries = [entry for entry in found if entry.weight in loop.weights]
    gates = [gate for node in step.nodes if (gate := step.gate(node)).keep]
    return Wiring(tuple(dict.fromkeys(entries)), tuple(dict.fromkeys(gates)))


class _Step:
    """The values of one step: what was carried in, what is made of it, what is carried on."""

    def __init__(self, loop: Loop) -> None:
        states = loop.carried.states
        middle = max(1, len(states) // 2)
        self.carried_in = set(states[middle - 1])
        self.carried_on = set(states[middle])
        self.nodes: list[fx.Node] = []
        first = min(node.meta["order"] for node in self.carried_in)
        last = max(node.meta["order"] for node in self.carried_on)
        self._known = set(self.carried_in)
        for node in next(iter(self.carried_in)).graph.nodes:
            order = node.meta["order"]
            if first < order <= last and not self._known.isdisjoint(node.all_input_nodes):
                self._known.add(node)
                self.nodes.append(node)

    def entries(self, node: fx.Node) -> Iterator[Entry]:
        """Where the state enters a matrix in this call."""
        name, args = _name(node), node.args
        if name == "linear":
            state, weight, axis = args[0], args[1], 1
        elif name in _STATE_FIRST:
            state, weight, axis = args[0], args[1], 0
        elif name == "addmm":
            state, weight, axis = args[1], args[2], 0
        else:
            return
        turned = 0
        while isinstance(weight, fx.Node) and _name(weight) in _TURNS:
            weight, turned = weight.args[0], turned + 1
        if not isinstance(weight, fx.Node) or not _is_trained_weight(weight):
            return
        if isinstance(state, fx.Node) and len(weight.meta["shape"]) == 2:
            for start, stop in self._spans(state):
                yield Entry(str(weight.target), (axis + turned) % 2, start, stop)

    def _spans(self, state: fx.Node) -> Iterator[tuple[int, int]]:
        """Which features of a call's input are the state: all, or those beside the input."""
        shape = state.meta["shape"]
        side_by_side = "cat" in _name(state) and axis_of(state, len(shape)) == len(shape) - 1
        if not side_by_side:
            if state in self._known and shape:
                yield 0, shape[-1]
            return
        start = 0
        for part in state.all_input_nodes:
            width = part.meta["shape"][-1]
            if part in self._known:
                yield start, start + width
            start += width

    def gate(self, node: fx.Node) -> Gate:
        """The gate of a product that keeps; without biases for all other calls."""
        keep = tuple(dict.fromkeys(self._keeping(node)))
        places = {(bias.bias, bias.start) for bias in keep}
        write = dict.fromkeys(self._writing(node) if keep else ())
        return Gate(keep, tuple(b for b in write if (b.bias, b.start) not in places))

    def _keeping(self, node: fx.Node) -> Iterator[GateBias]:
        """The biases of the gate that multiplies a carried value to carry it on."""
        if _name(node) == "lerp" and self._is_carried(node.args[0]):
            yield from (replace(b, sign=-b.sign) for b in _gate(node.args[2]))
            return
        if _name(node) not in _PRODUCTS or not self._is_only_added_to(node):
            return
        for state, gate in (node.args[:2], node.args[1::-1]):
            sign = self._part_of_state(state)
            if sign:
                yield from (replace(b, sign=sign * b.sign) for b in _gate(gate))

    def _part_of_state(self, value: Any) -> int:
        """1 for a carried value or what it is ahead of another one, -1 for what it is behind."""
        if self._is_carried(value):
            return 1
        if isinstance(value, fx.Node) and _name(value) in _DIFFERENCES:
            first, second = _minuend_first(value)
            return int(self._is_carried(first)) - int(self._is_carried(second))
        return 0

    def _is_carried(self, value: Any) -> bool:
        while isinstance(value, fx.Node):
            if value in self.carried_in:
                return True
            if _name(value) not in PLUMBING or len(value.all_input_nodes) != 1:
                return False
            (value,) = value.all_input_nodes
        return False

    def _is_only_added_to(self, node: fx.Node) -> bool:
        pending = [node]
        while pending:
            value = pending.pop()
            if value in self.carried_on:
                return True
            if value is node or _name(value) in _SUMS | PLUMBING:
                pending += [user for user in value.users if user in self._known]
        return False

    def _writing(self, kept: fx.Node) -> Iterator[GateBias]:
        """The biases of the gate of what is added to a kept value."""
        for total in kept.users:
            if _name(total) not in _SUMS:
                continue
            for other in total.all_input_nodes:
                if other is not kept and _name(other) in _PRODUCTS:
                    yield from (bias for factor in other.all_input_nodes for bias in _gate(factor))


def _name(node: fx.Node) -> str:
    return str(node.meta.get("name"))


def _is_trained_weight(node: fx.Node) -> bool:
    """Whether the node is a parameter that may change: neither a buffer nor frozen."""
    return _name(node) == "parameter" and bool(node.meta["trainable"])


def _minuend_first(node: fx.Node) -> tuple[Any, Any]:
    first, second = node.args[:2]
    return (second, first) if "rsub" in _name(node) else (first, second)


def _gate(node: Any) -> Iterator[GateBias]:
    """The biases behind a sigmoid, with the places of the gate among them."""
    if isinstance(node, fx.Node) and node.meta.get("shape"):
        yield from _behind(node, 0, node.meta["shape"][-1], 1, False)


def _behind(node: Any, start: int, stop: int, sign: int, opened: bool) -> Iterator[GateBias]:
    """Follows the features start..stop of a value back to the biases that are added to them."""
    if not isinstance(node, fx.Node):
        return
    name = _name(node)
    if name == "parameter" and opened:
        if len(node.meta["shape"]) == 1 and _is_trained_weight(node):
            yield GateBias(str(node.target), start, stop, sign)
    elif name in _SIGMOIDS:
        yield from _behind(node.args[0], start, stop, sign, True)
    elif name in _DIFFERENCES and not opened:
        first, second = _minuend_first(node)
        if first == 1:
            yield from _behind(second, start, stop, -sign, opened)
    elif name == "item" and _name(node.args[0]) in _PARTS:  # type: ignore[arg-type]
        source, offset = _part(node)
        if source is not None:
            yield from _behind(source, start + offset, stop + offset, sign, opened)
    elif name in _AROUND_FEATURES:
        (around,) = node.all_input_nodes
        if not _along_features(node, around):
            yield from _behind(around, start, stop, sign, opened)
    elif name == "__getitem__":
        begin = _offset(node)
        if begin is not None:
            yield from _behind(node.args[0], start + begin, stop + begin, sign, opened)
    elif opened:
        for part in _summands(node, name):
            yield from _behind(part, start, stop, sign, opened)


def _summands(node: fx.Node, name: str) -> list[Any]:
    """What is added up to a pre-activation."""
    if name in _SUMS:
        return list(node.args[:2])
    if name in ("linear", "layer_norm"):
        last = 2 if name == "linear" else 3
        return [node.kwargs.get("bias", node.args[last] if len(node.args) > last else None)]
    if name == "addmm":
        return [node.args[0]]
    return [node.args[0]] if name in ("contiguous", "clone", "to") else []


def _along_features(node: fx.Node, source: fx.Node) -> bool:
    """Whether a call works along its source's last axis; torch's default is the first."""
    rank = len(source.meta["shape"])
    axes = [a for a in node.args[1:3] if isinstance(a, int)] if _name(node) in _TURNS else []
    if axes:
        return rank - 1 in {axis % rank for axis in axes}
    return _name(node) in _TURNS or (axis_of(node, rank) or 0) == rank - 1


def _part(node: fx.Node) -> tuple[fx.Node | None, int]:
    """What a part was taken from, and where it begins among the features; 0 along other axes.

    An input projected for all steps at once is taken apart along time.
    """
    parts, position = node.args
    assert isinstance(parts, fx.Node) and isinstance(position, int)
    source = parts.args[0]
    assert isinstance(source, fx.Node)
    if not _along_features(parts, source):
        return source, 0
    if _name(parts) == "unbind":
        return None, 0
    earlier = [user for user in parts.users if user.meta.get("part", position) < position]
    return source, sum(user.meta["shape"][-1] for user in earlier)


def _offset(node: fx.Node) -> int | None:
    """Where the features begin that square brackets take; None where they do not take features."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    entries = index if isinstance(index, tuple) else (index,)
    plain = all(entry is ... or isinstance(entry, int | slice) for entry in entries)
    last, rank = entries[-1], len(source.meta["shape"])
    reaches = len(entries) == rank or ... in entries
    if plain and not reaches:
        return 0  # of other axes, such as one step of an input projected for all at once
    if plain and isinstance(last, slice) and last.step is None:
        start = last.start or 0
        return start % source.meta["shape"][-1] if isinstance(start, int) else None
    return None
