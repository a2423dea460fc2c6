"""Which findings are told: what settings leave out, what comments hide, which comments are idle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rnnguard.decision.conditions import vocabulary_values
from rnnguard.decision.diagnosis import audit_finding
from rnnguard.decision.rulebook import Rule, Rulebook
from rnnguard.decision.settings import Settings, means, unknown
from rnnguard.inspection.comments import Comment, absolute
from rnnguard.measurements import Measurement
from rnnguard.records import Finding, Record

UNUSED = "RG005"
# What would hide everything is no reasoned exception.
_EVERYTHING = ("ALL", "RG")
# Labels that say that there was nothing to look at.
_NOTHING = (None, "none", "unknown")


class Suppressed(Record):
    """A finding that a comment hides, with the comment's reason and its file:line."""

    finding: Finding
    reason: str
    comment: str


class Selected(Record):
    """The findings to be told, worst first, and those that comments hide by now."""

    findings: tuple[Finding, ...]
    remaining: tuple[Finding, ...]
    suppressed: tuple[Suppressed, ...]


def selected(
    rulebook: Rulebook,
    comments: Sequence[Comment],
    findings: Sequence[Finding],
    measurement: Measurement,
    remaining: Sequence[Finding] | None = None,
) -> Selected:
    """The findings without those that comments hide or the rulebook's settings leave out.

    Comments that hide nothing are findings themselves (RG005). `measurement` is what `findings`
    rest on, `remaining` those after a change, by default the same.
    """
    last = findings if remaining is None else remaining
    known = [(rule.code, rule.name) for rule in rulebook.rules]
    idle = [
        audit_finding(rulebook, UNUSED, text, location=comment.location)
        for comment in comments
        if (text := _idle(comment, rulebook, known, [*findings, *last], measurement))
    ]
    shown = [
        chosen(rulebook.settings, [*(f for f in told if not _hiding(f, comments)), *idle])
        for told in (findings, last)
    ]
    hidden = ((f, _hiding(f, comments)) for f in chosen(rulebook.settings, last))
    suppressed = tuple(
        Suppressed(finding=finding, reason=comment.reason, comment=comment.location)
        for finding, comment in hidden
        if comment is not None
    )
    return Selected(findings=shown[0], remaining=shown[1], suppressed=suppressed)


def chosen(settings: Settings, findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings that the settings want to hear of."""
    return tuple(f for f in findings if settings.wants(f.code, f.name, f.path))


def _hiding(finding: Finding, comments: Sequence[Comment]) -> Comment | None:
    for comment in comments:
        named = any(_names(word, finding.code, finding.name) for word in comment.names)
        if named and _speaks_of(comment, finding):
            return comment
    return None


def _names(word: str, code: str, name: str) -> bool:
    return word not in _EVERYTHING and means(word, code, name)


def _speaks_of(comment: Comment, finding: Finding) -> bool:
    if finding.location is not None and absolute(finding.location) in comment.lines:
        return True
    if finding.path is None and finding.location is None:
        return "" in comment.paths
    return finding.path in comment.paths


def _idle(
    comment: Comment,
    rulebook: Rulebook,
    known: list[tuple[str, str]],
    findings: Sequence[Finding],
    measurement: Measurement,
) -> str:
    """What is wrong with a comment; empty when it does its work, or nobody can tell."""
    if not comment.names:
        return "it names no rule, so it hides nothing; write `# rnnguard: ignore[RG201] reason`."
    facts = []
    for word in comment.names:
        hint = unknown(word, known)
        if word in _EVERYTHING:
            facts.append(f"{word!r} would hide everything, so it hides nothing; name the rules.")
        elif hint is not None:
            facts.append(f"{word!r} is not a known rule; {hint}")
        elif comment.sure and _is_unused(word, comment, rulebook, findings, measurement):
            facts.append(f"there is no finding of {word} to hide.")
    return " ".join(facts)


def _is_unused(
    word: str,
    comment: Comment,
    rulebook: Rulebook,
    findings: Sequence[Finding],
    measurement: Measurement,
) -> bool:
    """Whether each rule that is meant was looked for and found nothing that the comment hides."""
    rules = [rule for rule in rulebook.rules if _names(word, rule.code, rule.name)]
    found = {finding.code for finding in findings} | {finding.name for finding in findings}
    if any(not found.isdisjoint(rule.implied_by) for rule in rules):
        return False  # it may be folded into its cause
    hit = (f for f in findings if _names(word, f.code, f.name) and _speaks_of(comment, f))
    return next(hit, None) is None and all(_was_looked_for(r, measurement) for r in rules)


def _was_looked_for(rule: Rule, measurement: Measurement) -> bool:
    """Whether the readings of a rule were taken; of rules without readings nobody can tell."""
    run = measurement.run
    if rule.when is None:
        return False
    if rule.method == "recorded step" and not (run.watched_steps or run.trial_steps):
        return False
    taken = (vocabulary_values(site, run) for site in measurement.sites or (None,))
    return any(all(values.get(n) not in _NOTHING for n in rule.when.cells) for values in taken)
