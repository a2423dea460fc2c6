"""Where the user's classes are written, line by line, statement by statement; imports no torch."""

from __future__ import annotations

import ast
import linecache
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rnnguard.inspection.own_code import functions_of, is_users

_ADDING = ("append", "extend", "insert", "add_module", "register_module", "update")
_BRANCHES = (ast.If, ast.Try, ast.Match, ast.While, ast.For, ast.AsyncFor)


@dataclass(frozen=True, eq=False)
class SourceFile:
    """One file, read once; of notebook cells what Python keeps for its tracebacks."""

    name: str

    @cached_property
    def lines(self) -> list[str]:
        linecache.checkcache(self.name)
        return linecache.getlines(self.name)

    @cached_property
    def text(self) -> str:
        return "".join(self.lines)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        try:
            return list(ast.walk(ast.parse(self.text)))
        except SyntaxError:
            return []

    def statement_of(self, line: int) -> range:
        """The lines of the statement that a comment there speaks of: its own, or the next one.

        Of a block it is the head. Empty where a blank line or nothing follows.
        """
        around = [span for span in self._simple if line in span]
        if not around and self._is_comment(line):
            while self._is_comment(line):
                line += 1
            if not self._line(line).strip():
                return range(0)
        around = around or [span for span in (*self._simple, *self._heads) if line in span]
        return min(around, key=len, default=range(line, line + 1))

    def method_of(self, line: int) -> str:
        """The name of the innermost function around a line."""
        around = [n for n in self._functions if line in lines_of(n)]
        return min(around, key=lambda n: len(lines_of(n))).name if around else ""

    def is_conditional(self, line: int) -> bool:
        """Whether some runs pass the line by."""
        return any(line in lines_of(node) for node in self.nodes if isinstance(node, _BRANCHES))

    def _line(self, line: int) -> str:
        return self.lines[line - 1] if line <= len(self.lines) else ""

    def _is_comment(self, line: int) -> bool:
        return self._line(line).lstrip().startswith("#")

    @cached_property
    def _functions(self) -> list[ast.FunctionDef]:
        return [node for node in self.nodes if isinstance(node, ast.FunctionDef)]

    @cached_property
    def _simple(self) -> list[range]:
        return [lines_of(n) for n in self.nodes if isinstance(n, ast.stmt) and not _body(n)]

    @cached_property
    def _heads(self) -> list[range]:
        return [head_of(n) for n in self.nodes if isinstance(n, ast.stmt) and _body(n)]


@dataclass(frozen=True, eq=False)
class ClassSource:
    """Where a class is written."""

    file: SourceFile
    node: ast.ClassDef
    lines: range = field(init=False)
    header: range = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", lines_of(self.node))
        object.__setattr__(self, "header", head_of(self.node))

    def assigning(self, attribute: str) -> Iterator[range]:
        """The lines of every statement that sets `self.<attribute>`, or adds to what is there."""
        for node in ast.walk(self.node):
            if isinstance(node, ast.stmt) and not _body(node) and _sets(node, attribute):
                yield lines_of(node)


def classes_of(
    kind: type, known: dict[str, SourceFile], saying: str = ""
) -> tuple[ClassSource, ...]:
    """The classes of the user's that an object's class is made of, itself first.

    `known` are the files read so far, by name; those without the words `saying` are left out.
    """
    found = (_class_source(part, known, saying) for part in kind.__mro__)
    return tuple(source for source in found if source is not None)


def _class_source(kind: type, known: dict[str, SourceFile], saying: str) -> ClassSource | None:
    if not is_users(kind):
        return None
    for _, function in functions_of(kind):
        code = function.__code__
        name = code.co_filename
        name = name if name.startswith("<") else os.path.abspath(name)
        file = known.setdefault(name, SourceFile(name))
        if saying not in file.text:  # it need not be parsed
            continue
        named = (n for n in file.nodes if isinstance(n, ast.ClassDef) and n.name == kind.__name__)
        for node in named:
            if code.co_firstlineno in lines_of(node):
                return ClassSource(file, node)
    return None


def _body(node: ast.AST) -> list[Any]:
    return getattr(node, "body", None) or getattr(node, "cases", None) or []


def lines_of(node: Any) -> range:
    """The lines of a statement, its decorators among them."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return range(first, (node.end_lineno or node.lineno) + 1)


def head_of(node: Any) -> range:
    """The lines of a block before its body."""
    inner = _body(node)[0]
    start = inner.pattern.lineno if isinstance(inner, ast.match_case) else lines_of(inner).start
    return range(lines_of(node).start, max(node.lineno + 1, start))


def _sets(node: ast.stmt, attribute: str) -> bool:
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return _adds(node.value, attribute)
    else:
        return False
    parts = (part for target in targets for part in _unpacked(target))
    return any(_is_own(part, attribute) for part in parts)


def _unpacked(target: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from _unpacked(part)
    else:
        yield target.value if isinstance(target, ast.Subscript) else target


def _adds(call: ast.Call, attribute: str) -> bool:
    """Whether it is `self.cells.append(...)`, or `self.add_module("cells", ...)`."""
    called = call.func
    named = [a.value for a in call.args if isinstance(a, ast.Constant)]
    if isinstance(called, ast.Name) and called.id == "setattr":
        return attribute in named
    if not isinstance(called, ast.Attribute) or called.attr not in _ADDING:
        return False
    return _is_own(called.value, attribute) or attribute in named


def _is_own(node: ast.expr, attribute: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == attribute and (
        isinstance(node.value, ast.Name) and node.value.id == "self"
    )  # fmt: skip
