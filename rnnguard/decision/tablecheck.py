"""What is wrong with a rulebook as a whole: rows that meet, hide each other, or leave a gap.

Exact, by arithmetic on the boxes that the rows' cells span; nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Literal

from rnnguard.decision.boxes import Box, Space, meet
from rnnguard.decision.rulebook import Rule, Rulebook, Scenario
from rnnguard.records import Record, Severity, near_miss

Kind = Literal[
    "unreachable",
    "overlap",
    "gap",
    "unknown remedy",
    "unknown rule",
    "unknown scenario",
    "same cells",
    "cycle",
    "uncited",
    "no example",
]
# Where every measurement must find its row, if only one that says that nothing is to be done.
COMPLETE_SCOPES = ("recurrence", "run")
BUILT_IN = 10  # the lowest priority of rnnguard's own rows
MOST_GAPS = 5  # that are told; behind one gap there often lie many
_ORDER: tuple[Severity, ...] = ("error", "warning", "info")


class Problem(Record):
    """One fault of the tables: which rows it concerns, and one sentence that says what it is."""

    kind: Kind
    rows: tuple[str, ...]
    scope: str | None
    sentence: str
    severity: Severity

    def __str__(self) -> str:
        return f"{self.severity}: {self.kind}: {self.sentence}"


def problems(rulebook: Rulebook, remedies: Iterable[str]) -> tuple[Problem, ...]:
    """Everything wrong with the tables, worst first; `remedies` are the names that exist.

    Errors are rows that can never do what they say; overlaps and gaps are warnings.
    """
    scopes = list(dict.fromkeys(row.scope for row in rulebook.scenarios))
    found = [problem for scope in scopes for problem in _of_scope(rulebook, scope)]
    found += _of_names(rulebook, list(remedies))
    found += _of_rules(rulebook.rules)
    return tuple(sorted(found, key=lambda problem: _ORDER.index(problem.severity)))


def space_of(rows: Sequence[Scenario]) -> Space:
    """The space of all readings that the rows name."""
    return Space([row.when.cells for row in rows])


def reached(rulebook: Rulebook, row: Scenario) -> dict[str, float | str | bool | None] | None:
    """Readings for which this row is the one that matches; None where there are none."""
    rows = rulebook.ranked(row.scope)
    space = space_of(rows)
    box = _reached(space, rows, row)
    return None if box is None else space.point(box)


# --- scenarios ---------------------------------------------------------------------------


def _of_scope(rulebook: Rulebook, scope: str) -> Iterator[Problem]:
    rows = rulebook.ranked(scope)
    space = space_of(rows)
    for row in rows:
        if _reached(space, rows, row) is None:
            yield _unreachable(space, rows, row)
    yield from _overlaps(space, rows, scope)
    if scope in COMPLETE_SCOPES:
        yield from _gaps(space, rows, scope)


def _reached(space: Space, rows: Sequence[Scenario], row: Scenario) -> Box | None:
    """A part of the row's box that no row before it holds."""
    earlier = [space.box(other.when.cells) for other in rows[: rows.index(row)]]
    return space.left_of(space.box(row.when.cells), [*space.impossible, *earlier])


def _unreachable(space: Space, rows: Sequence[Scenario], row: Scenario) -> Problem:
    box = space.box(row.when.cells)
    if space.left_of(box, space.impossible) is None:
        fact, hiding, mine = f"{row.id} can never hold.", [], False
    else:
        earlier = rows[: rows.index(row)]
        hiding = [r for r in earlier if meet(box, space.box(r.when.cells)) is not None]
        fact = f"{row.id} is hidden by {_listed(other.id for other in hiding)}."
        # A user's row comes first by intent; it is told, lest it was not meant.
        mine = any(other.priority < BUILT_IN <= row.priority for other in hiding)
    names = (row.id, *(other.id for other in hiding))
    return _problem("unreachable", names, row.scope, fact, "info" if mine else "error")


def _overlaps(space: Space, rows: Sequence[Scenario], scope: str) -> Iterator[Problem]:
    """Rows of one priority that hold together, where no row of a lower one has gone first."""
    for one, other in combinations(rows, 2):
        both = meet(space.box(one.when.cells), space.box(other.when.cells))
        if both is None or one.priority != other.priority:
            continue
        earlier = [space.box(r.when.cells) for r in rows if r.priority < one.priority]
        found = space.left_of(both, [*space.impossible, *earlier])
        if found is not None:
            where = space.words(space.widened(found, both, earlier))
            fact = f"{one.id} and {other.id}, both of priority {one.priority}, hold at {where}."
            yield _problem("overlap", (one.id, other.id), scope, fact, "warning")


