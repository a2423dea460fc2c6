"""The readings as a space of finitely many pieces, in which each row of a table is a box.

Every bound that any row draws cuts its reading's axis, so that within a piece all rows judge
alike. A box is one bit mask per axis; to cut, to meet and to cover are then exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from rnnguard.decision.conditions import Interval, OneOf
from rnnguard.decision.domains import IMPOSSIBLE, NOT_TAKEN, TAKEN, Domain, States, domain_of

# A part of an axis: a label, a range of numbers without a bound inside, or NOT_TAKEN.
Piece = Interval | str | bool
Cells = Mapping[str, Interval | OneOf]
Box = tuple[int, ...]


class Axis:
    """One reading's values, cut where any of the given cells draws a bound."""

    def __init__(self, name: str, domain: Domain, drawn: Iterable[States]) -> None:
        self.name, self.domain = name, domain
        self.pieces: tuple[Piece, ...] = (
            _ranges(domain, [cell for cell in drawn if isinstance(cell, Interval)])
            if domain.labels is None
            else domain.labels
        )
        if domain.optional:
            self.pieces = (*self.pieces, NOT_TAKEN)
        self.full = (1 << len(self.pieces)) - 1

    def mask(self, states: States) -> int:
        """The pieces that a cell accepts, or those that are taken or not."""
        return sum(1 << at for at, piece in enumerate(self.pieces) if self._within(piece, states))

    def words(self, mask: int) -> str:
        """The pieces of the mask as people read them: `memory_needed 11..20 or not taken`."""
        held = [piece for at, piece in enumerate(self.pieces) if mask >> at & 1]
        if self.domain.labels is not None:
            return f"{self.name} = {' or '.join(map(str, held))}"
        numbers = [piece for piece in held if isinstance(piece, Interval)]
        said = [_range_words(run) for run in _runs(numbers, self.domain.whole)]
        said += [NOT_TAKEN] if NOT_TAKEN in held else []
        return f"{self.name} {' or '.join(said)}"

    def value(self, mask: int) -> float | str | bool | None:
        """One value within the mask; None is a reading that was not taken."""
        piece = next(piece for at, piece in enumerate(self.pieces) if mask >> at & 1)
        if piece == NOT_TAKEN:
            return None
        return _inside(piece) if isinstance(piece, Interval) else piece

    def _within(self, piece: Piece, states: States) -> bool:
        if piece == NOT_TAKEN:
            return states == NOT_TAKEN
        if states in (TAKEN, NOT_TAKEN):
            return states == TAKEN
        assert isinstance(states, Interval | OneOf)
        return states.holds(_inside(piece) if isinstance(piece, Interval) else piece)


class Space:
    """All readings that the given rows name, with what is known to be impossible among them."""

    def __init__(self, rows: Sequence[Cells]) -> None:
        named = {name for cells in rows for name in cells}
        known = [fact for fact in IMPOSSIBLE if named & fact.keys()]
        stated: list[Mapping[str, States]] = [*rows, *known]
        names = sorted({name for cells in stated for name in cells})
        self.axes = tuple(
            Axis(
                name,
                domain_of(name),
                [c for s in stated if not isinstance(c := s.get(name), str | None)],
            )
            for name in names
        )
        self.full: Box = tuple(axis.full for axis in self.axes)
        self.impossible = [self.box(fact) for fact in known]

    def box(self, cells: Mapping[str, States]) -> Box:
        return tuple(
            axis.mask(cells[axis.name]) if axis.name in cells else axis.full for axis in self.axes
        )

    def left_of(self, box: Box, covers: Sequence[Box]) -> Box | None:
        """A part of the box that none of the covers holds; None where they hold all of it."""
        if not all(box):
            return None
        for at, cover in enumerate(covers):
            if meet(box, cover) is not None:
                parts = (self.left_of(part, covers[at + 1 :]) for part in _outside(box, cover))
                return next((part for part in parts if part is not None), None)
        return box

    def widened(self, box: Box, within: Box, avoiding: Sequence[Box]) -> Box:
        """The box made as wide as it can be, so that as few cells as possible describe it.

        What is impossible is taken in only where that frees a whole axis.
        """
        wide = list(box)

        def widen(at: int, more: int, avoided: Sequence[Box]) -> None:
            tried = (*wide[:at], wide[at] | more, *wide[at + 1 :])
            if all(meet(tried, other) is None for other in avoided):
                wide[at] |= more

        for at, allowed in enumerate(within):
            for bit in range(allowed.bit_length()):
                widen(at, allowed & 1 << bit, [*avoiding, *self.impossible])
        for at, allowed in enumerate(within):
            widen(at, allowed, avoiding)
        return tuple(wide)

    def words(self, box: Box) -> str:
        pairs = zip(self.axes, box, strict=True)
        said = [axis.words(mask) for axis, mask in pairs if mask != axis.full]
        return ", ".join(said) or "everything"

    def point(self, box: Box) -> dict[str, float | str | bool | None]:
        """Readings that lie in the box."""
        return {a.name: a.value(mask) for a, mask in zip(self.axes, box, strict=True)}


