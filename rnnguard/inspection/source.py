"""Mistakes that stand in the user's own source: a detached result dropped, a graph retained."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from rnnguard.inspection.own_code import names_in, own_functions
from rnnguard.inspection.sourcefile import SourceFile, lines_of
from rnnguard.inspection.written import relative

Function = ast.FunctionDef | ast.AsyncFunctionDef
_LOOPS = (ast.For, ast.AsyncFor, ast.While)


def source_readings(
    model: nn.Module, *, loss: object = None, step: object = None, train_step: object = None
) -> dict[str, Any]:
    """`detach_unused`, `graph_retained` and their `places`, from source that can be read.

    Where training steps were watched, their `graph_retained` is what counts.
    """
    unused = unused_detaches(model, loss, step, train_step)
    retained = retained_graph(step, train_step)
    places = {"detach_unused": unused[0]} if unused else {}
    places |= {"graph_retained": retained} if retained is not None else {}
    found = {"detach_unused": len(unused), "graph_retained": retained is not None}
    return found | {"places": places}


def unused_detaches(model: nn.Module, *functions: object) -> list[str]:
    """The file:line of each statement that detaches a tensor and drops the result.

    Looked for in the model's own classes and the functions given; not where an object with a
    `detach` of its own, which may work in place, could be meant.
    """
    held = [value for module in model.modules() for value in (module, *vars(module).values())]
    if any(map(_detaches_itself, held)):
        return []
    # What never calls it need not be read, which takes far longer than to ask the bytecode.
    known = [f for f in own_functions(model, *functions) if "detach" in names_in(f.__code__)]
    sound = [f for f in known if not any(map(_detaches_itself, f.__globals__.values()))]
    nodes = ((function, node) for function, node in _read(sound))
    found = {
        (function.__code__.co_filename, line): None
        for function, node in nodes
        for line in _dropped(node)
    }
    return [str(relative(f"{file}:{line}")) for file, line in sorted(found)]


def retained_graph(*functions: object) -> str | None:
    """The file:line of a training step's last backward, where that needlessly keeps its graph.

    None where another backward may follow through the same graph: of several losses in a loop,
    in another function, or in a gradient penalty.
    """
    known = list(own_functions(*functions))
    if not any(_keeps_graphs(function.__code__) for function in known):
        return None
    nodes = list(_read(known))
    with_backward = [(f, node) for f, node in nodes if _backwards(node)]
    if len(with_backward) != 1:
        return None
    function, node = with_backward[0]
    calls = _backwards(node)
    last = calls[-1]
    around = _around(node, last)
    # One backward per optimizer step in the loop, so that none follows through its graph.
    alone = all(_calls(each, "step") for each in around if isinstance(each, _LOOPS))
    sure = all(map(_retains, calls)) or not any(isinstance(each, ast.If) for each in around)
    later = [call for call in _calls(node, "grad") if call.lineno > last.lineno]
    if not (_retains(last) and sure and alone) or later:
        return None
    return relative(f"{function.__code__.co_filename}:{last.lineno}")


def _keeps_graphs(code: CodeType) -> bool:
    """Whether something is called with `retain_graph=`, by the bytecode."""
    inner = (_keeps_graphs(each) for each in code.co_consts if isinstance(each, CodeType))
    named = (each for each in code.co_consts if isinstance(each, tuple))
    return any("retain_graph" in each for each in named) or any(inner)


def _detaches_itself(value: Any) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return hasattr(kind, "detach") and not issubclass(kind, Tensor)


def _read(functions: Iterable[FunctionType]) -> Iterator[tuple[FunctionType, Function]]:
    """Each function with its source; those without any are left out."""
    files: dict[str, dict[tuple[int, str], Function]] = {}
    for function in functions:
        code = function.__code__
        if code.co_filename not in files:
            files[code.co_filename] = _functions_in(code.co_filename)
        node = files[code.co_filename].get((code.co_firstlineno, code.co_name))
        if node is not None:
            yield function, node


def _functions_in(file: str) -> dict[tuple[int, str], Function]:
    """The functions of a file by their first line, decorators included, and name."""
    nodes = [node for node in SourceFile(file).nodes if isinstance(node, Function)]
    return {(lines_of(node).start, node.name): node for node in nodes}


def _dropped(function: Function) -> Iterator[int]:
    for node in ast.walk(function):
        if isinstance(node, ast.Expr) and _is_detach(_repeated(node.value)):
            yield node.lineno
        elif isinstance(node, ast.For) and _only_rebinds(node):
            yield node.body[0].lineno


def _repeated(value: ast.expr) -> ast.expr:
    """What a bare comprehension, or the list of one, does for each item."""
    if isinstance(value, ast.ListComp | ast.SetComp | ast.GeneratorExp):
        return value.elt
    of = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
    if isinstance(value, ast.Call) and of in ("list", "tuple", "set") and len(value.args) == 1:
        return _repeated(value.args[0])
    return value


def _is_detach(value: ast.expr) -> bool:
    """Whether this is `h.detach()`; what a call gives may be run for what the call does."""
    if not isinstance(value, ast.Call) or value.args or value.keywords:
        return False
    named = isinstance(value.func, ast.Attribute) and value.func.attr == "detach"
    return named and not any(isinstance(node, ast.Call) for node in ast.walk(value.func))


def _only_rebinds(loop: ast.For) -> bool:
    """`for h in hidden: h = h.detach()`, which leaves `hidden` as it was."""
    if len(loop.body) != 1 or not isinstance(loop.target, ast.Name):
        return False
    only, name = loop.body[0], loop.target.id
    if not isinstance(only, ast.Assign) or not _is_detach(only.value):
        return False
    targets = [ast.unparse(target) for target in only.targets]
    return targets == [name] and ast.unparse(only.value) == f"{name}.detach()"


def _calls(node: ast.AST, name: str) -> list[ast.Call]:
    """The calls of a method of that name, in the order of the source."""
    found = (each for each in ast.walk(node) if isinstance(each, ast.Call))
    named = [c for c in found if isinstance(c.func, ast.Attribute) and c.func.attr == name]
    return sorted(named, key=lambda call: (call.lineno, call.col_offset))


def _backwards(node: ast.AST) -> list[ast.Call]:
    return _calls(node, "backward")


def _retains(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    kept = given.get("retain_graph")
    constant = isinstance(kept, ast.Constant) and kept.value is True
    # **options may hold it.
    return constant and "create_graph" not in given and None not in given


def _around(function: Function, call: ast.Call) -> list[ast.AST]:
    """The loops and branches of the function that hold the call."""
    return [
        node
        for node in ast.walk(function)
        if isinstance(node, (*_LOOPS, ast.If)) and any(each is call for each in ast.walk(node))
    ]
