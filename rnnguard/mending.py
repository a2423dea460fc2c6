"""Applies what the scenario table calls for, measures again, and takes back what did not help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn
from torch.optim import Optimizer

from rnnguard.decision.diagnosis import diagnose
from rnnguard.decision.planning import SITE_SCOPES, allowed, matching, prescribed, reason
from rnnguard.decision.rulebook import Rulebook, Scenario
from rnnguard.decision.verification import Verdict, distance_from_health, verify
from rnnguard.errors import Refusal, RewriteError, refuse
from rnnguard.inspection.gates import is_plain
from rnnguard.inspection.preflight import sparse_refusals
from rnnguard.measurements import SiteReadings
from rnnguard.probe.measurement import Look, measure, optimizer_kind
from rnnguard.probe.subject import Subject
from rnnguard.records import Change, Plan, Tier
from rnnguard.remedies import REMEDIES
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.stepguard import refusals_for_clip

_ADAMS = ("adam", "adamw")
REMEDY: Mapping[str, Remedy] = {remedy.name: remedy for remedy in REMEDIES}


@dataclass
class Mending:
    """One course of changes: the newest look, everything tried, and what was left alone."""

    subject: Subject
    rulebook: Rulebook
    edit: Edit
    tiers: tuple[Tier, ...]
    skip: frozenset[str]
    look: Look
    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def run(self) -> None:
        """Sites first, since the clip's dose rests on the gradients that they then give."""
        trained = {site.path: site.trained for site in self.look.measurement.sites}
        self.subject = replace(self.subject, trained=trained)
        for found in self.look.sites:
            if found.record.path not in self.skip:
                self._mend_site(found.record.path)
        self._guard_steps()

    def _mend_site(self, path: str) -> None:
        self.refusals += _left_alone(self.look.measurement[path], self.tiers)
        for scope in SITE_SCOPES:
            # What the recurrence's remedies have changed decides about input and output.
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
        module = _target(self.subject.model, remedy, path)
        if remedy.aim == "health" and distance_from_health(before) == 0:
            return
        change = prescribed(row, why, remedy, before, self.look.measurement.run)
        change = None if change is None else self._not_yet_failed(change, remedy)
        if change is None:
            return
        if not self._may_change(remedy, path, module):
            return
        mark = self.edit.mark()
        remedy.apply(self.edit, module, change.dose)
        if self.edit.mark() == mark:
            return
        assert remedy.aim is not None
        look = diagnosed(measure(self.subject))
        self._check(look)
        verdict = verify(remedy.aim, before, look.measurement[path])
        if look.measurement.run.nonfinite and not self.look.measurement.run.nonfinite:
            verdict = Verdict(False, "loss or gradient became non-finite")
        if verdict.kept:
            self.look = look
        else:
            self.edit.rollback_(mark)
        outcome = "applied" if verdict.kept else "taken back"
        result = {"outcome": outcome, "result": verdict.sentence}
        self.changes.append(change.model_copy(update=result))

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
        if remedy.tier != "structure" or is_plain(module):
            return True
        fact = f"{type(module).__name__} is a class of its own, which is not morphed."
        self.refusals.append(Refusal("RG910", path, fact, "Only its values are changed."))
        return False

    def _guard_steps(self) -> None:
        optimizer = self.subject.optimizer
        if optimizer is None or "step" not in self.tiers:
            return
        reasons = [*refusals_for_clip(optimizer), *sparse_refusals(self.subject.model)]
        if reasons:
            self.refusals += reasons
            return
        run = self.look.measurement.run
        row = matching(self.rulebook, "run", None, run)
        if row is None:
            return
        why = reason(row, None, run)
        for remedy in allowed(row, REMEDY, self.tiers):
            change = prescribed(row, why, remedy, None, run)
            if change is not None:
                REMEDY[remedy.name].apply(self.edit, self.subject.model, change.dose)
                self.changes.append(change.model_copy(update={"outcome": "applied"}))
                self._note_guard()

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


def _left_alone(site: SiteReadings, tiers: tuple[Tier, ...]) -> list[Refusal]:
    """The reason that a sick but trained site keeps its weights."""
    sick = site.level not in ("healthy", "unknown", "truncated")
    if not (site.trained and sick and "values" in tiers):
        return []
    fact = "the weights are trained, frozen, another optimizer's, or not sure to be untrained."
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


def replay(model: nn.Module, optimizer: Optimizer, edit: Edit, plan: Plan) -> tuple[Change, ...]:
    """Applies a plan as it stands, without a probe; RefusedError when it does not fit."""
    refuse(_misfits(model, optimizer, plan))
    for change in plan:
        remedy = REMEDY[change.remedy]
        remedy.apply(edit, _target(model, remedy, change.path), change.dose)
    result = {"outcome": "applied", "result": "replayed from a plan"}
    return tuple(change.model_copy(update=result) for change in plan)


def _target(model: nn.Module, remedy: Remedy, path: str | None) -> nn.Module:
    """What the remedy works on: the site's module, or the whole model."""
    return model if path is None or remedy.on_model else model.get_submodule(path)


def _misfits(model: nn.Module, optimizer: Optimizer, plan: Plan) -> Iterator[Refusal]:
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    cure = "Build the model that the plan was made for, then apply the plan."
    for change in plan:
        if change.remedy not in REMEDY:
            fact = f"the plan names a remedy {change.remedy!r} that does not exist."
            yield Refusal("RG914", change.path or "", fact, cure)
        if change.remedy in ("adamw", "amsgrad") and optimizer_kind(optimizer) not in _ADAMS:
            fact = f"the plan's {change.remedy} is made for Adam, not {type(optimizer).__name__}."
            yield Refusal("RG915", "optimizer", fact, cure)
        if change.remedy in REMEDY and REMEDY[change.remedy].on_model:
            yield from _missing_parameters(model, change)
        elif change.path is not None and change.path not in paths:
            fact = "the plan names this path, which the model does not have."
            yield Refusal("RG915", change.path, fact, cure)


def _missing_parameters(model: nn.Module, change: Change) -> Iterator[Refusal]:
    """The parameters that a hand-written site's change names and the model does not have."""
    known = dict(model.named_parameters())
    words = f"{change.dose.get('entries', '')} {change.dose.get('gates', '')}"
    named = {word.split(":")[0] for word in re.split(r"[\s+/]+", words) if word}
    for name in sorted(named - set(known)):
        fact = f"the plan names the parameter {name}, which the model does not have."
        cure = "Build the model that the plan was made for, then apply the plan."
        yield Refusal("RG915", change.path or "", fact, cure)
