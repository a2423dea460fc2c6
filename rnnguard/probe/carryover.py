"""Whether a state goes on from one call of the model to the next, and takes its graph along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn

from rnnguard.inspection.cuts import reached_by_gradient
from rnnguard.inspection.loops import find_loops
from rnnguard.inspection.own_code import own_functions, variables_of
from rnnguard.inspection.pathways import made_from
from rnnguard.inspection.recording import Recording, tensors_in
from rnnguard.inspection.sites import find_sites
from rnnguard.inspection.written import relative, written_sites
from rnnguard.probe.stillness import differ

MOST = 100  # things in one container; a longer one is data, and no state
DEEPEST = 4  # containers in containers


def held_by(step: object) -> list[Tensor]:
    """The tensors in variables outside of a user's step, and on the object that it belongs to."""
    owner: Any = getattr(step, "__self__", step)
    own = {} if isinstance(owner, nn.Module | FunctionType) else getattr(owner, "__dict__", {})
    return [tensor for held in (own, *variables_of(own_functions(step))) for tensor in _in(held)]


def _in(held: Any, depth: int = DEEPEST) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, tuple | list | dict) and len(held) <= MOST and depth:
        for each in held.values() if isinstance(held, dict) else held:
            yield from _in(each, depth - 1)


def kept_tensors(recording: Recording) -> list[Tensor]:
    """What the model or step still holds of a run and may read in the next one."""
    return [tensor for tensor in recording.kept.values() if tensor.is_floating_point()]


def place_of(recording: Recording, kept: Tensor) -> str | None:
    """The user's file:line of the call that made a kept tensor."""
    node = next(node for node, tensor in recording.kept.items() if tensor is kept)
    while node.meta.get("name") == "item":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return relative(node.meta.get("location"))


def carried_over(model: nn.Module, again: Recording) -> dict[str, list[fx.Node]]:
    """By path the sites that start from a kept tensor in a second run, and those tensors' nodes.

    `again` is recorded with the tensors that the first run left behind.
    """
    left = [node for node in again.graph.nodes if node.meta.get("name") == "kept"]
    reach = {node: made_from(node) for node in left}
    native = find_sites(model, again)
    known = {call for site in native for call in site.calls}
    starts: list[tuple[str, Iterable[fx.Node]]] = [(s.record.path, s.calls) for s in native]
    written = written_sites(model, find_loops(again.graph), known)
    starts += [(site.record.path, site.loop.uses) for site in written]
    found = {
        path: [node for node in left if not reach[node].isdisjoint(calls)] for path, calls in starts
    }
    return {path: nodes for path, nodes in found.items() if nodes}


def takes_graph_along(kept: fx.Node) -> bool:
    """Whether the result of the second run is differentiated through a kept tensor."""
    return any(node.op == "output" for node in reached_by_gradient([kept]))


def answers_differently(first: Recording, again: Recording) -> bool:
    """Whether the second of two runs on one batch, from the same random state, gave other values.

    Each is to be recorded right behind `reseed`.
    """
    pairs = zip(tensors_in(first.result), tensors_in(again.result), strict=False)
    return any(a.is_floating_point() and differ(a, b) for a, b in pairs)
