"""Only the hands change a model or an optimizer; nobody copies one or switches its mode."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Source

# Paths inside rnnguard/, each with the reason why it may mutate.
HANDS = {
    "rewrite/edit.py": "the one place that changes a model or an optimizer",
    "rewrite/stepguard.py": "clips and schedules inside the optimizer's own step",
    "rewrite/clipping.py": "brings the gradients of a step down",
    "rewrite/alarm.py": "copies a count into the host's memory",
    "rewrite/loan.py": "lends the optimizer scaled rates for one step and takes them back",
    "nn/recurrent_weights.py": "keeps its own gains and its own power iteration, not the user's",
    "probe/holdings.py": "gives back what the probe touched",
    "probe/snapshot.py": "hides gradients and lends other values while the probe runs",
}
# Paths that may copy a model or switch its mode, each with the reason.
OWN_MODEL = {
    "demo.py": "trains and scores models that it built itself",
    "rewrite/edit.py": "gives the modules that it made itself the mode of their parent",
}

HOOK = re.compile(r"_?register_\w+_hook")
GROWING = {"append", "extend", "insert", "pop", "clear", "remove", "update", "setdefault"}


def _chain(node: ast.expr) -> Iterator[ast.expr]:
    """An expression and what it is taken from: `a.b[0].c`, `a.b[0]`, `a.b`, `a`."""
    yield node
    if isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        yield from _chain(node.value)


def _passes(node: ast.expr, attribute: str) -> bool:
    return any(isinstance(part, ast.Attribute) and part.attr == attribute for part in _chain(node))


def _targets(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.Assign() | ast.Delete():
            targets = node.targets
        case ast.AugAssign() | ast.AnnAssign():
            targets = [node.target]
        case _:
            targets = []
    flat: list[ast.expr] = []
    for target in targets:
        flat += target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
    return flat


def _group_names(tree: ast.Module) -> set[str]:
    """Names that a loop over an optimizer's parameter groups binds."""
    return {
        name.id
        for node in ast.walk(tree)
        if isinstance(node, ast.For | ast.comprehension)
        and "param_groups" in ast.unparse(node.iter)
        for name in ast.walk(node.target)
        if isinstance(name, ast.Name)
    }


def _is_group(node: ast.expr, groups: set[str]) -> bool:
    base = list(_chain(node))[-1]
    return _passes(node, "param_groups") or (isinstance(base, ast.Name) and base.id in groups)


def _changes_by_assignment(target: ast.expr, groups: set[str]) -> bool:
    if isinstance(target, ast.Attribute) and target.attr == "__class__":
        return True
    subscripted_group = isinstance(target, ast.Subscript) and _is_group(target.value, groups)
    return _passes(target, "data") or _passes(target, "param_groups") or subscripted_group


def _changes_by_call(call: ast.Call, groups: set[str]) -> bool:
    match call.func:
        case ast.Name(id="setattr" | "delattr"):
            return True
        case ast.Attribute(attr="copy_" | "add_param_group"):
            return True
        case ast.Attribute(value=owner, attr=name):
            on_data = name.endswith("_") and not name.startswith("_") and _passes(owner, "data")
            on_group = name in GROWING and _is_group(owner, groups)
            return bool(HOOK.fullmatch(name)) or on_data or on_group
        case _:
            return False


def mutations(tree: ast.Module) -> list[int]:
    """The lines that change a tensor, an object's class or attributes, or an optimizer."""
    groups = _group_names(tree)
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.Call)
        if (isinstance(node, ast.Call) and _changes_by_call(node, groups))
        or any(_changes_by_assignment(target, groups) for target in _targets(node))
    )


def copies_and_modes(tree: ast.Module) -> list[int]:
    """The lines that call deepcopy, .train() or .eval()."""
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and re.fullmatch(r"(.*\.)?deepcopy|.*\.(train|eval)", ast.unparse(node.func), re.DOTALL)
    )


def _lines(
    sources: tuple[Source, ...], seen: Callable[[ast.Module], list[int]], allowed: dict[str, str]
) -> list[str]:
    return [
        f"rnnguard/{source.path}:{line}: {source.text.splitlines()[line - 1].strip()}"
        for source in sources
        if source.path not in allowed
        for line in seen(source.tree)
    ]


def test_only_the_hands_mutate(sources: tuple[Source, ...]) -> None:
    assert _lines(sources, mutations, HANDS) == []


def test_no_model_is_copied_or_switched(sources: tuple[Source, ...]) -> None:
    assert _lines(sources, copies_and_modes, OWN_MODEL) == []


def test_what_may_mutate_exists(sources: tuple[Source, ...]) -> None:
    assert {*HANDS, *OWN_MODEL} <= {source.path for source in sources}


@pytest.mark.parametrize(
    "code",
    [
        "weight.copy_(other)",
        "weight.data = other",
        "weight.data[0] += 1",
        "weight.data.fill_(0)",
        "a, weight.data = pair",
        "setattr(module, name, value)",
        "delattr(module, name)",
        "module.__class__ = LayerNormLSTM",
        "module.register_forward_hook(hook)",
        "optimizer.register_step_pre_hook(hook)",
        "optimizer.add_param_group(group)",
        "optimizer.param_groups[0]['lr'] = 0.1",
        "optimizer.param_groups.append(group)",
        "for group in optimizer.param_groups:\n    group['lr'] *= 0.1",
        "for i, g in enumerate(self.optimizer.param_groups):\n    g.update(lr=0.1)",
    ],
)
def test_a_mutation_is_seen(code: str) -> None:
    assert len(mutations(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "copy = weight.clone()",
        "data = weight.data",
        "rates = [group['lr'] for group in optimizer.param_groups]",
        "rates[group['name']] = group['lr']",
        "kind = module.__class__",
        "report.data_source = 'given inputs'",
    ],
)
def test_looking_is_free(code: str) -> None:
    assert mutations(ast.parse(code)) == []


@pytest.mark.parametrize("code", ["copy.deepcopy(m)", "deepcopy(m)", "m.train()", "m.a.eval()"])
def test_a_copy_or_switch_is_seen(code: str) -> None:
    assert len(copies_and_modes(ast.parse(code))) == 1
