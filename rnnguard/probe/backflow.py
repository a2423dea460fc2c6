"""How gradient flows back through a hand-written recurrence: vector-Jacobian products by autograd.

Between the values carried behind one step and those behind the step before lies a piece of the
model's own autograd graph, whatever Python made it; each product passes through that piece alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge, Node

Shape = tuple[int, ...]
_PROBED = 3  # steps over which rows must stay apart to count as sequences of their own


@dataclass(frozen=True)
class _Value:
    """A carried value: its place in the autograd graph (None: no gradient passes) and form."""

    edge: GradientEdge | None
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    @property
    def numbers(self) -> Shape:
        """The shape with the two parts of complex numbers counted apart."""
        return (*self.shape, 2) if self.dtype.is_complex else self.shape

    @classmethod
    def of(cls, node: fx.Node) -> _Value:
        meta = node.meta
        return cls(meta.get("edge"), tuple(meta["shape"]), meta["dtype"], meta["device"])


@dataclass(frozen=True)
class _Boundary:
    """What is carried behind one step, and along which axis of each value the sequences lie."""

    values: tuple[_Value, ...]
    axes: tuple[int | None, ...]

    @classmethod
    def of(cls, values: Sequence[_Value], rows: int) -> _Boundary:
        axes = [v.shape.index(rows) if rows > 1 and rows in v.shape else None for v in values]
        return cls(tuple(values), tuple(axes))

    @property
    def rests(self) -> list[Shape]:
        """The shape of each value in one sequence."""
        return [_without(v.numbers, a) for v, a in zip(self.values, self.axes, strict=True)]

    @property
    def width(self) -> int:
        return sum(map(prod, self.rests))

    def apart(self, g: Tensor) -> list[Tensor]:
        """(B, V, n) as one tensor (V, *shape) for each carried value."""
        parts, start = [], 0
        for value, axis, rest in zip(self.values, self.axes, self.rests, strict=True):
            piece = g[..., start : start + prod(rest)]
            start += prod(rest)
            part = piece.transpose(0, 1).reshape(g.shape[1], len(g), *rest)
            if axis is None:
                part = part[:, 0]
            else:
                part = _fitted(part, value.shape[axis]).movedim(1, axis + 1)
            whole = torch.view_as_complex(part.contiguous()) if value.dtype.is_complex else part
            parts.append(whole.to(value.dtype))
        return parts

    def together(self, parts: Sequence[Tensor | None], g: Tensor) -> Tensor:
        """One tensor (V, *shape) for each carried value, or None for nothing, as (B, V, n)."""
        rows, vectors = g.shape[:2]
        flat = []
        for part, axis, rest in zip(parts, self.axes, self.rests, strict=True):
            if part is None:
                flat.append(g.new_zeros(vectors, rows, prod(rest)))
                continue
            part = torch.view_as_real(part) if part.is_complex() else part
            apart = part[:, None] if axis is None else part.movedim(axis + 1, 1)
            flat.append(_fitted(apart, rows).reshape(vectors, rows, -1).to(g))
        return torch.cat(flat, -1).transpose(0, 1)


class Backflow:
    """The state gradients of a loop, from behind its last step back to behind its first.

    states: the values carried behind each step. `sequences` of them do not influence each
    other and carry `width` numbers each; `steps` is how many boundaries there are.
    """

    def __init__(self, states: Sequence[Sequence[fx.Node]]) -> None:
        self._states = states
        values = [[_Value.of(node) for node in found] for found in states]
        self._batched = True
        self._boundaries: list[_Boundary] = []
        self.sequences = 1
        for rows in _rows_of(values):
            self._boundaries = [_Boundary.of(v, r) for v, r in zip(values, rows, strict=True)]
            self.sequences = rows[-1]
            if self.sequences == 1 or self._stay_apart():
                break

    @property
    def steps(self) -> int:
        return len(self._boundaries)

    @property
    def width(self) -> int:
        return self._boundaries[-1].width

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device that gradients are kept in."""
        first = self._boundaries[-1].values[0]
        double = first.dtype in (torch.float64, torch.complex128)
        return torch.zeros(
            (), dtype=torch.float64 if double else torch.float32, device=first.device
        )

    @property
    def narrowest(self) -> int:
        """The fewest numbers that any step carries."""
        return min(boundary.width for boundary in self._boundaries)

    @cached_property
    def pieces(self) -> list[range]:
        """The steps, counted from 1, between two places where no gradient passes."""
        generator = torch.Generator().manual_seed(0)
        cuts = []
        for step in range(self.steps - 1, 0, -1):
            shape = (self.sequences, 1, self._boundaries[step].width)
            probe = torch.randn(shape, generator=generator, dtype=torch.float64)
            if not bool(self.pull(step, probe.to(self.like)).any()):
                cuts.append(step + 1)
        return [range(low, high) for low, high in pairwise((1, *sorted(cuts), self.steps + 1))]

    def within(self, piece: range) -> Backflow:
        """The same flow, within some of the steps."""
        return Backflow(self._states[piece.start - 1 : piece.stop - 1])

    def pull(self, step: int, g: Tensor) -> Tensor:
        """Gradients g (B, V, n) behind step + 1 as gradients (B, V, n') behind `step`."""
        earlier, later = self._boundaries[step - 1], self._boundaries[step]
        given = zip(later.values, later.apart(g), strict=True)
        ends = [(value.edge, part) for value, part in given if value.edge is not None]
        starts = [value.edge for value in earlier.values if value.edge is not None]
        if not ends or not starts:
            return g.new_zeros(*g.shape[:2], earlier.width)
        found = iter(self._products([e for e, _ in ends], starts, [p for _, p in ends]))
        pulled = [None if value.edge is None else next(found) for value in earlier.values]
        return earlier.together(pulled, g)

    def _products(
        self, ends: list[GradientEdge], starts: list[GradientEdge], g: list[Tensor]
    ) -> list[Tensor | None]:
        """For every start the gradients (V, *shape), or None where nothing depends on it."""
        if self._batched:
            try:
                return _gradients(ends, starts, g, batched=True)
            except RuntimeError:
                self._batched = False  # some calls in there know no batch of gradients
        each = [
            _gradients(ends, starts, [part[v] for part in g], batched=False)
            for v in range(len(g[0]))
        ]
        columns = zip(*each, strict=True)
        return [None if c[0] is None else torch.stack([t for t in c if t is not None])
                for c in columns]  # fmt: skip

    def _stay_apart(self) -> bool:
        """Whether the rows of the last steps' values do not influence each other.

        Any two rows differ in a digit of their binary numbers; rows with that digit are sent
        alone, then those without it.
        """
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(self.sequences, device="cpu")
        digits = [rows >> place & 1 for place in range((self.sequences - 1).bit_length())]
        sent = torch.stack([*digits, *(1 - digit for digit in digits)], 1)
        g = torch.randn(*sent.shape, self.width, generator=generator, device="cpu")
        g = (g * sent[..., None]).to(self.like)
        for step in range(self.steps - 1, max(0, self.steps - 1 - _PROBED), -1):
            g = self.pull(step, g)
        return not bool(g[sent.to(g.device) == 0].any())


