"""Whether a state goes on from one call of the model to the next, and takes its graph along."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn

from rnnguard.inspection.loops import find_loops
from rnnguard.inspection.pathways import made_from
from rnnguard.inspection.recording import Recording, tensors_in
from rnnguard.inspection.sites import find_sites
from rnnguard.inspection.written import relative, written_sites
from rnnguard.probe.stillness import differ


def kept_tensors(recording: Recording) -> list[Tensor]:
    """What the model still holds of a run and may read in the next one."""
    return [tensor for tensor in recording.kept.values() if tensor.is_floating_point()]


def made_at(recording: Recording, kept: Tensor) -> str | None:
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


def answers_differently(first: Recording, again: Recording) -> bool:
    """Whether the second of two runs on one batch, from the same random state, gave other values.

    Each is to be recorded right behind `reseed`.
    """
    pairs = zip(tensors_in(first.result), tensors_in(again.result), strict=False)
    return any(a.is_floating_point() and differ(a, b) for a, b in pairs)
