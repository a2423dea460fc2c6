"""Which part of a recurrence's output the rest of the model reads, from the recorded graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import fx

from rnnguard.inspection.arguments import is_bidirectional, is_cell, steps_of
from rnnguard.inspection.dataflow import state_path
from rnnguard.inspection.loops import Loop
from rnnguard.inspection.native import NativeCall
from rnnguard.inspection.timeaxis import Held
from rnnguard.inspection.walk import Source, Walk, place
from rnnguard.records import Readout


def readout_of(walk: Walk) -> Readout:
    """Which part of the recurrence's output the rest of the model reads.

    A mixture comes before a single step: the lag to the target is then not that to the end.
    """
    found = {kind for held in walk.results() if (kind := _kind(held, walk.total)) is not None}
    order: tuple[Readout, ...] = ("all_steps", "pooled", "last_step", "final_state")
    singles = [held for held in walk.results() if len(held.known) == 1 and not held.halves]
    for state in (True, False):
        if len({step for held in singles if held.state is state for step in held.known}) > 1:
            return "all_steps"
    return next((kind for kind in order if kind in found), "unknown")


def _kind(held: Held, total: int) -> Readout | None:
    """How a value reads the steps that it holds; `total` is how many steps there are."""
    several = len(held.known) > 1
    if not held.known:
        return None
    if held.axis is not None and (several or total == 1):
        return "all_steps"
    if (several or held.blurred) and not held.halves:
        return "pooled"
    return "final_state" if held.state or held.halves else "last_step"


def source_of_calls(calls: Sequence[NativeCall]) -> Source:
    """What the calls of a native recurrence give: outputs at their steps, and last states."""
    total = 0
    held: dict[fx.Node, Held] = {}
    for call in calls:
        steps = tuple(range(total, total + steps_of(call)))
        total += len(steps)
        output = Held(steps, 1 if call.batch_first else 0)
        state = Held(steps[-1:], state=True)
        held[call.node] = state if is_cell(call.node) else output
        for part in call.node.users:
            if part.meta.get("name") == "item":
                held[part] = held[call.node] if part.args[1] == 0 else state
    loop = set[fx.Node]().union(*(state_path(a, b) for a, b in pairwise(calls)))
    both_ways = is_bidirectional(calls[0].node)
    return Source(total, calls[0].order, held, {place(node) for node in loop}, both_ways)


def source_of_loop(loop: Loop) -> Source:
    """What a hand-written recurrence gives: the values that it carries, step by step."""
    held = {
        node: Held((step,), state=True)
        for step, states in enumerate(loop.carried.states)
        for node in states
    }
    start = min(node.meta["order"] for node in held)
    return Source(len(loop.carried.states), start, held, set(), False)


def picks_own_ends(walk: Walk) -> bool:
    """Whether the step that is read out is chosen sequence by sequence, as by its length."""
    return any(held.picked for held in walk.results())
