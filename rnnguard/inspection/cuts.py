"""Whether the gradient of the result reaches a recurrence whose values the result is made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import fx, nn

from rnnguard.inspection.dataflow import BLANKS
from rnnguard.inspection.pathways import results_of
from rnnguard.inspection.recording import Recording
from rnnguard.inspection.sites import FoundSite
from rnnguard.inspection.written import WrittenSite, relative

# A sample drawn from a distribution has no gradient by nature.
_DRAWS = {
    *("normal", "normal_", "bernoulli", "bernoulli_", "poisson", "binomial", "multinomial"),
    *("_standard_gamma", "_sample_dirichlet", "exponential_", "uniform_", "cauchy_", "geometric_"),
    *("log_normal_", "random_"),
}
_OTHERS = BLANKS | _DRAWS | {"new_tensor"}
# Only the first argument's values go through; of the other it is the shape or the type.
_LIKE = {"expand_as", "view_as", "reshape_as", "type_as", "to"}
UNKNOWN = "unknown place"


def cut_at(
    recording: Recording,
    site: FoundSite | WrittenSite,
    model: nn.Module,
    held: Collection[int] | None = None,
) -> str | None:
    """The user's file:line that cuts a site off from the gradient; None where nothing does.

    Cut off is a site whose values the run's result is made of, while each of their ways there
    is cut by a detach, `.data` or no_grad. `held` are the ids of the parameters that an optimizer
    holds: a site of which nothing is trained, frozen or not held, is meant so. So is a run whose
    result has no gradient at all, and what a model keeps on its attributes may be read elsewhere.
    """
    sources = _sources(site)
    ends = {node for node in recording.graph.nodes if node.op == "output"}
    kept = {node for node, tensor in recording.kept.items() if tensor.grad_fn is not None}
    differentiated = reached_by_gradient(s for s in sources if _has_gradient(s))
    if not differentiated.isdisjoint(ends | kept):
        return None
    values = _reached(sources, _passes_values)
    result = [node for end in ends for node in end.all_input_nodes]
    if values.isdisjoint(ends) or not any("edge" in node.meta for node in result):
        return None
    if not _is_trained(site, model, held):
        return None
    return _place(sources, differentiated, values, ends)


def reached_by_gradient(start: Iterable[fx.Node]) -> set[fx.Node]:
    """All that is made of these values and, as far as autograd knows, may be differentiated."""
    return _reached(start, _passes_gradient)


def _sources(site: FoundSite | WrittenSite) -> set[fx.Node]:
    """All that the recurrence gives."""
    if isinstance(site, FoundSite):
        return results_of(site.calls)
    carried = {node for states in site.loop.carried.states for node in states}
    return carried | set(site.loop.uses)


def _is_trained(
    site: FoundSite | WrittenSite, model: nn.Module, held: Collection[int] | None
) -> bool:
    if isinstance(site, FoundSite):
        weights = list(site.module.parameters())
    else:
        named = dict(model.named_parameters(remove_duplicate=False))
        weights = [named[name] for name in site.record.weights if name in named]
    return any(p.requires_grad and (held is None or id(p) in held) for p in weights)


def _place(
    sources: set[fx.Node],
    differentiated: set[fx.Node],
    values: set[fx.Node],
    ends: set[fx.Node],
) -> str | None:
    """Where the gradient stops first on the way that does not lead through the site again."""
    direct, pending = set(ends), list(ends)
    while pending:
        node = pending.pop()
        fresh = [n for n in node.all_input_nodes if n in values and n not in direct]
        direct.update(fresh)
        pending += [n for n in fresh if n not in sources]
    if differentiated:
        cuts = [node for node in direct - differentiated
                if any(n in differentiated for n in node.all_input_nodes)]  # fmt: skip
    else:
        cuts = [node for node in direct & sources if not node.meta["grad"]]
    if not cuts:
        return None
    first = min(cuts, key=lambda node: int(node.meta["order"]))
    while first.meta.get("name") == "item":
        (first,) = first.all_input_nodes
    return relative(first.meta.get("location")) or UNKNOWN


def _reached(start: Iterable[fx.Node], passes: Callable[[fx.Node, fx.Node], bool]) -> set[fx.Node]:
    found = set(start)
    pending = list(found)
    while pending:
        node = pending.pop()
        fresh = [user for user in node.users if user not in found and passes(node, user)]
        found.update(fresh)
        pending += fresh
    return found


def _passes_values(source: fx.Node, user: fx.Node) -> bool:
    """Whether numbers of the source go into the user's, rather than its shape or an order."""
    if user.op == "output":
        return True
    name = user.meta.get("name")
    if name in _OTHERS or not user.meta.get("real", False):
        return False
    return name not in _LIKE or user.args[0] is source


def _passes_gradient(source: fx.Node, user: fx.Node) -> bool:
    return _passes_values(source, user) and (user.op == "output" or _has_gradient(user))


def _has_gradient(node: fx.Node) -> bool:
    """Whether autograd knows the value; of several results, each speaks for itself."""
    return "edge" in node.meta or any(user.meta.get("name") == "item" for user in node.users)
