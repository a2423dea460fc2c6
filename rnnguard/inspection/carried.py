"""What a loop carries from step to step: the values that live across each of its boundaries."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import fx

from rnnguard.inspection.chains import PLUMBING, Chain
from rnnguard.inspection.flow import Flow

LONGEST_DELAY = 8  # steps that a state may wait before it is read, as in a delayed connection
Role = tuple[Any, ...]


@dataclass(frozen=True)
class Carried:
    """The carried values behind each step, in order; `reads_own_past` when earlier ones stay.

    Values that pile up, as the history that a loop attends over, are left out.
    """

    states: tuple[tuple[fx.Node, ...], ...]
    reads_own_past: bool


def carried(flow: Flow, chain: Chain) -> Carried:
    """The values between step i and step i + 1, for i = 1 .. the number of steps."""
    alive = _alive(flow, chain)
    last = max(1, len(chain) - 2)  # behind it, not every value is read once more
    grows = last >= 4 and len(alive[last]) > len(alive[(last + 1) // 2])
    kept = {
        i: [x for x in found if not grows or _age(chain, x, i) < 2] for i, found in alive.items()
    }
    states = [_plain(flow, chain, kept[i], i) for i in range(1, last + 1)]
    pattern = [(_role(flow, chain, x, last), _age(chain, x, last)) for x in states[-1]]
    for i in range(last + 1, len(chain) + 1):
        found = [_again(flow, chain, role, i, age) for role, age in pattern]
        known = [x for x in found if x is not None]
        if not known or len(known) < len(found):
            break
        states.append(known)
    stable, swelling = _of_one_size(flow, states)
    nodes = tuple(tuple(flow.nodes[x] for x in found) for found in stable)
    return Carried(nodes, grows or swelling)


def _alive(flow: Flow, chain: Chain) -> dict[int, list[int]]:
    """Values made from the chain before a boundary that something recurrent reads behind it."""
    uses, marked = chain.uses, set(chain.uses)
    found: dict[int, list[int]] = {i: [] for i in range(1, len(uses))}
    for x in range(uses[0], uses[-1]):
        if not chain.behind[x]:
            continue
        readers = [r for r in flow.readers[x] if chain.ahead[r] or r in marked]
        if not readers:
            continue
        first, end = bisect_right(uses, x), bisect_right(uses, max(readers))
        for i in range(first, min(end, first + LONGEST_DELAY + 1)):
            found[i].append(x)
    return found


def _age(chain: Chain, x: int, boundary: int) -> int:
    return boundary - bisect_right(chain.uses, x)


def _plain(flow: Flow, chain: Chain, values: list[int], boundary: int) -> list[int]:
    """The values without what only rearranges them, such as the state beside the next input."""
    start = chain.uses[boundary - 1]
    found: dict[int, None] = {}
    pending = list(values)
    while pending:
        x = pending.pop(0)
        sources = [s for s in flow.sources[x] if chain.behind[s]]
        own = sources and all(s >= start for s in sources)
        # Before a cut it is still known how gradient gets there.
        seen_through = _is_plumbing(flow, x) or _cuts(flow, x, sources)
        if own and seen_through and x != start:
            pending += sources
        else:
            found[x] = None
    return sorted(found)


def _is_plumbing(flow: Flow, x: int) -> bool:
    """Whether the value is another one in a new form; one of several results only with them."""
    name = flow.name(x)
    return name in PLUMBING and (name != "item" or _is_plumbing(flow, flow.sources[x][0]))


def _cuts(flow: Flow, x: int, sources: list[int]) -> bool:
    """Whether gradient reaches what the value is made of, but not the value."""
    return "edge" not in flow.nodes[x].meta and any("edge" in flow.nodes[s].meta for s in sources)


def _role(flow: Flow, chain: Chain, x: int, boundary: int) -> Role:
    """What tells the same value of another step: its call, its place, and which one of them."""
    step = boundary - _age(chain, x, boundary)
    key = _call(flow, x)
    earlier = sum(_call(flow, other) == key for other in range(chain.uses[step - 1], x))
    return (*key, earlier)


def _call(flow: Flow, x: int) -> Role:
    return (*flow.place(x), flow.nodes[x].meta.get("part"))


def _again(flow: Flow, chain: Chain, role: Role, boundary: int, age: int) -> int | None:
    """The value of that role and age at a boundary; what was old already may be older there."""
    *key, wanted = role
    ends = [*chain.uses, len(flow.nodes)]
    farthest = max(0, boundary - LONGEST_DELAY - 1) if age else boundary - 1
    for step in range(boundary - age, farthest, -1):
        seen: Counter[Role] = Counter()
        for x in range(ends[step - 1], ends[step]):
            call = _call(flow, x)
            if call == tuple(key):
                if seen[call] == wanted:
                    return x if chain.behind[x] else None
                seen[call] += 1
    return None


def _of_one_size(flow: Flow, states: list[list[int]]) -> tuple[list[list[int]], bool]:
    """The states without tensors that grow from step to step, and whether there were any."""
    if len(states) < 4:
        return states, False

    def sizes(found: list[int]) -> Counter[Any]:
        return Counter(flow.nodes[x].meta.get("shape") for x in found)

    steady = sizes(states[len(states) // 2]) & sizes(states[-1])
    swelling = sum(steady.values()) < len(states[-1])
    if not swelling or not steady:
        return states, False
    return [[x for x in s if flow.nodes[x].meta.get("shape") in steady] for s in states], True
