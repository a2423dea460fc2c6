"""Where the steps of a recurrence lie in a tensor, followed through views, indices and pools."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import fx

Shape = tuple[int, ...]
WHOLE = slice(None)
# The place of time where each step still has values of its own, but on no axis of their own.
ANYWHERE = -1
# Stands for a place that no step has filled.
NOTHING = -1
_WHOLE_OUTPUT: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Held:
    """What a tensor holds of a recurrence: its steps, in their order along the axis of time.

    Without an axis it holds a single step, or several mixed. Where time and samples share an
    axis, `inner` counts the places inside one step. `halves` are the features left of two
    directions taken apart; `blurred` steps have seen the others; `picked` ones were chosen by
    a tensor, as by the lengths.
    """

    steps: tuple[int, ...]
    axis: int | None = None
    inner: int = 1
    halves: frozenset[int] = _WHOLE_OUTPUT
    state: bool = False
    blurred: bool = False
    picked: bool = False

    @property
    def known(self) -> set[int]:
        return set(self.steps) - {NOTHING}

    @property
    def placed(self) -> bool:
        return self.axis is not None and self.axis != ANYWHERE

    @property
    def is_sequence(self) -> bool:
        return self.axis is not None and len(self.known) > 1

    def shares_its_axis(self, shape: Shape) -> bool:
        return self.axis is not None and shape[self.axis] != len(self.steps)

    def is_feature(self, axis: int, shape: Shape) -> bool:
        """Whether the axis is neither time nor the samples, which lie in front."""
        if self.placed and self.shares_its_axis(shape):
            return axis != self.axis
        if self.placed and len(shape) < 3:
            return axis != self.axis and axis == len(shape) - 1
        return axis not in (self.axis, 1 if self.axis == 0 else 0)

    def mixed(self) -> Held:
        """All steps in one value."""
        single = len(self.known) == 1
        halves = self.halves if single else _WHOLE_OUTPUT
        return Held(self.steps, halves=halves, state=self.state and single, blurred=self.blurred)

    def anywhere(self) -> Held:
        return replace(self, axis=ANYWHERE if self.is_sequence else None)

    def taken(self, steps: tuple[int, ...], axis: int | None) -> Held:
        """Some of the steps."""
        return replace(self, steps=steps, axis=axis, inner=1)

    def halved(self, start: int) -> Held:
        return replace(self, halves=self.halves or frozenset({start}))


def carried(held: Held, before: Shape, after: Shape) -> Held:
    """Behind a call that is known by its shapes alone."""
    axis = held.axis
    if axis is None or axis == ANYWHERE:
        return held
    if len(after) == len(before):
        if after[axis] == before[axis]:
            return held
        if 1 in (after[axis], before[axis]):
            return held.mixed()
        longer = held.shares_its_axis(before)
        return held.anywhere() if longer else replace(held, steps=tuple(range(after[axis])))
    if after[: axis + 1] == before[: axis + 1]:
        return held
    shifted = axis + len(after) - len(before)
    if len(after) > len(before) and after[shifted] == before[axis]:
        return replace(held, axis=shifted)
    return held.anywhere()


def viewed(held: Held, before: Shape, after: Shape) -> Held:
    """Behind a view: the axis of time is known by how many elements lie inside one step."""
    if not held.placed or held.axis is None or 0 in before or not held.steps:
        return held
    inside, size = held.inner * prod(before[held.axis + 1 :]), len(held.steps)
    shared = None
    for axis, length in enumerate(after):
        behind = prod(after[axis + 1 :])
        if behind == inside and length == size:
            return replace(held, axis=axis, inner=1)
        if inside % behind == 0 and behind * length % (inside * size) == 0 and length > 1:
            shared = axis, inside // behind
    # Flattened together with the features, or rows of unequal lengths: no axis is left.
    if shared is None or (len(after) > 1 and shared[0] == len(after) - 1):
        return held.anywhere()
    return replace(held, axis=shared[0], inner=shared[1])


def entries_of(index: Any, rank: int) -> list[Any]:
    """An index written out: one entry per axis, and a None for each new one."""
    entries = list(index) if isinstance(index, tuple) else [index]
    missing = rank - sum(entry is not None and entry is not ... for entry in entries)
    place = next((i for i, entry in enumerate(entries) if entry is ...), len(entries))
    entries[place : place + 1] = [WHOLE] * missing
    return entries


def indexed(held: Held, index: Any, before: Shape, after: Shape) -> Held:
    """Behind square brackets."""
    entries = entries_of(index, len(before))
    own = [entry for entry in entries if entry is not None]
    # An index that is no tensor, as a NumPy mask, is known by its type alone.
    masked = len(after) < len(before) and [type(e) for e in own if e != WHOLE] == [str]
    if masked or any(isinstance(e, fx.Node) and len(e.meta.get("shape", ())) > 1 for e in own):
        return held.anywhere() if held.axis is not None else held
    mixed = held.axis is None and len(held.known) > 1
    for axis, entry in enumerate(own):
        if not mixed and before[axis] > 1 and entry != WHOLE and held.is_feature(axis, before):
            held = held.halved(_start(entry, before[axis]))
    if not held.placed or held.axis is None:
        return held
    place = [i for i, entry in enumerate(entries) if entry is not None][held.axis]
    axis = sum(not isinstance(entry, int) for entry in entries[:place])
    chosen = own[held.axis]
    if chosen == WHOLE:
        return replace(held, axis=axis)
    if held.shares_its_axis(before):
        return held.anywhere()
    if isinstance(chosen, int):
        return held.taken((held.steps[chosen],), None)
    if isinstance(chosen, slice) and axis < len(after):
        return held.taken(_sliced(held.steps, chosen, after[axis]), axis)
    return _selected(held, chosen, own, axis, after)


def _selected(held: Held, chosen: Any, own: list[Any], axis: int, after: Shape) -> Held:
    """Behind an index tensor: one step per row when the rows are named too, or several steps."""
    others = [e for i, e in enumerate(own) if i != held.axis and not isinstance(e, slice | int)]
    alone = isinstance(chosen, fx.Node) and not chosen.meta.get("shape", ())
    if others or alone or axis >= len(after):
        return replace(held.taken(held.steps[-1:], None), picked=True)
    if isinstance(chosen, list) and all(isinstance(i, int) for i in chosen):
        return held.taken(tuple(held.steps[i] for i in chosen), axis)
    return held.taken(held.steps[-after[axis] :], axis)


def _sliced(steps: tuple[int, ...], part: slice, left: int) -> tuple[int, ...]:
    bounds = (part.start, part.stop, part.step)
    known = all(bound is None or isinstance(bound, int) for bound in bounds)
    return steps[part] if known else steps[-left:]


def _start(entry: Any, size: int) -> int:
    if isinstance(entry, slice):
        start = entry.start if isinstance(entry.start, int) else 0
        return start % size if size else 0
    return entry % size if isinstance(entry, int) and size else 0


def reduced(held: Held, dims: list[int], before: Shape, after: Shape) -> Held:
    """Behind a pool along some axes; without any, each step counts for itself, as in a loss."""
    if not dims:
        return held.anywhere() if held.axis is not None else held
    if not held.placed or held.axis is None:
        return held
    gone = {dim % max(1, len(before)) for dim in dims}
    if held.axis in gone:
        return held.mixed()
    before_time = sum(dim < held.axis for dim in gone)
    return replace(held, axis=held.axis - (before_time if len(after) < len(before) else 0))


def turned(held: Held, name: str, given: list[Any], before: Shape) -> Held:
    """Behind a permutation of the axes."""
    if not held.placed or held.axis is None:
        return held
    rank = len(before)
    order = list(range(rank))
    dims = [d for g in given for d in (g if isinstance(g, tuple | list) else [g])]
    places: list[int] = [d % rank for d in dims if isinstance(d, int)]
    if name == "permute":
        order = places
    elif name == "movedim":
        order.insert(places[1], order.pop(places[0]))
    elif name == "T":
        order.reverse()
    else:
        one, other = places or (rank - 2, rank - 1)
        order[one], order[other] = order[other], order[one]
    return replace(held, axis=order.index(held.axis))


def joined(parts: list[Held], scalar: bool = False) -> Held:
    """Several in one value: steps beside steps stay apart, single steps are mixed."""
    halves, state = _common_halves(parts), all(part.state for part in parts)
    sequences = [part for part in parts if part.is_sequence]
    if sequences:
        apart = len({part.axis for part in sequences}) > 1
        mixed = any(len(p.known) > 1 for p in parts if not p.is_sequence)
        blurred = mixed or apart or any(part.blurred for part in parts)
        loose = next((p for p in sequences if not p.placed), sequences[0])
        return replace(loose, halves=halves, blurred=blurred)
    steps = tuple(dict.fromkeys(step for part in parts for step in part.steps))
    axis = parts[0].axis if len({part.axis for part in parts}) == 1 else None
    blurred, picked = any(p.blurred for p in parts), any(p.picked for p in parts)
    held = Held(steps, axis, 1, halves, state, blurred, picked)
    if len(held.known) > 1:
        return replace(held, axis=ANYWHERE if scalar else None)
    return held


def _common_halves(parts: list[Held]) -> frozenset[int]:
    """The halves, unless one part is whole or all of them are halves of the same steps."""
    if not all(part.halves or part.state for part in parts):
        return _WHOLE_OUTPUT
    halves = frozenset[int]().union(*(part.halves for part in parts))
    same = len({part.steps for part in parts}) == 1 and all(len(p.halves) == 1 for p in parts)
    again = same and len(halves) > 1
    return _WHOLE_OUTPUT if again else halves


def filled(known: Held | None, new: Held, index: Any, shape: Shape) -> Held | None:
    """Behind a single step written to one place of an axis; None for any other assignment."""
    own = [entry for entry in entries_of(index, len(shape)) if entry is not None]
    places = [axis for axis, entry in enumerate(own) if isinstance(entry, int)]
    if new.is_sequence or len(new.known) != 1 or len(places) != 1 or len(own) != len(shape):
        return None
    (axis,) = places
    before = known.steps if known is not None and known.axis == axis else ()
    steps = list(before) if len(before) == shape[axis] else [NOTHING] * shape[axis]
    steps[own[axis]] = next(iter(new.known))
    return Held(tuple(steps), axis, halves=new.halves)
