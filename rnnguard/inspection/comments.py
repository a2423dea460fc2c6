"""Comments such as `# rnnguard: ignore[RG201] reason` in the code of a model; imports no torch.

What a comment speaks of: its own statement, or the one below where it stands alone. Where that
statement makes a module (`self.lstm = nn.LSTM(8, 32)`), also the sites that go by its path; and
on the line of the model's own class, what goes by no path and no line.
"""

from __future__ import annotations

import os
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnnguard.inspection.makers import makers
from rnnguard.inspection.sourcefile import ClassSource, SourceFile, classes_of

if TYPE_CHECKING:
    from torch import nn

    from rnnguard.measurements import Site

_PRAGMA = re.compile(
    r"#\s*rnnguard:\s*ignore(?![\w-])(?:\s*\[(?P<names>[^\]]*)\])?"
    r"(?P<reason>.*?)(?=#\s*rnnguard:|$)"
)
# Elsewhere in a class nobody knows whether the code ran, or was meant to.
_RUN_FOR_SURE = ("__init__", "forward")


@dataclass(frozen=True)
class Comment:
    """One comment: where it stands, what it names, why, and what it speaks of.

    `lines` are file:line with whole paths, `paths` those of sites, "" the model itself. `sure`:
    it stands in code that every run of this model passes, so that it can be told to be idle.
    """

    location: str
    names: tuple[str, ...]
    reason: str
    lines: frozenset[str]
    paths: frozenset[str]
    sure: bool


def comments_of(
    model: nn.Module, sites: Iterable[Site], locations: Iterable[str | None] = ()
) -> tuple[Comment, ...]:
    """All comments in the files where the model's classes, its sites and these file:lines lie."""
    sites = list(sites)
    known: dict[str, SourceFile] = {}
    classes = {type(m): classes_of(type(m), known, "rnnguard:") for m in model.modules()}
    places = [place for place in (*locations, *(site.location for site in sites)) if place]
    for place in places:
        name = absolute(place).rpartition(":")[0]
        known.setdefault(name, SourceFile(name))
    if not any("rnnguard:" in file.text for file in known.values()):
        return ()
    made = _Made(model, sites, classes)
    ran = {absolute(place) for place in places}
    own = {source for sources in classes.values() for source in sources}
    return tuple(
        comment
        for file in known.values()
        if "rnnguard:" in file.text
        for comment in _in_file(file, made, ran, own)
    )


def absolute(location: str) -> str:
    """A file:line with the whole path of its file; what is no file stays."""
    name, _, line = location.rpartition(":")
    return location if name.startswith("<") else f"{os.path.abspath(name)}:{line}"


def _in_file(
    file: SourceFile, made: _Made, ran: set[str], own: set[ClassSource]
) -> Iterator[Comment]:
    for line, text in _pragmas(file):
        span = file.statement_of(line)
        lines = frozenset(f"{file.name}:{number}" for number in span)
        paths, doubtful = made.on(file.name, span)
        inside = next((c for c in own if c.file is file and line in c.lines), None)
        sure = not doubtful and (bool(paths) or not ran.isdisjoint(lines))
        if inside is not None and not doubtful and not sure:
            sure = file.method_of(line) in _RUN_FOR_SURE and not file.is_conditional(line)
        for found in _PRAGMA.finditer(text):
            names = (name.strip() for name in (found["names"] or "").split(","))
            yield Comment(
                location=f"{file.name}:{line}".removeprefix(os.getcwd() + os.sep),
                names=tuple(name for name in names if name),
                reason=found["reason"].strip(" -:\t"),
                lines=lines,
                paths=paths,
                sure=sure,
            )


def _pragmas(file: SourceFile) -> Iterator[tuple[int, str]]:
    """The lines with a comment of ours, and its text; the same words in a string are none."""
    lines = iter(file.lines)
    try:
        for token in tokenize.generate_tokens(lambda: next(lines, "")):
            if token.type == tokenize.COMMENT and _PRAGMA.search(token.string):
                yield token.start[0], token.string
    except (tokenize.TokenError, SyntaxError):  # a notebook's magic, or a file changed meanwhile
        return


class _Made:
    """Which statements make which sites."""

    def __init__(
        self, model: nn.Module, sites: list[Site], classes: dict[type, tuple[ClassSource, ...]]
    ) -> None:
        self._makers: list[tuple[str, set[int], str, bool]] = []
        for site in sites:
            for path in (site.path, *site.aliases):
                found = list(makers(model, path, classes))
                doubtful = len(found) > 1
                self._makers += [(name, lines, site.path, doubtful) for name, lines in found]
        for source in classes[type(model)][:1]:
            self._makers.append((source.file.name, set(source.header), "", False))

    def on(self, name: str, span: range) -> tuple[frozenset[str], bool]:
        """The paths of what is made there, and whether another statement may have made it."""
        hits = [(p, d) for n, lines, p, d in self._makers if n == name and lines & {*span}]
        return frozenset(path for path, _ in hits), any(doubtful for _, doubtful in hits)
