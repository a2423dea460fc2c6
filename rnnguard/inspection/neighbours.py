"""Which other values of a model speak for one of its recurrences having been trained or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from rnnguard.inspection.wiring import Wiring

Named = tuple[str, Tensor]
Span = tuple[str, int, int, int]


def layers_behind(model: nn.Module, path: str) -> list[nn.Module]:
    """The layers beside the recurrence that come after it and are as wide as its output.

    What was trained behind a recurrence had its gradient through it. Layers before it may well
    be pretrained while the recurrence is new, so they tell nothing.
    """
    if not path:
        return []
    parent = model.get_submodule(path.rpartition(".")[0])
    module = model.get_submodule(path)
    width = getattr(module, "proj_size", 0) or module.hidden_size
    width = int(width) * (2 if getattr(module, "bidirectional", False) else 1)  # type: ignore[arg-type]
    children = [child for child in parent.children() if child is not module]
    later = children[next(i for i, c in enumerate(parent.children()) if c is module) :]
    return [child for child in later if _width_of(child) == width]


def _width_of(module: nn.Module) -> int | None:
    weight = module._parameters.get("weight")
    return None if weight is None else int(weight.shape[-1])


@dataclass(frozen=True)
class Parts:
    """What speaks for a hand-written recurrence: weights, biases, and shapes of their matrices.

    The biases that gates take stand apart, since their owner may have set them on purpose.
    """

    weights: list[Named]
    biases: list[Named]
    gates: list[Named]
    shapes: list[tuple[int, ...]]


def parts_of(weights: Iterable[str], spans: Iterable[Span], named: Mapping[str, Tensor]) -> Parts:
    """The recurrent weights of a hand-written cell, and the biases of the layers they stand in.

    `spans` say where the state enters a matrix and which places of a bias a gate takes. These
    are parts of their own, since a remedy may have written just them.
    """
    spans = list(spans)
    names = [name for name in dict.fromkeys(weights) if name in named]
    owners = {_owner(name) for name in names}
    beside = [n for n, t in named.items() if t.dim() == 1 and _owner(n) in owners]
    gated = [name for name, *_ in spans if name in named and named[name].dim() == 1]
    found = Parts([], [], [], [])
    for name in names:
        found.weights.extend(part for part, _ in _split(name, named[name], spans))
    for name in dict.fromkeys([*beside, *gated]):
        for part, in_gate in _split(name, named[name], spans) if name not in names else ():
            (found.gates if in_gate else found.biases).append(part)
    owners |= {_owner(name) for name in gated}
    found.shapes.extend(
        tuple(t.shape) for n, t in named.items() if t.dim() == 2 and _owner(n) in owners
    )
    return found


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def spans_of(wiring: Wiring) -> list[Span]:
    """Every place in the weights and biases that the wiring of a cell names."""
    biases = [b for gate in wiring.gates for b in (*gate.keep, *gate.write)]
    return [
        *((e.weight, e.axis, e.start, e.stop) for e in wiring.entries),
        *((b.bias, 0, b.start, b.stop) for b in biases),
    ]


def _split(name: str, tensor: Tensor, spans: Iterable[Span]) -> list[tuple[Named, bool]]:
    """The tensor cut at the ends of its spans, which lie along one axis; whether a span has it."""
    own = [(axis, start, stop) for place, axis, start, stop in spans if place == name]
    if not own or tensor.dim() == 0:
        return [((name, tensor.detach()), False)]
    axis = own[0][0]
    edges = sorted({0, tensor.shape[axis]}.union(*(ends for _, *ends in own)))
    return [
        ((name, tensor.detach().narrow(axis, a, b - a)), any(x <= a and b <= y for _, x, y in own))
        for a, b in pairwise(edges)
    ]
