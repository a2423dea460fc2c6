"""The report: what was found, what was changed, and what it looks like now."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rnnguard
from rnnguard.decision.selection import Suppressed, chosen
from rnnguard.decision.settings import Settings
from rnnguard.errors import Refusal, RulesError
from rnnguard.files import write_text
from rnnguard.measurements import Measurement, Site, SiteReadings
from rnnguard.race import Race
from rnnguard.records import SCHEMA, SEVERITIES, Change, Finding, Level, Plan, Severity, near_miss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console, ConsoleOptions, RenderResult

    from rnnguard.rewrite.stepguard import Engagement


class Report:
    """What an audit or a stabilization found and did; readings are those of the newest look.

    `findings` were there before any change, `remaining` are there now; `suppressed` are those
    of now that comments in the user's code hide; `trial` is what candidates did in a trial, None
    without one.
    `report["encoder.lstm"]` gives the readings of a site.
    """

    def __init__(
        self,
        *,
        sites: tuple[Site, ...],
        before: Measurement,
        after: Measurement | None,
        findings: tuple[Finding, ...],
        remaining: tuple[Finding, ...],
        changes: tuple[Change, ...],
        plan: Plan,
        refusals: tuple[Refusal, ...] = (),
        notes: tuple[str, ...] = (),
        suppressed: tuple[Suppressed, ...] = (),
        trial: Race | None = None,
        undo: Callable[..., tuple[Refusal, ...]] | None = None,
        live: Callable[[], Engagement | None] = lambda: None,
    ) -> None:
        self.sites = sites
        self.before = before
        self.after = after
        self.findings = findings
        self.remaining = remaining
        self.changes = changes
        self.plan = plan
        self.refusals = refusals
        self.notes = notes
        self.suppressed = suppressed
        self.trial = trial
        self._undo = undo
        self._live = live

    @property
    def live(self) -> Engagement | None:
        """How the step guard has engaged up to now: steps, share clipped, spikes, skips, norms.

        None without a guard. Reading it waits for the device; the steps themselves do not.
        """
        return self._live()

    @property
    def now(self) -> Measurement:
        """The newest measurement."""
        return self.after or self.before

    @property
    def looks(self) -> tuple[tuple[str, Measurement], ...]:
        """The measurements with the name of their time: now alone, or before and after."""
        if self.after is None:
            return (("now", self.before),)
        return (("before", self.before), ("after", self.after))

    @property
    def ok(self) -> bool:
        """Whether no finding of severity error remains."""
        return not self.exceeds("error")

    @property
    def level(self) -> Level:
        """The worst level among the sites, as last measured."""
        return self.now.level

    def __getitem__(self, path: str) -> SiteReadings:
        return self.now[path]

    @property
    def mended(self) -> tuple[Finding, ...]:
        """The findings that were there before the changes and are gone now."""
        still = {(finding.code, finding.path) for finding in self.remaining}
        return tuple(f for f in self.findings if (f.code, f.path) not in still)

    def undo(self, *, structure: bool = False) -> str:
        """Takes every change back; gives one sentence that says what was taken back.

        Once training has moved on, only the step guard and the optimizer's options go, and
        UndoError (RG917) says what stays. With `structure` the added classes and parameters go
        as well, the values stay as trained, and the sentence says so.
        """
        if self._undo is None:
            return "There is nothing to undo."
        staying = self._undo(structure=True) if structure else self._undo()
        if staying:
            return f"Taken back but for this: {' '.join(map(str, staying))}"
        self._undo = None
        applied = [change for change in self.changes if change.outcome == "applied"]
        count = f"{len(applied)} {'change' if len(applied) == 1 else 'changes'} taken back."
        if all(change.tier != "structure" for change in applied):
            return count
        return f"{count} Checkpoints made in between load after `rnnguard.apply` of `report.plan`."

    def exceeds(self, fail_on: Severity) -> tuple[Finding, ...]:
        """The remaining findings at or above a severity."""
        if fail_on not in SEVERITIES:
            fact = f"{fail_on!r} is not a severity;"
            raise RulesError.of("RG914", "", fact, near_miss(fail_on, list(SEVERITIES)))
        lowest = SEVERITIES.index(fail_on)
        return tuple(f for f in self.remaining if SEVERITIES.index(f.severity) >= lowest)

    def only(
        self,
        select: Iterable[str] = (),
        ignore: Iterable[str] = (),
        *,
        rules: Sequence[str | Path] = (),
    ) -> Report:
        """The same report with the selected findings only; nothing selected means all.

        Takes codes, code prefixes ("RG4"), names and "ALL", of which the closest decides;
        `rules` are what else makes names known, as for an audit. Raises RulesError for an
        unknown one.
        """
        settings = Settings(select=tuple(select), ignore=tuple(ignore))
        self._check_known(settings, rules)
        hidden = chosen(settings, (s.finding for s in self.suppressed))
        return Report(
            sites=self.sites,
            before=self.before,
            after=self.after,
            findings=chosen(settings, self.findings),
            remaining=chosen(settings, self.remaining),
            changes=self.changes,
            plan=self.plan,
            refusals=self.refusals,
            notes=self.notes,
            suppressed=tuple(s for s in self.suppressed if s.finding in hidden),
            trial=self.trial,
            undo=self._undo,
            live=self._live,
        )

    def assert_clean(self, fail_on: Severity = "error", ignore: Iterable[str] = ()) -> None:
        """Raises AssertionError with the text view when a finding at or above remains."""
        __tracebackhide__ = True
        seen = self.only(ignore=ignore)
        if found := seen.exceeds(fail_on):
            # The first line is all that a test runner's short summary shows.
            names = ", ".join(dict.fromkeys(f"{f.code} {f.name}" for f in found))
            raise AssertionError(f"{names}\n\n{seen}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data in a fixed order; numbers that JSON cannot hold become None."""
        data = {
            "schema": SCHEMA,
            "rnnguard": rnnguard.__version__,
            "ok": self.ok,
            "level": self.level,
            "sites": [site.model_dump() for site in self.sites],
            "before": self.before.model_dump(),
            "after": self.after.model_dump() if self.after else None,
            "findings": [finding.model_dump() for finding in self.findings],
            "remaining": [finding.model_dump() for finding in self.remaining],
            "suppressed": [
                s.finding.model_dump() | {"reason": s.reason, "comment": s.comment}
                for s in self.suppressed
            ],
            "changes": [change.model_dump() for change in self.changes],
            "plan": self.plan.to_dict(),
            "trial": self.trial.model_dump() if self.trial else None,
            "refusals": [vars(refusal) for refusal in self.refusals],
            "notes": list(self.notes),
        }
        finite: dict[str, Any] = _finite(data)
        return finite

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as text; also written to `path` when given, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page; also written to `path` when given, whole or not at all."""
        from rnnguard.report.html import page

        text = page(self)
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, ax: Axes | None = None) -> Axes:
        """The retention by lag of every site on matplotlib axes."""
        from rnnguard.report.figure import draw

        return draw(self, ax)

    def __str__(self) -> str:
        from rnnguard.report.text import plain

        return plain(self)

    def __repr__(self) -> str:
        return f"<Report: {self.level}; sites {len(self.sites)}, findings {len(self.remaining)}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rnnguard.report.text import view

        yield from view(self, ascii_only=options.ascii_only)

    def _repr_html_(self) -> str:
        from rnnguard.report.html import frame

        return frame(self)

    def _check_known(self, settings: Settings, rules: Sequence[str | Path]) -> None:
        if not (settings.select or settings.ignore):
            return
        from rnnguard.decision.rulebook import load_rulebook

        known = {(rule.code, rule.name) for rule in load_rulebook(rules).rules}
        # Findings of extra rule folders are known here even when the folder is not given.
        settings.check_known(known | {(f.code, f.name) for f in (*self.findings, *self.remaining)})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
