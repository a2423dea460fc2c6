"""The rules of the house that a machine can hold: sizes, names, codes, quiet."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Source

LONGEST_FILE = 300
LONGEST_FUNCTION = 60
DRAWERS = {"utils", "helpers", "common", "misc"}
GATE_TABLE = "inspection/gates.py"
# Where a line on stdout is the purpose.
SPEAKERS = re.compile(r"answers\.py|demo\.py|report/.*")
CODE = re.compile(r"\bRG\d{3}\b")


def _functions(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Name, first line and length of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def _calls(tree: ast.Module, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def questions_of_kind(tree: ast.Module) -> list[int]:
    """The lines that ask whether something is an nn.RNN, nn.LSTM or nn.GRU."""
    return [
        call.lineno
        for call in _calls(tree, "isinstance", "issubclass")
        for named in ast.walk(call.args[1])
        if (isinstance(named, ast.Attribute) and named.attr in {"RNN", "LSTM", "GRU"})
        or (isinstance(named, ast.Name) and named.id in {"RNN", "LSTM", "GRU"})
    ]


@pytest.fixture(scope="module")
def known_codes(root: Path) -> list[str]:
    table = tomllib.loads((root / "rules" / "rules.toml").read_text(encoding="utf-8"))
    return [row["code"] for row in table["rule"]]


def test_files_are_short(sources: tuple[Source, ...]) -> None:
    lengths = {source.path: len(source.text.splitlines()) for source in sources}
    assert {path: n for path, n in lengths.items() if n > LONGEST_FILE} == {}


def test_functions_are_short(sources: tuple[Source, ...]) -> None:
    assert [
        f"rnnguard/{source.path}:{line}: {name} has {length} lines"
        for source in sources
        for name, line, length in _functions(source.tree)
        if length > LONGEST_FUNCTION
    ] == []


def test_no_drawers(sources: tuple[Source, ...]) -> None:
    names = {source.path: set(Path(source.path).with_suffix("").parts) for source in sources}
    assert [path for path, parts in names.items() if parts & DRAWERS] == []


def test_kinds_differ_in_the_gate_table_only(sources: tuple[Source, ...]) -> None:
    assert [
        f"rnnguard/{source.path}:{line}"
        for source in sources
        if source.path != GATE_TABLE
        for line in questions_of_kind(source.tree)
    ] == []


@pytest.mark.parametrize(
    "code", ["isinstance(m, nn.LSTM)", "isinstance(m, (torch.nn.GRU, X))", "issubclass(c, A | RNN)"]
)
def test_a_question_of_kind_is_seen(code: str) -> None:
    assert questions_of_kind(ast.parse(code)) == [1]


def test_codes_are_unique(known_codes: list[str]) -> None:
    assert sorted(known_codes) == sorted(set(known_codes))


def test_every_code_in_the_source_is_in_the_rule_file(
    sources: tuple[Source, ...], known_codes: list[str]
) -> None:
    used = {(code, source.path) for source in sources for code in CODE.findall(source.text)}
    assert sorted(pair for pair in used if pair[0] not in known_codes) == []


def test_a_library_is_quiet(sources: tuple[Source, ...]) -> None:
    assert [
        f"rnnguard/{source.path}:{call.lineno}"
        for source in sources
        if not SPEAKERS.fullmatch(source.path)
        for call in _calls(source.tree, "print")
    ] == []


def test_no_code_in_data(sources: tuple[Source, ...]) -> None:
    assert [
        f"rnnguard/{source.path}:{call.lineno}"
        for source in sources
        for call in _calls(source.tree, "eval", "exec")
    ] == []