def _rows_of(values: Sequence[Sequence[_Value]]) -> Iterator[list[int]]:
    """Guesses at how many sequences are carried behind each step, the last one being 1.

    A first value that shrinks or grows along one axis does so because sequences end or begin.
    """
    shapes = [found[0].shape for found in values]
    ranks = {len(shape) for shape in shapes}
    moving = [a for a in range(len(shapes[0])) if len({s[a] for s in shapes if len(s) > a}) > 1]
    if len(ranks) == 1 and len(moving) == 1:
        yield [shape[moving[0]] for shape in shapes]
    for size in dict.fromkeys(shapes[-1]):
        if size > 1 and all(size in value.shape for found in values for value in found):
            yield [size] * len(values)
    yield [1] * len(values)


def _without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _fitted(rows: Tensor, count: int) -> Tensor:
    """(V, rows, ...) with `count` rows: where sequences ended or began, rows are missing."""
    if rows.shape[1] >= count:
        return rows[:, :count]
    missing = rows.new_zeros(rows.shape[0], count - rows.shape[1], *rows.shape[2:])
    return torch.cat([rows, missing], 1)


def _gradients(
    ends: list[GradientEdge], starts: list[GradientEdge], g: list[Tensor], *, batched: bool
) -> list[Tensor | None]:
    """The gradients at the starts, as if none of them depended on another of them."""
    with warnings.catch_warnings(), ExitStack() as stopped:
        # Slow batching is told as a warning for every call.
        warnings.simplefilter("ignore", UserWarning)
        for node, outputs in _outputs_of(starts).items():
            stopped.callback(node.register_prehook(partial(_stop, outputs)).remove)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            ends, starts, g, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
    return list(found)


def _outputs_of(edges: list[GradientEdge]) -> dict[Node, set[int]]:
    """Which outputs of each autograd node the edges stand for."""
    found: dict[Node, set[int]] = {}
    for edge in edges:
        found.setdefault(edge.node, set()).add(edge.output_nr)
    return found


def _stop(outputs: set[int], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Ends the flow behind a carried value once its gradient has been taken."""
    return tuple(
        torch.zeros_like(g) if position in outputs and g is not None else g
        for position, g in enumerate(gradients)
    )
