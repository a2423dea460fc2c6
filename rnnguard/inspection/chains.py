"""Chains of dependent uses of one weight, found in the recorded graph.

A weight whose every use depends on the use before is recurrent, and its use points in order
are the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rnnguard.inspection.flow import Flow

FEWEST = 3  # dependent uses that make a chain
NONE = -1
# What puts a state into another form and does nothing to it.
PLUMBING = {
    *("cat", "concat", "concatenate", "stack", "hstack", "chunk", "split", "unbind", "item"),
    *("__getitem__", "select", "narrow", "view", "reshape", "flatten", "squeeze", "unsqueeze"),
    *("transpose", "permute", "t", "T", "mT", "contiguous", "clone", "to", "float", "expand"),
    *("dropout", "expand_as", "repeat", "type_as", "view_as", "unflatten", "written"),
}
SUMS = {
    *("add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "__rsub__", "sub_"),
    *("__isub__", "rsub"),
}
# What adds to a state, or keeps the larger of two.
ADDITIVE = SUMS | {
    *("maximum", "minimum", "max", "min", "logaddexp", "__setitem__"),
    *("copy_", "index_copy_", "index_copy", "scatter", "scatter_", "index_put_", "where"),
    *("topk", "sort", "gather", "index_select", "take_along_dim", "amax", "amin", "masked_fill"),
}

SCALINGS = {
    *("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply", "div", "__truediv__", "prod"),
}


@dataclass(frozen=True)
class Chain:
    """The longest run of dependent uses of a weight, in order.

    `behind[i]` counts the uses that the value i depends on (the rank of the latest one), and
    `ahead[i]` is the rank of the last use that depends on it; 0 for none.
    """

    weight: str
    uses: tuple[int, ...]
    behind: tuple[int, ...]
    ahead: tuple[int, ...]
    merges: bool

    def __len__(self) -> int:
        return len(self.uses)

    def is_inside(self, index: int) -> bool:
        """Whether the value lies on the way from one use to another."""
        return self.behind[index] > 0 and (self.ahead[index] > 0 or index == self.uses[-1])


def thinned(flow: Flow, chain: Chain, period: int) -> Chain:
    """The chain with one in `period` of its uses."""
    spine = chain.uses[::period]
    behind, ahead = _behind(flow, spine), _ahead(flow, spine)
    return Chain(chain.weight, spine, tuple(behind), tuple(ahead), chain.merges)


def chains(flow: Flow) -> list[Chain]:
    """The chain of every weight that has one of at least FEWEST uses."""
    found = (_chain(flow, weight, uses) for (weight, _), uses in flow.uses.items())
    return [chain for chain in found if chain is not None]


def weightless_chains(flow: Flow, known: Sequence[Chain]) -> list[Chain]:
    """Chains of one call at one place that scales a state by what the data say, as a scan does.

    No weight acts inside them; sums that only add up, as losses do, are none, nor are products.
    """
    places: dict[tuple[object, ...], list[int]] = {}
    for index, node in enumerate(flow.nodes):
        if "edge" in node.meta and node.op == "call_function":
            places.setdefault(flow.place(index), []).append(index)
    inside = {flow.place(i) for c in known for i in range(c.uses[0], c.uses[-1]) if c.is_inside(i)}
    free = (calls for place, calls in places.items() if place not in inside)
    found = (_chain(flow, "", calls) for calls in free)
    return [chain for chain in found if chain is not None and _scales(flow, chain)]


def _scales(flow: Flow, chain: Chain) -> bool:
    inside = [i for i in range(chain.uses[0], chain.uses[-1] + 1) if chain.is_inside(i)]
    # What a first state starts from may be a weight.
    later = (i for i in inside if chain.behind[i] > 1)
    weighted = any(flow.weights[s] is not None for i in later for s in flow.sources[i])
    names = {flow.name(i) for i in inside} - PLUMBING
    # A state is scaled and added to; what is only multiplied is a running product.
    return not weighted and not names <= ADDITIVE and not names <= SCALINGS


def _chain(flow: Flow, weight: str, uses: list[int]) -> Chain | None:
    if len(uses) < FEWEST:
        return None
    spine = _once_a_step(flow, _longest(flow, uses))
    if len(spine) < FEWEST:
        return None
    behind, ahead = _behind(flow, spine), _ahead(flow, spine)
    merges = len(spine) < len(uses) and _merges(flow, uses, spine, behind, ahead)
    return Chain(weight, tuple(spine), tuple(behind), tuple(ahead), merges)


def _longest(flow: Flow, uses: list[int]) -> list[int]:
    """The uses along the longest path; only real numbers carry a state from use to use."""
    marked, depth, before = set(uses), {NONE: 0}, {}
    latest = [NONE] * len(flow.nodes)
    for index in range(uses[0], len(flow.nodes)):
        if not flow.real[index]:
            continue
        seen = (latest[source] for source in flow.sources[index])
        top = max(seen, key=lambda use: depth[use], default=NONE)
        if index in marked:
            before[index], depth[index] = top, depth[top] + 1
            top = index
        latest[index] = top
    use = max(uses, key=lambda use: (depth.get(use, 0), -use))
    spine = []
    while use != NONE:
        spine.append(use)
        use = before.get(use, NONE)
    return spine[::-1]


def _once_a_step(flow: Flow, spine: list[int]) -> list[int]:
    """The spine without the further uses of a step that has several in turn, as W and its turn."""
    calls = [flow.place(use) for use in spine]
    for period in range(2, len(spine) // FEWEST + 1):
        # Behind the loop the last state may meet the weight once more.
        alike = all(a == b for a, b in zip(calls, calls[period:-1], strict=False))
        if alike and len(set(calls[:period])) == period:
            return spine[::period]
    return spine


def _behind(flow: Flow, spine: Sequence[int]) -> list[int]:
    rank = {use: position + 1 for position, use in enumerate(spine)}
    found = [0] * len(flow.nodes)
    for index in range(spine[0], len(flow.nodes)):
        if flow.real[index]:
            upstream = max((found[source] for source in flow.sources[index]), default=0)
            found[index] = rank.get(index, upstream)
    return found


def _ahead(flow: Flow, spine: Sequence[int]) -> list[int]:
    rank = {use: position + 1 for position, use in enumerate(spine)}
    found = [0] * len(flow.nodes)
    for index in range(spine[-1], -1, -1):
        if flow.real[index]:
            readers = flow.readers[index]
            found[index] = max((max(found[r], rank.get(r, 0)) for r in readers), default=0)
    return found


def _merges(
    flow: Flow, uses: list[int], spine: list[int], behind: list[int], ahead: list[int]
) -> bool:
    """Whether other runs of the weight flow into the longest one, as in a tree or a grid."""
    others = [use for use in uses if use not in set(spine) and ahead[use] > 0]
    apart = [use for use in others if behind[use] == 0]
    if len(apart) > 1 and len(_longest(flow, apart)) > 1:
        return True
    first = _first_ahead(flow, spine)
    return any(first[use] > behind[use] + 2 for use in others if behind[use] > 0)


def _first_ahead(flow: Flow, spine: list[int]) -> list[int]:
    """The rank of the first use of the chain that depends on a value; 0 for none."""
    rank = {use: position + 1 for position, use in enumerate(spine)}
    found = [0] * len(flow.nodes)
    for index in range(spine[-1], -1, -1):
        if flow.real[index]:
            readers = flow.readers[index]
            ranks = [rank.get(r, found[r]) for r in readers if rank.get(r, found[r]) > 0]
            found[index] = min(ranks, default=0)
    return found
