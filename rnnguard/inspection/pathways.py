"""Ways around a recurrence and ends that are not real: what its own readings cannot tell."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx

from rnnguard.inspection.timeaxis import Held
from rnnguard.inspection.walk import Source, Walk
from rnnguard.records import Readout

FEWEST_PADDED = 2  # equal steps at an end that count as padding
RARE = 0.01  # of the real steps


def is_bypassed(graph: fx.Graph, within: Collection[fx.Node], steps: int, readout: Readout) -> bool:
    """Whether the model's output sees several steps of its input without the recurrence.

    `within` are the values of the recurrence itself. Where each step is read out by itself, a
    way around it passes one step on to itself and carries no memory.
    """
    if steps < FEWEST_PADDED or readout not in ("last_step", "final_state"):
        return False
    given = {n: held for n in graph.nodes if n.op == "placeholder" and (held := _steps(n, steps))}
    if not given:
        return False
    # What only tells which steps are real, such as a mask, carries nothing of them.
    masks = {n for n in graph.nodes if n.meta.get("dtype") is torch.bool}
    walk = Walk(Source(steps, 0, given, set(), False, frozenset(within) | masks))
    return any(len(held.known) > 1 for held in walk.results())


def _steps(node: fx.Node, steps: int) -> Held | None:
    """The input's steps along its second or first axis, whichever is as long."""
    shape = node.meta.get("shape", ())
    axes = [axis for axis in (1, 0) if len(shape) > axis and shape[axis] == steps]
    return Held(tuple(range(steps)), axes[0]) if axes else None


def results_of(calls: Iterable[fx.Node]) -> set[fx.Node]:
    """The calls with all that they give."""
    return {node for call in calls for node in (call, *call.users)
            if node is call or node.meta.get("name") == "item"}  # fmt: skip


def made_from(start: fx.Node) -> set[fx.Node]:
    """Everything that is computed from a value."""
    found, pending = {start}, [start]
    while pending:
        fresh = [user for user in pending.pop().users if user not in found]
        found.update(fresh)
        pending += fresh
    return found


def real_lengths(x: Tensor, lengths: Tensor) -> Tensor:
    """The lengths (B,) of sequences x (T, B, F) without the padding at their ends.

    Padding is a row that several sequences end in, for different numbers of steps, and that
    hardly occurs elsewhere, as the black of an image does.
    """
    if len(x) < FEWEST_PADDED or bool((lengths != len(x)).any()):
        return lengths
    same = (x == x[-1]).all(-1).flip(0).long().cumprod(0).sum(0)
    padded = same >= FEWEST_PADDED
    if int(padded.sum()) < FEWEST_PADDED or int(same.min()) == int(same.max()):
        return lengths
    ends = x[-1, padded]
    # A sequence may end in two equal steps of its own, so that not all have to agree.
    alike = (ends[:, None] == ends).all(-1).sum(1)
    if 2 * int(alike.max()) <= len(ends):
        return lengths
    end = ends[alike.argmax()]
    # Once known, a single step of it is padding, too.
    real = torch.where((x[-1] == end).all(-1), lengths - same, lengths).clamp_min(1)
    within = torch.arange(len(x), device=x.device)[:, None] < real
    elsewhere = (x == end).all(-1) & within
    return lengths if int(elsewhere.sum()) > RARE * int(real.sum()) else real
