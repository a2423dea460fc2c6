"""Applies what the scenario table calls for, measures again, and takes back what did not help."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from rnnguard.decision.diagnosis import diagnose
from rnnguard.decision.planning import SITE_SCOPES, allowed, matching, prescribed, reason
from rnnguard.decision.rulebook import Rulebook, Scenario
from rnnguard.decision.verification import Verdict, distance_from_health, spared, verify, wanting
from rnnguard.errors import Refusal, RewriteError, refuse
from rnnguard.inspection.gates import is_plain
from rnnguard.inspection.sites import FoundSite
from rnnguard.inspection.written import WrittenSite
from rnnguard.measurements import SiteReadings
from rnnguard.nn.contract import is_ours
from rnnguard.probe.cost import seconds_of
from rnnguard.probe.measurement import Look, measure
from rnnguard.probe.subject import Subject
from rnnguard.records import TIERS, Change, Plan, Tier
from rnnguard.remedies.remedy import Remedy
from rnnguard.replay import REMEDY, replay, replay_refusals, target
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.stepguard import refusals_for_clip

SCHEDULE = "warmup_cosine"


@dataclass
class Mending:
    """One course of changes: the newest look, what was tried and left alone, and what to tell."""

    subject: Subject
    rulebook: Rulebook
    edit: Edit
    tiers: tuple[Tier, ...]
    skip: frozenset[str]
    look: Look
    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rate: float = 1.0
    """Factor on the learning rate at the top of the schedule, where a trial has found one."""

    def mend_sites(self) -> None:
        """What the scenarios of each site call for, as far as the probe confirms it."""
        self._remember()
        for found in self.look.sites:
            if found.record.path not in self.skip:
                self._mend_site(found.record.path)

    def follow(self, changes: list[Change], refusals: list[Refusal]) -> None:
        """Does what another process decided, and looks at what that gives on this one's data."""
        self._remember()
        self.changes, self.refusals = list(changes), list(refusals)
        applied = [change for change in changes if change.outcome == "applied"]
        plan = Plan(changes=tuple(sorted(applied, key=lambda c: TIERS.index(c.tier))))
        model, optimizer = self.subject.model, self.subject.optimizer
        assert optimizer is not None
        # Process 0 has judged whether the weights are trained, for all.
        against = replay_refusals(model, optimizer, plan)
        refuse(reason for reason in against if reason.code != "RG902")
        replay(model, self.edit, plan)
        if any(change.tier != "step" for change in applied):
            look = diagnosed(measure(self.subject))
            self._check(look)
            self.look = look
        if any(change.tier == "step" for change in applied):
            self._note_guard()

    def _remember(self) -> None:
        """What is known of weights and code before any change, which a remedy does not alter."""
        sites = self.look.measurement.sites
        known = {site.path: site.provenance for site in sites if site.provenance is not None}
        self.subject = replace(self.subject, provenance=known, usage=self.look.usage)

    def _mend_site(self, path: str) -> None:
        self.refusals += _left_alone(self.look.measurement[path], self.tiers)
        for scope in SITE_SCOPES:
            # What the remedies of one scope have changed decides about the next.
            site, run = self.look.measurement[path], self.look.measurement.run
            row = matching(self.rulebook, scope, site, run)
            if row is None:
                continue
            why = reason(row, site, run)
            for remedy in allowed(row, REMEDY, self.tiers):
                self._try(row, why, REMEDY[remedy.name], path)
        self.refusals += _structure_kept(self.look.measurement[path], self.tiers)

    def _try(self, row: Scenario, why: str, remedy: Remedy, path: str) -> None:
        """Applies one remedy at a site and keeps it only if its reading improved."""
        before = self.look.measurement[path]
        module = target(self.subject.model, remedy, path)
        if not wanting(remedy.aim, before):
            return
        change = prescribed(row, why, remedy, before, self.look.measurement.run)
        change = None if change is None else self._not_yet_failed(change, remedy)
        if change is None:
            return
        if not self._may_change(remedy, path, module):
            return
        mark, structural = self.edit.mark(), remedy.tier == "structure"
        cost = self._seconds(self.look, path) if structural else None
        remedy.apply(self.edit, module, change.dose)
        if self.edit.mark() == mark:
            return
        look = diagnosed(measure(self.subject))
        self._check(look)
        verdict = self._judged(remedy, look, path)
        if verdict.kept:
            self._note_cost(change, cost, self._seconds(look, path) if structural else None)
            self.look = look
        else:
            self.edit.rollback_(mark)
        outcome = "applied" if verdict.kept else "taken back"
        result = {"outcome": outcome, "result": verdict.sentence}
        self.changes.append(change.model_copy(update=result))

    def _seconds(self, look: Look, path: str) -> float | None:
        """What the site's module takes for a forward and backward."""
        found = next(site for site in look.sites if site.record.path == path)
        return seconds_of(self.subject.model, found) if isinstance(found, FoundSite) else None

    def _note_cost(self, change: Change, before: float | None, after: float | None) -> None:
        """Beside the change and not in it, since no two times are equal and plans must be."""
        if before is not None and after is not None:
            times = f"{after / before:.1f} times as long as before"
            said = f"`{change.path}`: after {change.remedy} its forward and backward takes {times}."
            self.notes.append(said)

    def _judged(self, remedy: Remedy, look: Look, path: str) -> Verdict:
        """Whether the change did at `path` what it was made for, and no harm elsewhere."""
        was, now = self.look.measurement, look.measurement
        if gone := {site.path for site in was.sites} - {site.path for site in now.sites}:
            return Verdict(False, f"the model no longer runs {', '.join(sorted(gone))}")
        if now.run.nonfinite and not was.run.nonfinite:
            return Verdict(False, "loss or gradient became non-finite")
        verdict = verify(remedy.aim, was[path], now[path], remedy.tier)
        weights = {site.record.path: _weights(self.subject.model, site) for site in self.look.sites}
        tied = [other for other in weights if other != path and weights[other] & weights[path]]
        if harmed := [other for other in tied if not spared(was[other], now[other])]:
            why = f"worse on the same weights: {', '.join(harmed)}"
            return Verdict(False, f"{verdict.sentence}; {why}")
        return verdict

    def _not_yet_failed(self, change: Change, remedy: Remedy) -> Change | None:
        """The change, with a gentler dose if this one was taken back; None without one."""
        if self._failed_before(change):
            if remedy.gentler is None:
                return None
            change = change.model_copy(update={"dose": remedy.gentler(change.dose)})
        return None if self._failed_before(change) else change

    def _failed_before(self, change: Change) -> bool:
        """Whether the same dose was taken back at this place already."""
        return any(
            (tried.remedy, tried.path, tried.dose, tried.outcome)
            == (change.remedy, change.path, change.dose, "taken back")
            for tried in self.changes
        )

    def _may_change(self, remedy: Remedy, path: str, module: nn.Module) -> bool:
        if remedy.tier != "structure" or is_ours(module):
            return True
        if not is_plain(module):
            fact = f"{type(module).__name__} is a class of its own, which is not morphed."
            cure = "Only its values are changed."
        elif remedy.adds is not None and hasattr(module, remedy.adds):
            fact = f"the module has an attribute {remedy.adds} already, which {remedy.name} needs."
            cure = "Rename it to have this remedy as well."
        else:
            return True
        self.refusals.append(Refusal("RG910", path, fact, cure))
        return False

    def guard_steps(self) -> None:
        """Last of all, since the clip's dose rests on the gradients that the sites then give."""
        optimizer = self.subject.optimizer
        if optimizer is not None and "step" in self.tiers:
            self.refusals += refusals_for_clip(optimizer)
        for change in self.step_changes():
            REMEDY[change.remedy].apply(self.edit, self.subject.model, change.dose)
            self.changes.append(change.model_copy(update={"outcome": "applied"}))
            self._note_guard()

    def step_changes(self) -> list[Change]:
        """What the run's scenario calls for, with doses from the newest look."""
        optimizer = self.subject.optimizer
        if optimizer is None or "step" not in self.tiers or refusals_for_clip(optimizer):
            return []
        run = self.look.measurement.run
        row = matching(self.rulebook, "run", None, run)
        if row is None:
            return []
        why = reason(row, None, run)
        row = _paced(row, self.rate)
        found = (prescribed(row, why, r, None, run) for r in allowed(row, REMEDY, self.tiers))
        return [change for change in found if change is not None]

    def _note_guard(self) -> None:
        """The guard acts at steps only, so that of all readings just this one is new."""
        measurement = self.look.measurement
        run = measurement.run.model_copy(update={"guarded": True})
        measurement = measurement.model_copy(update={"run": run})
        self.look = replace(self.look, measurement=measurement)

    def _check(self, look: Look) -> None:
        """The rewritten model's outputs must have kept their rank, width and dtype."""
        if look.signature != self.look.signature:
            fact = "the outputs changed their form or dtype."
            raise RewriteError.of("RG916", "", fact, "The model and optimizer were restored.")


