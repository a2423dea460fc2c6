"""What the user asked about: model and optimizer freed of wrappers, data, task, and the looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rnnguard.errors import Refusal, RefusedError, refuse
from rnnguard.inspection.batches import Batches, Loss, Step, given_batches
from rnnguard.inspection.preflight import optimizer_refusals, rewrite_refusals
from rnnguard.inspection.recording import tensors_in
from rnnguard.inspection.source import source_readings
from rnnguard.inspection.wrappers import Opened, opened, stepping
from rnnguard.mending import diagnosed
from rnnguard.probe.batch_axis import batch_size_of
from rnnguard.probe.measurement import Look, measure, unmeasured
from rnnguard.probe.site_demand import with_demands
from rnnguard.probe.snapshot import untouched
from rnnguard.probe.subject import Subject, check_runs, guessed_batches
from rnnguard.probe.training_step import TrainStep, watch_steps
from rnnguard.probe.trial import run_trial
from rnnguard.probe.trial_readings import with_trial
from rnnguard.ranks import on_its_own
from rnnguard.records import Tier
from rnnguard.report.notes import NO_SITE
from rnnguard.rewrite.stepguard import guard_of

BATCHES = 8
FEWEST_TRIAL_STEPS = 20
MOST_BYTES = 2**30  # that the batches of a trial may hold


@dataclass(frozen=True)
class Given:
    """A model and its optimizer as they were given, and what of them can be worked on.

    `optimizer` is the one whose step moves the weights, `inside.model` the plain model.
    """

    inside: Opened
    optimizer: Any
    notes: tuple[str, ...]

    @property
    def model(self) -> nn.Module:
        return self.inside.model

    def audit_refusals(self) -> list[Refusal]:
        """Why the model cannot be run and measured without a trace."""
        return [] if self.inside.runs else self.inside.refusals

    def kept(self, tiers: Sequence[Tier]) -> list[Refusal]:
        """Why values and structure stay, where these tiers would change them."""
        if not set(tiers) - {"step"}:
            return []
        stay = ", so values and structure stay as they are."
        return [replace(r, fact=f"{r.fact.rstrip('.')}{stay}") for r in self.inside.refusals]

    def refusals(self, tiers: Sequence[Tier]) -> list[Refusal]:
        """Why none of these tiers can act."""
        hopeless = self.inside.hopeless
        return hopeless if hopeless or "step" in tiers else self.kept(tiers)

    def held_refusals(self, tiers: Sequence[Tier], skip: frozenset[str]) -> Iterator[Refusal]:
        """What else these tiers cannot work on: foreign parameters, and weights made anew."""
        if set(self.permitted(tiers)) - {"step"}:
            return rewrite_refusals(self.model, self.optimizer, skip)
        return optimizer_refusals(self.model, self.optimizer)

    def permitted(self, tiers: Sequence[Tier]) -> tuple[Tier, ...]:
        """The tiers that can act: on a wrapped model those inside the optimizer's step."""
        return tuple(tier for tier in tiers if tier == "step" or not self.inside.wrappings)


def given(model: nn.Module, optimizer: Any = None) -> Given:
    """Looks through the wrappers of both; nothing is changed."""
    inside, moving, notes = opened(model), stepping(optimizer), []
    if inside.around:
        names = ", ".join(inside.around)
        notes.append(f"Looked through {names}: paths and figures are those of the plain module.")
    if moving is not optimizer:
        outer, inner = type(optimizer).__name__, type(moving).__name__
        notes.append(f"The {outer} was looked through: its {inner} takes the steps.")
    return Given(inside, moving, tuple(notes))


