"""Recurrences in Python loops, whoever wrote them: found as coupled chains of weight uses.

What steps through time is told apart from solver iterations and graph rounds, which take no
new input at each step, and from trees, whose runs merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import fx

from rnnguard.inspection.carried import Carried, carried
from rnnguard.inspection.chains import (
    FEWEST,
    PLUMBING,
    SUMS,
    Chain,
    chains,
    thinned,
    weightless_chains,
)
from rnnguard.inspection.flow import Flow
from rnnguard.inspection.native import NATIVE

Kind = Literal["time", "iterations", "tree", "fixed"]
# Of the steps, this share must take something new, or be given out, to be steps of time.
MOST = 0.6
_GATHERS = {"stack", "hstack", "vstack", "cat", "concat", "concatenate", "output"}


@dataclass(frozen=True)
class Loop:
    """A recurrence in the graph: its kind, its weights, and what it carries from step to step.

    `native` are the calls of torch's own cells among its steps; `uses` has one node per step.
    A "fixed" one runs through time on weights that are not trained, as a reservoir does.
    """

    kind: Kind
    weights: tuple[str, ...]
    uses: tuple[fx.Node, ...]
    carried: Carried
    native: tuple[fx.Node, ...]

    @property
    def steps(self) -> int:
        return len(self.uses)

    @property
    def location(self) -> str | None:
        location: str | None = self.uses[0].meta.get("location")
        return location


def find_loops(graph: fx.Graph) -> list[Loop]:
    """Every recurrence in the order of its first step, those that are not time included."""
    flow = Flow(graph)
    values = _value_numbers(flow)
    weighted = [_per_input(flow, chain, values) for chain in chains(flow)]
    groups = [group for group in _coupled(weighted) if not _is_depth(flow, group)]
    found = [_loop(flow, group, values) for group in groups]
    timeless = [g[0] for g, loop in zip(groups, found, strict=True) if loop.kind != "time"]
    for group in _coupled(weightless_chains(flow, weighted)):
        if _is_depth(flow, group):
            continue
        loop = _loop(flow, group, values)
        if loop.kind == "time" and not any(_feeds(flow, chain, group[0]) for chain in timeless):
            found.append(loop)
    return sorted(found, key=lambda loop: flow.position(loop.uses[0]))


def _feeds(flow: Flow, chain: Chain, other: Chain) -> bool:
    """Whether values from the rounds of one chain go into each of another's."""
    inside = (i for i in range(other.uses[0], other.uses[-1]) if other.is_inside(i))
    return any(chain.behind[s] and not other.behind[s] for i in inside for s in flow.sources[i])


def _coupled(found: Sequence[Chain]) -> Iterator[list[Chain]]:
    """Groups the chains that depend on each other, as the gates of one cell do."""
    pending = list(found)
    while pending:
        group = [pending.pop(0)]
        for member in group:
            joined = [c for c in pending if _depend_on_each_other(member, c)]
            group += joined
            pending = [chain for chain in pending if chain not in joined]
        yield group


def _depend_on_each_other(one: Chain, other: Chain) -> bool:
    return one.behind[other.uses[-1]] > 0 and other.behind[one.uses[-1]] > 0


def _is_depth(flow: Flow, group: list[Chain]) -> bool:
    """Whether the steps are layers: each has a matrix of its own, or takes from one of its own."""
    return any(_of_layers(flow, chain) or _from_layers(flow, chain) for chain in group)


def _of_layers(flow: Flow, chain: Chain) -> bool:
    own = [uses for uses in flow.uses.values() if len(uses) < FEWEST]
    inside = {u for uses in own for u in uses if chain.behind[u] and chain.ahead[u]}
    return sum(map(flow.mixes, inside)) >= len(chain) - 1


def _from_layers(flow: Flow, chain: Chain) -> bool:
    found = [[flow.layers[s] for s in taken] for taken in _fresh(flow, chain)[1:]]
    met = [frozenset().union(*layers) for layers in found]
    return all(a and b and not a & b for a, b in pairwise(met))


def _loop(flow: Flow, group: list[Chain], values: list[int]) -> Loop:
    alone = [chain for chain in group if not chain.merges]
    in_time = [chain for chain in alone if _is_time(flow, chain, values)]
    kind: Kind = "time" if in_time else "iterations" if alone else "tree"
    # Inside a step a solver may use its weights many times; the step is where input comes in.
    members = in_time or alone or group
    longest = max(len(chain) for chain in members)
    anchor = min((c for c in members if len(c) == longest), key=lambda c: c.uses[0])
    weights = [chain.weight for chain in group if chain.weight]
    if kind == "time" and weights and not any(map(flow.is_trainable, weights)):
        kind = "fixed"
    scaling = [c.weight for c in group if c.weight and flow.multiplies(c.uses[-1], c.weight)]
    native = {use for c in group for use in c.uses if flow.name(use) in NATIVE}
    return Loop(
        kind,
        tuple(dict.fromkeys(scaling or weights)),
        tuple(flow.nodes[use] for use in anchor.uses),
        carried(flow, anchor),
        tuple(flow.nodes[use] for use in sorted(native)),
    )


