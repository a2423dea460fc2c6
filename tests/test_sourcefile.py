"""Lines and statements of the user's files."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from torch import nn

from rnnguard.inspection.sourcefile import SourceFile, classes_of

TEXT = """\
    @decorated
    def run(x):

        y = (x +
             1)
        # a word
        # and another
        match y:
            case 1:
                return 1
        with y as z: pass
        try:
            z = 2
        finally:
            z = 3
    # the end

"""


@pytest.fixture
def file(tmp_path: Path) -> SourceFile:
    (tmp_path / "x.py").write_text(textwrap.dedent(TEXT))
    return SourceFile(str(tmp_path / "x.py"))


@pytest.mark.parametrize(
    ("line", "span"),
    [
        (1, [1, 2, 3]),  # the head of a function, its decorator in it
        (4, [4, 5]),
        (5, [4, 5]),
        (6, [8]),  # a comment speaks of what comes after it
        (7, [8]),
        (10, [10]),
        (11, [11]),
        (13, [13]),
        (16, []),
        (40, [40]),
    ],
)
def test_the_statement_of_a_line(file: SourceFile, line: int, span: list[int]) -> None:
    assert [*file.statement_of(line)] == span


def test_what_may_be_passed_by(file: SourceFile) -> None:
    assert [line for line in range(1, 17) if file.is_conditional(line)] == [
        8,
        9,
        10,
        *range(12, 16),
    ]


def test_the_function_around_a_line(file: SourceFile) -> None:
    assert [file.method_of(line) for line in (5, 16)] == ["run", ""]


def test_a_file_that_is_not_there_is_empty() -> None:
    missing = SourceFile("<stdin>")
    assert (missing.text, [*missing.statement_of(3)]) == ("", [3])


def test_torchs_classes_have_no_source() -> None:
    assert classes_of(nn.LSTM, {}) == ()