def _gaps(space: Space, rows: Sequence[Scenario], scope: str) -> Iterator[Problem]:
    covers = [space.box(row.when.cells) for row in rows]
    covers.sort(
        key=lambda box: sum(mask != full for mask, full in zip(box, space.full, strict=True))
    )
    told: list[Box] = []
    while len(told) < MOST_GAPS:
        found = space.left_of(space.full, [*covers, *space.impossible, *told])
        if found is None:
            return
        told.append(space.widened(found, space.full, covers))
        fact = f"no row of scope {scope} holds at {space.words(told[-1])}."
        yield _problem("gap", (), scope, fact, "warning")


def _of_names(rulebook: Rulebook, remedies: list[str]) -> Iterator[Problem]:
    """What a scenario names and does not exist, and rivals that no scenario names."""
    ids = [row.id for row in rulebook.scenarios]
    named = {rival for row in rulebook.scenarios for rival in row.rivals}
    for row in rulebook.scenarios:
        if row.only_rival and row.id not in named:
            fact = f"{row.id} is no row's rival, and is chosen nowhere else."
            yield _problem("unreachable", (row.id,), row.scope, fact, "error")
    known = [name for rule in rulebook.rules for name in (rule.code, rule.name)]
    for row in rulebook.scenarios:
        for remedy in row.apply:
            if remedy not in remedies:
                fact = f"{row.id} applies {remedy!r}; {near_miss(remedy, remedies)}"
                yield _problem("unknown remedy", (row.id,), row.scope, fact, "error")
        for rival in row.rivals:
            if rival not in ids:
                fact = f"{row.id} names the rival {rival!r}; {near_miss(rival, ids)}"
                yield _problem("unknown scenario", (row.id,), row.scope, fact, "error")
        for code in row.codes:
            if code not in known:
                fact = f"{row.id} names the rule {code!r}; {near_miss(code, known)}"
                yield _problem("unknown rule", (row.id,), row.scope, fact, "error")


# --- rules -------------------------------------------------------------------------------


def _of_rules(rules: Sequence[Rule]) -> Iterator[Problem]:
    measured = [rule for rule in rules if rule.when is not None]
    for rule in measured:
        cells = rule.when.cells if rule.when is not None else {}
        space = Space([cells])
        if space.left_of(space.box(cells), space.impossible) is None:
            fact = f"{rule.code} can never hold."
            yield _problem("unreachable", (rule.code,), None, fact, "error")
    for one, other in combinations(measured, 2):
        if one.when == other.when:
            fact = f"{one.code} and {other.code} have the same cells."
            yield _problem("same cells", (one.code, other.code), None, fact, "warning")
    yield from _implications(rules)
    uncited = [rule.code for rule in rules if rule.stage == "measured" and not rule.refs]
    if uncited:
        fact = f"{_listed(uncited)} cite{_s(uncited)} nothing."
        yield _problem("uncited", uncited, None, fact, "error")
    shown = [r.code for r in rules if r.stage == "measured" and not (r.example and r.twin)]
    if shown:
        fact = f"{_listed(shown)} lack{_s(shown)} an example or its healthy twin."
        yield _problem("no example", shown, None, fact, "warning")


def _implications(rules: Sequence[Rule]) -> Iterator[Problem]:
    """Causes that do not exist, and circles in which every finding would hide the other."""
    by_name = {name: rule for rule in rules for name in (rule.code, rule.name)}
    told: set[frozenset[str]] = set()
    for rule in rules:
        for cause in rule.implied_by:
            if cause not in by_name:
                fact = f"{rule.code} is implied by {cause!r}; {near_miss(cause, list(by_name))}"
                yield _problem("unknown rule", (rule.code,), None, fact, "error")
        circle = _circle(rule, by_name)
        if circle and frozenset(circle) not in told:
            told.add(frozenset(circle))
            fact = f"{' -> '.join([*circle, circle[0]])} imply each other, so that none is told."
            yield _problem("cycle", circle, None, fact, "error")


def _circle(start: Rule, by_name: dict[str, Rule]) -> list[str]:
    """The codes on a way from a rule's causes back to itself; empty where there is none."""
    ways = [[start]]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        for cause in (by_name[name] for name in way[-1].implied_by if name in by_name):
            if cause.code == start.code:
                return [rule.code for rule in way]
            if cause.code not in seen:
                seen.add(cause.code)
                ways.append([*way, cause])
    return []


def _problem(
    kind: Kind, rows: Iterable[str], scope: str | None, sentence: str, severity: Severity
) -> Problem:
    return Problem(kind=kind, rows=tuple(rows), scope=scope, sentence=sentence, severity=severity)


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _s(names: Sequence[str]) -> str:
    """The ending of the verb behind the names."""
    return "s" if len(names) == 1 else ""
