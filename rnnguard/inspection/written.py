"""The recurrences that users spell out themselves, as sites beside those of torch's modules."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod

from torch import fx, nn

from rnnguard.inspection.arguments import is_cell
from rnnguard.inspection.dataflow import is_normalized_behind
from rnnguard.inspection.loops import Loop
from rnnguard.inspection.pathways import is_bypassed
from rnnguard.inspection.readout import picks_own_ends, readout_of, source_of_loop
from rnnguard.inspection.walk import Walk
from rnnguard.inspection.wiring import Wiring, wiring_of
from rnnguard.measurements import Site


@dataclass(frozen=True)
class WrittenSite:
    """A hand-written recurrence: its record, its loop in the graph, and the module it stands in."""

    record: Site
    module: nn.Module
    loop: Loop
    wiring: Wiring


def written_sites(
    model: nn.Module, loops: Sequence[Loop], native: Collection[fx.Node]
) -> list[WrittenSite]:
    """The loops through time that are not made of `native` calls, with a path for each."""
    found = [loop for loop in loops if _is_written(loop, native)]
    paths = _apart([_owner(model, loop) for loop in found], found)
    return [_site(model, loop, path) for loop, path in zip(found, paths, strict=True)]


def _is_written(loop: Loop, native: Collection[fx.Node]) -> bool:
    """Whether a recurrence over time is no site yet; torch's kernels may be called directly."""
    known = any(call in native for call in loop.native)
    return loop.kind == "time" and not known and len(loop.carried.states) > 1


def rounds(loops: Sequence[Loop]) -> list[Loop]:
    """The loops that are no recurrence over time: solver iterations, graph rounds, trees.

    A native module that runs over a sequence in each of its rounds has a time of its own.
    """
    return [loop for loop in loops if loop.kind != "time" and all(map(is_cell, loop.native))]


def _owner(model: nn.Module, loop: Loop) -> str:
    """The path of the user's module that holds all of the recurrent weights, or runs the loop."""
    owners = [name.split(".")[:-1] for name in loop.weights]
    owners = owners or [str(loop.uses[0].meta.get("module") or "").split(".")]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))
    common = [parts[0] for parts in shared]
    while common and _is_torchs(model, ".".join(common)):
        common.pop()
    return ".".join(common)


def _is_torchs(model: nn.Module, path: str) -> bool:
    """Whether a layer or container of torch's stands there, which is only a part of a cell."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return True
    return type(module).__module__.startswith("torch.nn")


def _apart(paths: list[str], loops: list[Loop]) -> list[str]:
    """Different paths for different recurrences: where one module has several, by the weight."""
    count = Counter(paths)
    return [
        path if count[path] == 1 else _own_path(path, loop)
        for path, loop in zip(paths, loops, strict=True)
    ]


def _own_path(path: str, loop: Loop) -> str:
    """A path that no other recurrence of the same module has."""
    if loop.weights:
        return loop.weights[0].removesuffix(".weight")
    line = str(loop.location).rpartition(":")[2]
    return f"{path}.line{line}".removeprefix(".")


def _site(model: nn.Module, loop: Loop, path: str) -> WrittenSite:
    module = model.get_submodule(_owner(model, loop))
    states = loop.carried.states[-1]
    sizes = [tuple(node.meta["shape"]) for node in states]
    batch = sizes[0][0] if sizes[0] else 1
    width = sum(prod(size) // (batch if size and size[0] == batch else 1) for size in sizes)
    walk = Walk(source_of_loop(loop))
    readout = readout_of(walk)
    inside = {node for carried in loop.carried.states for node in carried}
    record = Site(
        path=path,
        module=type(module).__name__,
        cell="custom",
        form="written",
        input_size=0,
        hidden_size=width,
        layers=1,
        bidirectional=False,
        batch_first=False,
        proj_size=0,
        bias=True,
        dropout=0.0,
        steps=loop.steps,
        batch=batch,
        window=loop.steps,
        calls=1,
        packed=False,
        readout=readout,
        normalized=is_normalized_behind(list(states)),
        residual=False,
        location=relative(loop.location),
        weights=loop.weights,
        bypass=loop.carried.reads_own_past
        or is_bypassed(loop.uses[0].graph, inside, loop.steps, readout),
        picked=picks_own_ends(walk),
    )
    return WrittenSite(record, module, loop, wiring_of(loop))


def relative(location: str | None) -> str | None:
    """file:line below the working folder as a relative path, so that reports compare."""
    here = os.getcwd() + os.sep
    return location.removeprefix(here) if location else None