def _is_time(flow: Flow, chain: Chain, values: list[int]) -> bool:
    enough = max(FEWEST - 1, MOST * (len(chain) - 1))
    taken = _taken(flow, chain, values)
    new = len(_news(taken))
    # A guess that is refined reads the same data anew each time, and each guess may be kept.
    again = any(now & before for before, now in pairwise(taken))
    return new >= enough or _gathered(flow, chain, kept=again) >= enough


def _news(taken: list[set[int]]) -> list[int]:
    """Behind which uses something is taken that was not taken before."""
    seen: set[int] = set()
    found = []
    for rank, now in enumerate(taken):
        if now - seen:
            found.append(rank)
        seen |= now
    return found


def _per_input(flow: Flow, chain: Chain, values: list[int]) -> Chain:
    """The chain by what it is given, where each step has several rounds on one input."""
    news = _news(_taken(flow, chain, values))
    gaps = {later - earlier for earlier, later in pairwise(news)}
    return thinned(flow, chain, gaps.pop()) if len(news) >= FEWEST and len(gaps) == 1 else chain


def _taken(flow: Flow, chain: Chain, values: list[int]) -> list[set[int]]:
    """What the chain takes from the data between each use and the next, as value numbers."""
    return [{values[s] for s in fresh} for fresh in _fresh(flow, chain)]


def _fresh(flow: Flow, chain: Chain) -> list[set[int]]:
    """The values from the data that the chain takes between each use and the next."""
    taken: list[set[int]] = [set() for _ in range(len(chain) + 1)]
    marked = set(chain.uses)
    for index, behind in enumerate(chain.behind):
        if behind and (chain.ahead[index] or index in marked):
            fresh = (s for s in flow.sources[index] if flow.from_data[s] and not chain.behind[s])
            taken[behind].update(fresh)
    return taken[:-1]


def _gathered(flow: Flow, chain: Chain, *, kept: bool) -> int:
    """How many steps give something to a sequence that the loop does not read itself.

    With `kept`, values that are only given out as they are do not count, nor guesses that are
    the guess before with something added.
    """
    written: set[int] = set()
    most = 0
    gathers = _GATHERS - {"output"} if kept else _GATHERS
    for index in range(chain.uses[0], len(flow.nodes)):
        if chain.ahead[index]:
            continue
        given = (s for s in flow.sources[index] if not (kept and _is_moved(flow, chain, s)))
        steps = {chain.behind[s] for s in given} - {0}
        name = flow.name(index)
        if name in ("__setitem__", "written"):
            written |= steps
        elif name in gathers and not _along_features(flow, index):
            most = max(most, len(steps))
    return max(most, len(written))


def _is_moved(flow: Flow, chain: Chain, index: int) -> bool:
    """Whether the value is that of the step before with something added."""
    while flow.name(index) in PLUMBING and len(flow.sources[index]) == 1:
        (index,) = flow.sources[index]
    now = chain.behind[index]
    return flow.name(index) in SUMS and any(0 < chain.behind[s] < now for s in flow.sources[index])


def _along_features(flow: Flow, index: int) -> bool:
    """Side by side in one vector, as rounds are, rather than one after the other."""
    node = flow.nodes[index]
    if "cat" not in flow.name(index):
        return False
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    rank = len(node.meta.get("shape", ()))
    return isinstance(dim, int) and rank > 1 and dim % rank == rank - 1


def _value_numbers(flow: Flow) -> list[int]:
    """Equal numbers for values that are computed alike from the same values."""
    known: dict[Any, int] = {}
    numbers: dict[fx.Node, int] = {}
    for index, node in enumerate(flow.nodes):
        key: Any = index
        if node.op == "call_function":
            key = (flow.name(index), _key(node.args, numbers), _key(node.kwargs, numbers))
        numbers[node] = known.setdefault(key, len(known))
    return [numbers[node] for node in flow.nodes]


def _key(argument: Any, numbers: dict[fx.Node, int]) -> Any:
    if isinstance(argument, fx.Node):
        return ("value", numbers[argument])
    if isinstance(argument, tuple | list):
        return tuple(_key(item, numbers) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _key(item, numbers)) for name, item in argument.items())
    if isinstance(argument, slice):
        return ("slice", *(_key(v, numbers) for v in (argument.start, argument.stop)))
    return repr(argument)
