"""All 78 traps of rewriting a model in place have a test that a naive version fails."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRAPS = range(1, 79)
NAME = re.compile(r"test_trap_(\d\d)_[a-z0-9_]*[a-z0-9]")


def traps_in(text: str) -> Iterator[ast.FunctionDef]:
    """The tests that are named as those of traps."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_trap_"):
            yield node


def is_fooled(test: ast.FunctionDef) -> bool:
    """Whether it is decorated with `fooled_by(...)`."""
    return any(
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Name)
        and decorator.func.id == "fooled_by"
        for decorator in test.decorator_list
    )


@pytest.fixture(scope="module")
def traps() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (file.name, test)
        for file in sorted(HERE.glob("test_traps_*.py"))
        for test in traps_in(file.read_text(encoding="utf-8"))
    ]


def numbers(traps: list[tuple[str, ast.FunctionDef]]) -> Counter[int]:
    found = (NAME.fullmatch(test.name) for _, test in traps)
    return Counter(int(match[1]) for match in found if match)


def test_every_trap_has_its_test(traps: list[tuple[str, ast.FunctionDef]]) -> None:
    assert sorted(set(TRAPS) - set(numbers(traps))) == []


def test_no_trap_has_two_tests(traps: list[tuple[str, ast.FunctionDef]]) -> None:
    assert {number: n for number, n in numbers(traps).items() if n > 1} == {}


def test_names_are_those_of_known_traps(traps: list[tuple[str, ast.FunctionDef]]) -> None:
    assert sorted(set(numbers(traps)) - set(TRAPS)) == []
    assert [f"{file}: {test.name}" for file, test in traps if not NAME.fullmatch(test.name)] == []


def test_traps_are_in_trap_files_only() -> None:
    elsewhere = [f for f in HERE.glob("test_*.py") if not f.name.startswith("test_traps")]
    assert [
        f"{file.name}: {test.name}"
        for file in sorted(elsewhere)
        for test in traps_in(file.read_text(encoding="utf-8"))
    ] == []


def test_every_trap_catches_a_naive_version(traps: list[tuple[str, ast.FunctionDef]]) -> None:
    assert [f"{file}: {test.name}" for file, test in traps if not is_fooled(test)] == []


@pytest.mark.parametrize("line", ["@fooled_by", "@other(1)", ""])
def test_a_trap_without_a_naive_version_is_seen(line: str) -> None:
    (test,) = traps_in(f"{line}\ndef test_trap_01_words(): ...")
    assert not is_fooled(test)