@dataclass(frozen=True)
class Request:
    """What the user said about data and task."""

    data: Any
    inputs: Any
    loss: Loss | None
    step: Step | None
    memory: int | None
    total_steps: int | None
    seed: int
    trial: int | bool | None = False
    """Steps per candidate, False for no trial, None for one where data and loss are given."""

    def trial_refusals(self) -> Iterator[Refusal]:
        """Why a trial that is asked for cannot be had."""
        asked = self.trial
        if asked is None or asked is False:
            return
        if asked is not True and (not isinstance(asked, int) or asked < FEWEST_TRIAL_STEPS):
            fact, least = (
                f"{asked!r} is no number of steps that tells anything.",
                FEWEST_TRIAL_STEPS,
            )
            yield Refusal("RG920", "trial", fact, f"Give {least} or more, False, or leave it out.")
        if self.data is None or (self.loss is None and self.step is None):
            fact = "a trial needs something to learn from."
            yield Refusal("RG912", "trial", fact, "Give data with `loss=`, or `step=`.")

    def subject(self, given: Given) -> Subject:
        """What is to be measured; raises RefusedError (RG912) where it does not run."""
        model, optimizer = given.model, given.optimizer
        guarded = optimizer is not None and guard_of(optimizer) is not None
        task = (self.memory, self.total_steps, self.seed)
        if not given.inside.runs:
            nothing = Batches((), "not run", None, None, None)
            return Subject(model, optimizer, nothing, *task, guarded)
        with untouched(model, self.data):
            known = (self.data, self.inputs, self.loss, self.step)
            batches = given_batches(model, *known, BATCHES)
        with on_its_own():
            if batches is None:
                batches = guessed_batches(model, self.memory, self.seed)
                refuse([] if batches.batches else [NO_SITE])
            size = batch_size_of(self.data)
            subject = Subject(model, optimizer, batches, *task, guarded, batch_size=size)
            subject = check_runs(subject)
        return with_demands(subject) if self.memory is None else subject

    def trial_batches(self, subject: Subject, count: int) -> Batches:
        """As many batches as a trial takes steps, if the data hold them and memory does.

        An iterator gives its batches once, so that those of the probe are all there are.
        """
        known = subject.batches
        if self.data is None or isinstance(self.data, Iterator) or len(known.batches) < BATCHES:
            return known
        size = sum(t.numel() * t.element_size() for b in known.batches for t in tensors_in(b.raw))
        most = max(BATCHES, MOST_BYTES * len(known.batches) // max(1, size))
        with untouched(subject.model, self.data):
            more = given_batches(
                subject.model, self.data, self.inputs, self.loss, self.step, min(count, most)
            )
        return known if more is None else replace(known, batches=more.batches)


def looked_at(subject: Subject) -> Look:
    """The first look before a rewrite; RefusedError when there is nothing to work on."""
    if subject.batches.basis == "not run":
        return unmeasured(subject)
    look = diagnosed(measure(subject))
    refuse([*_no_site(look), *_made_in_forward(subject.model, look)])
    return look


def tried(look: Look, subject: Subject, steps: int) -> Look:
    """The look with the readings of a trial, if one is asked for."""
    if not steps:
        return look
    guard = guard_of(subject.optimizer) if subject.optimizer is not None else None
    clip = guard.settings.max_norm if guard is not None else None
    run = with_trial(look.measurement.run, run_trial(subject, steps, clip=clip))
    return replace(look, measurement=look.measurement.model_copy(update={"run": run}))


def watched(
    look: Look, subject: Subject, optimizer: Any, train_step: TrainStep | None
) -> tuple[Look, tuple[str, ...]]:
    """The look with what the user's own training step shows, and a note where it shows less."""
    if train_step is None:
        return look, ()
    if optimizer is None:
        cure = "Give the optimizer that the training step takes."
        raise RefusedError.of("RG912", "train_step", "there is no optimizer to step.", cure)
    seen = watch_steps(subject, optimizer, train_step)
    batches = subject.batches
    functions = {"loss": batches.loss, "step": batches.step, "train_step": train_step}
    source = source_readings(subject.model, **functions)
    found = source | seen.readings
    run = look.measurement.run
    places = run.places | source["places"] | seen.readings.get("places", {})
    run = run.model_copy(update=found | {"places": places})
    notes = () if seen.words is None else (seen.words,)
    return replace(look, measurement=look.measurement.model_copy(update={"run": run})), notes


def without(look: Look, skip: frozenset[str]) -> Look:
    """The look without the skipped sites."""
    kept = tuple(site for site in look.measurement.sites if site.path not in skip)
    sites = tuple(site for site in look.sites if site.record.path not in skip)
    measurement = look.measurement.model_copy(update={"sites": kept})
    return replace(look, measurement=measurement, sites=sites)


def _no_site(look: Look) -> list[Refusal]:
    if look.sites:
        return []
    fact = "a recurrent module is called that the model does not hold."
    cure = "Keep the modules in nn.ModuleList or nn.ModuleDict."
    return [Refusal("RG109", place, fact, cure) for place in look.unregistered] or [NO_SITE]


def _made_in_forward(model: nn.Module, look: Look) -> list[Refusal]:
    """Sites that are not there until the model has run once for good."""
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    fact, cure = "the module is made in the first forward.", "Run the model once on a batch first."
    native = (site.record.path for site in look.sites if site.record.form != "written")
    missing = (path for path in native if path not in paths)
    return [Refusal("RG907", path, fact, cure) for path in missing]
