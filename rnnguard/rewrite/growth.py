"""What a rewrite has added to the model's parameters and to the keys of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from rnnguard.nn.contract import is_ours
from rnnguard.rewrite.edit import Edit


@dataclass(frozen=True)
class Growth:
    """Paths of rewritten modules: with new parameters, with new keys, and with neither."""

    parameters: tuple[str, ...]
    keys: tuple[str, ...]
    neither: tuple[str, ...]


def growth_of(edit: Edit) -> Growth:
    """What of the edit's additions is in place now."""
    parameters: dict[str, None] = {}
    keys: dict[str, None] = {}
    changed: dict[str, None] = {}
    for module, children in edit.added:
        here = [child for child in children if any(child is c for c in module.children())]
        taken_back = len(here) < len(children) or not is_ours(module)
        if taken_back:
            continue
        path = edit.path_of(module)
        changed[path] = None
        if any(child.state_dict() for child in here):
            keys[path] = None
        if any(True for child in here for _ in child.parameters()):
            parameters[path] = None
    neither = tuple(path for path in changed if path not in keys)
    return Growth(tuple(parameters), tuple(keys), neither)
