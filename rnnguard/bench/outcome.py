"""What came of the models: one record per model and seed, and all of them as data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import rnnguard
from rnnguard.bench.conditions import CLIP, Conditions, Contender
from rnnguard.bench.text import Text
from rnnguard.probe.retention_curve import effective_length
from rnnguard.probe.trial_readings import Trial

EPSILON = 1e-2
"""The retention down to which a length is effective."""
SCHEMA = 1


@dataclass
class Run:
    """One model trained with one seed; what was not reached is None.

    weights: those that the model uses. losses in nats per character, norms before the clip, one
    of each per step. characters, seconds: of the timed steps. before, after: log10 R by lag. bits:
    per character of the held-out text.
    """

    contender: Contender
    seed: int
    weights: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    characters: int = 0
    seconds: float = 0.0
    before: Sequence[float] | None = None
    after: Sequence[float] | None = None
    bits: float | None = None
    stopped: Literal["diverged", "interrupted"] | None = None

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        """T_eff(1e-2) in steps, before and after training; at most the steps measured."""
        before, after = (
            None if curve is None else effective_length(curve, EPSILON)
            for curve in (self.before, self.after)
        )
        return before, after

    @property
    def perplexity(self) -> float | None:
        """Per character of the held-out text."""
        return None if self.bits is None else 2**self.bits

    @property
    def spikes(self) -> tuple[int, ...]:
        """Steps whose norm was above both the clip's 1 and 10 x the median of the 200 before, or
        whose loss or norm was not finite. The 1 counts for models without a clip too.
        """
        return self._trial().spikes

    @property
    def median_norm(self) -> float | None:
        """Median of the finite norms, before the clip."""
        return self._trial().median_norm

    @property
    def characters_per_second(self) -> float | None:
        """Of training, all but the first step."""
        return self.characters / self.seconds if self.seconds else None

    def spikes_per_epoch(self, per_epoch: int) -> float | None:
        """Spikes over the passes through the text that were made, of `per_epoch` steps each."""
        return len(self.spikes) * per_epoch / len(self.losses) if self.losses else None

    def _trial(self) -> Trial:
        """As a trial of an audit, whose rule for spikes is meant to be the same."""
        count = len(self.losses)
        return Trial(
            planned=count,
            losses=tuple(self.losses),
            norms=tuple(self.norms),
            applied=(True,) * count,
            cut_to=(None,) * count,
            calibrating=(False,) * count,
            clip=CLIP,
            update_ratios={},
            recurrent_update_ratio=None,
            seconds=self.seconds,
        )


@dataclass
class Outcome:
    """Everything that a benchmark found, and under which conditions.

    steps, per_epoch: optimizer steps planned for each model, and those of one pass over the
    training text. window: steps that the retention was measured over.
    """

    conditions: Conditions
    text: Text
    steps: int
    per_epoch: int
    window: int
    runs: list[Run] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def of(self, contender: Contender) -> list[Run]:
        """The runs of a model, in the order of the seeds."""
        return [run for run in self.runs if run.contender == contender]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data; what is not finite is None."""
        c, text = self.conditions, self.text
        return {
            "schema": SCHEMA,
            "rnnguard": rnnguard.__version__,
            "torch": torch.__version__,
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "text": {
                "name": text.name,
                "training_characters": len(text.training),
                "held_out_characters": len(text.held_out),
                "different_characters": len(text.characters),
            },
            "conditions": {
                "steps": self.steps,
                "steps_per_epoch": self.per_epoch,
                "hidden": c.hidden,
                "length": c.length,
                "batch": c.batch,
                "optimizer": "Adam",
                "device": c.device,
                "seeds": list(c.seeds),
                "epsilon": EPSILON,
                "measured_steps": self.window,
            },
            "models": [self._model(contender) for contender in c.contenders],
        }

    def _model(self, contender: Contender) -> dict[str, Any]:
        return {
            "name": contender.name,
            "made_of": contender.made_of,
            "layers": contender.layers,
            "rate": contender.rate,
            "clip": contender.clip,
            "runs": [self._run(run) for run in self.of(contender)],
        }

    def _run(self, run: Run) -> dict[str, Any]:
        before, after = run.lengths
        return {
            "seed": run.seed,
            "weights": run.weights,
            "stopped": run.stopped,
            "effective_length_before": before,
            "effective_length_after": after,
            "bits_per_character": _number(run.bits),
            "perplexity_per_character": _number(run.perplexity),
            "spikes": list(run.spikes),
            "spikes_per_epoch": run.spikes_per_epoch(self.per_epoch),
            "median_norm": run.median_norm,
            "characters_per_second": run.characters_per_second,
            "log10_retention_before": _numbers(run.before),
            "log10_retention_after": _numbers(run.after),
            "losses_in_nats_per_character": _numbers(run.losses),
            "norms_before_the_clip": _numbers(run.norms),
        }


def middle_and_ends(values: Iterable[float | None]) -> tuple[float, float, float] | None:
    """Median, lowest and highest of those that are known and finite; None of none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return (statistics.median(known), min(known), max(known)) if known else None


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _numbers(values: Sequence[float] | None) -> list[float | None] | None:
    return None if values is None else [_number(value) for value in values]
