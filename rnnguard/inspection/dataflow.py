"""What the recorded graph says about a recurrence: what surrounds it, how its calls are linked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rnnguard.inspection.native import NativeCall

_NORMS = {"layer_norm", "batch_norm", "rms_norm", "group_norm", "instance_norm"}
CUTS = {"detach", "detach_", "data"}
# Whatever passes one value per step on as it is.
TRANSPARENT = {"dropout", "transpose", "permute", "contiguous", "_pad_packed_sequence", "item",
                "__getitem__", "reshape", "view", "squeeze", "unsqueeze"}  # fmt: skip
# Made beside a tensor, of its shape alone.
BLANKS = {"zeros_like", "new_zeros", "ones_like", "new_ones", "full_like", "new_full",
           "empty_like", "new_empty", "rand_like", "randn_like"}  # fmt: skip


def is_normalized(call: NativeCall) -> bool:
    """Whether a normalisation already reads the recurrence's output."""
    return is_normalized_behind([part for part in call.node.users if part.meta.get("part") == 0])


def is_normalized_behind(outputs: list[fx.Node]) -> bool:
    """Whether a normalisation reads one of the values."""
    pending = outputs
    for _ in range(8):
        users = [user for node in pending for user in node.users]
        if any(user.meta.get("name") in _NORMS for user in users):
            return True
        pending = [u for u in users if u.meta.get("name") in TRANSPARENT]
    return False


def is_residual(call: NativeCall) -> bool:
    """Whether the recurrence's input is added to its output."""
    source = call.node.args[0]
    pending = [part for part in call.node.users if part.meta.get("part") == 0]
    for _ in range(8):
        users = {user for node in pending for user in node.users}
        for user in users:
            if user.meta.get("name") in ("add", "__add__", "__radd__", "add_", "__iadd__"):
                others = [a for a in user.args if isinstance(a, fx.Node) and a not in pending]
                if any(other is source or other in _ancestors(source, 6) for other in others):
                    return True
        pending = [u for u in users if u.meta.get("name") in TRANSPARENT | _NORMS]
    return False


def _ancestors(node: object, depth: int) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = {node} if isinstance(node, fx.Node) else set()
    for _ in range(depth):
        pending = {parent for n in pending for parent in n.all_input_nodes} - found
        found |= pending
    return {n for n in found if n.meta.get("name") not in ("parameter", "constant")}


@dataclass(frozen=True)
class Link:
    """How a call's state comes from an earlier call: not at all, cut by a detach, or whole."""

    linked: bool
    cut: bool


def link(earlier: NativeCall, later: NativeCall) -> Link:
    """Whether the state of `later` depends on what `earlier` gave, and whether gradient passes."""
    roots = _state_nodes(later)
    reached = earlier.node in _upstream(roots, earlier, through_cuts=False)
    linked = reached or earlier.node in _upstream(roots, earlier, through_cuts=True)
    whole = reached and not _is_cut(earlier.node)
    return Link(linked=linked, cut=linked and not whole)


def state_path(earlier: NativeCall, later: NativeCall) -> set[fx.Node]:
    """The nodes between one call and the state of the next, both ends included."""
    return _upstream(_state_nodes(later), earlier, through_cuts=True) | {later.node}


def _is_cut(node: fx.Node) -> bool:
    """Whether no gradient passes: a detach, or anything made under `torch.no_grad`."""
    return node.meta.get("name") in CUTS or not node.meta["grad"]


def _state_nodes(call: NativeCall) -> list[fx.Node]:
    state = call.node.args[2 if call.batch_sizes is not None else 1]
    parts = state if isinstance(state, tuple | list) else (state,)
    return [part for part in parts if isinstance(part, fx.Node)]


def _upstream(roots: list[fx.Node], target: NativeCall, through_cuts: bool) -> set[fx.Node]:
    """Everything that the roots depend on, back to the target call."""
    pending, seen = list(roots), set(roots)
    while pending:
        node = pending.pop()
        cut = node.meta.get("name") in BLANKS or (_is_cut(node) and not through_cuts)
        if node.meta["order"] <= target.order or cut:
            continue
        fresh = [parent for parent in node.all_input_nodes if parent not in seen]
        seen.update(fresh)
        pending += fresh
    return seen