def diagnosed(look: Look) -> Look:
    """The look with every site's level judged."""
    return replace(look, measurement=diagnose(look.measurement))


def _paced(row: Scenario, rate: float) -> Scenario:
    """The row with a schedule, if it has one, that goes up to that part of the user's rate."""
    if rate == 1.0 or SCHEDULE not in row.apply:
        return row
    dose = {**row.dose, SCHEDULE: {**row.dose.get(SCHEDULE, {}), "peak": rate}}
    return row.model_copy(update={"dose": dose})


def _weights(model: nn.Module, site: FoundSite | WrittenSite) -> set[int]:
    """The ids of the parameters that the site's remedies may write."""
    if site.record.form == "written":
        named = dict(model.named_parameters())
        return {id(named[name]) for name in site.record.weights if name in named}
    return {id(parameter) for parameter in site.module.parameters()}


def _left_alone(site: SiteReadings, tiers: tuple[Tier, ...]) -> list[Refusal]:
    """The reason that a sick but trained site keeps its weights."""
    sick = site.level not in ("healthy", "unknown", "truncated")
    if not (site.trained and sick and "values" in tiers):
        return []
    fact = f"{site.provenance or 'the weights are trained'}."
    cure = "They are kept; build a new model to have its values chosen."
    return [Refusal("RG902", site.path, fact, cure)]


def _structure_kept(site: SiteReadings, tiers: tuple[Tier, ...]) -> list[Refusal]:
    """The reason that a hand-written site, still sick, is not rebuilt."""
    sick = distance_from_health(site) > 0
    if not sick or site.cell != "custom" or "structure" not in tiers:
        return []
    fact = "a hand-written recurrence keeps its structure, since its code is the user's."
    cure = "Use a cell of torch or of rnnguard.nn to have its structure changed."
    return [Refusal("RG910", site.path, fact, cure)]