def meet(one: Box, other: Box) -> Box | None:
    """What lies in both; None where nothing does."""
    both = tuple(a & b for a, b in zip(one, other, strict=True))
    return both if all(both) else None


def _outside(box: Box, cover: Box) -> Iterable[Box]:
    """The box without the cover, in boxes of their own."""
    for at, (held, covered) in enumerate(zip(box, cover, strict=True)):
        if held & ~covered:
            yield (*box[:at], held & ~covered, *box[at + 1 :])
        box = (*box[:at], held & covered, *box[at + 1 :])


def _ranges(domain: Domain, cells: list[Interval]) -> tuple[Interval, ...]:
    """The domain cut at every bound: points, and what lies between them."""
    drawn = {bound for cell in cells for bound in (cell.low, cell.high)}
    ends = {domain.low, domain.high}
    bounds = sorted({bound for bound in drawn if domain.low <= bound <= domain.high} | ends)
    pieces = [Interval(low=bound, high=bound) for bound in bounds if math.isfinite(bound)]
    for low, high in pairwise(bounds):
        pieces.append(Interval(low=low, high=high, low_open=True, high_open=True))
    if domain.whole:
        closed = [_whole(piece) for piece in pieces]
        pieces = [piece for piece in closed if piece.low <= piece.high]
    return tuple(sorted(pieces, key=lambda piece: (piece.low, piece.high)))


def _whole(piece: Interval) -> Interval:
    """The whole numbers of a piece, from the first to the last."""
    if not piece.low_open:
        return Interval(low=math.ceil(piece.low), high=math.floor(piece.high))
    last = math.ceil(piece.high) - 1 if math.isfinite(piece.high) else piece.high
    return Interval(low=math.floor(piece.low) + 1, high=last)


def _inside(piece: Interval) -> float:
    """A number of the piece."""
    if not piece.low_open:
        return piece.low
    if not math.isfinite(piece.low):
        return piece.high - 1 if math.isfinite(piece.high) else 0.0
    return (piece.low + piece.high) / 2 if math.isfinite(piece.high) else piece.low + 1


def _runs(pieces: list[Interval], whole: bool) -> list[Interval]:
    """Neighbouring pieces put together."""
    runs: list[Interval] = []
    for piece in pieces:
        if runs and _adjoin(runs[-1], piece, whole):
            ends = {"high": piece.high, "high_open": piece.high_open}
            runs[-1] = runs[-1].model_copy(update=ends)
        else:
            runs.append(piece)
    return runs


def _adjoin(one: Interval, other: Interval, whole: bool) -> bool:
    if whole:
        return one.high + 1 == other.low
    return one.high == other.low and one.high_open != other.low_open


def _range_words(run: Interval) -> str:
    if run.low_open and run.high_open and math.isinf(run.low) and math.isinf(run.high):
        return "taken"
    if math.isfinite(run.low) and math.isfinite(run.high) and (run.low_open or run.high_open):
        above = f"{'>' if run.low_open else '>='} {run.low:g}"
        return f"{above} and {'<' if run.high_open else '<='} {run.high:g}"
    return str(run)
