"""rnnguard's verdict on a run: its level, its readings, and one score over them.

`readings_of` flattens a report; `score` reads nothing but that and a table of thresholds, so
that the table can be refitted from the stored readings without another audit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import rnnguard
from benchmarks.diagnosis.training import Run, Stage, staged
from rnnguard.records import LEVELS, Record
from rnnguard.report.report import Report

Readings = Mapping[str, Any]
FAULTY_LEVELS = ("unstable", "exploding", "truncated", "vanishing")
SILENT = -9.0


TRIAL_STEPS = 40
# What a user says to the audit besides model, optimizer, data and loss; each mode is judged apart.
MODES: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "estimated": lambda stage: {},
    "declared": lambda stage: {"memory": stage.task.declared_memory(stage.setting)},
    "trial": lambda stage: {"trial": TRIAL_STEPS},
}
TRIAL_READINGS = (
    "trial_steps", "spike_rate", "clip_fraction", "skip_rate", "update_ratio", "loss_change",
    "loss_above_start", "improved", "nonfinite_steps", "nonfinite_share", "trial_stopped",
    "loss_ratio", "loss_change_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Threshold:
    """One reading beyond a limit is one sign of a fault; one unit of `scale` is one of score.

    log: compare log10 of the reading. needs: readings that must be true for the row to speak.
    """

    reading: str
    side: Literal["above", "below"]
    limit: float
    scale: float = 1.0
    log: bool = False
    needs: tuple[str, ...] = ()

    def excess(self, readings: Readings) -> float:
        """How far beyond the limit, positive when it is; SILENT where there is nothing to read."""
        value = self.value(readings)
        if value is None:
            return SILENT
        distance = (value - self.limit) / self.scale
        return max(min(distance if self.side == "above" else -distance, -SILENT), SILENT)

    def value(self, readings: Readings) -> float | None:
        """The reading as it is compared."""
        found = readings.get(self.reading)
        if found is None or not all(readings.get(name) for name in self.needs):
            return None
        number = float(found)
        if self.log:
            number = math.log10(number) if number > 0 else -300.0
        return number if number == number else None


# The health table of the design as signs with a magnitude.
STATIC_TABLE: tuple[Threshold, ...] = (
    Threshold("nonfinite", "above", 0.5, 0.1),
    Threshold("growth_over_window", "above", math.log(100), math.log(10), needs=("expansive",)),
    Threshold("growth", "above", 2.0, log=True),
    Threshold("memory_over_window", "above", 0.0, 0.1, log=True, needs=("memory_known",)),
    Threshold("retention_at_memory", "below", -4.0, needs=("memory_known",)),
    Threshold("saturation", "above", 0.8, 0.1),
    Threshold("input_drive", "above", math.log10(4), log=True),
    Threshold("half_precision", "above", 0.5, 0.1),
    Threshold("graph_kept", "above", 0.5, 0.1),
    Threshold("learning_rate", "above", -1.0, log=True, needs=("adaptive",)),
)
TRIAL_TABLE: tuple[Threshold, ...] = (
    Threshold("trial_stopped", "above", 0.5, 0.1),
    Threshold("nonfinite_share", "above", 0.0, 0.1),
    Threshold("spike_rate", "above", 0.05, 0.05),
    Threshold("update_ratio", "above", -1.0),
    Threshold("loss_ratio", "above", 0.0, 0.1, log=True),
)
TABLE = STATIC_TABLE + TRIAL_TABLE
"""Rows of a trial are silent where none ran."""


def score(readings: Readings, table: tuple[Threshold, ...] = TABLE) -> float:
    """The largest excess over the table's rows: above zero the run is called faulty."""
    return max((row.excess(readings) for row in table), default=SILENT)


def level_score(readings: Readings) -> float:
    """1 and more for a level or an error finding that the health table calls a fault.

    Levels rank as the health table orders them; retention breaks ties within a level.
    """
    rank = {level: len(LEVELS) - LEVELS.index(level) for level in LEVELS}
    level = readings["level"]
    faulty = level in FAULTY_LEVELS or bool(readings["errors"])
    tie = min(max(-float(readings.get("retention_at_memory") or 0.0), 0.0), 300.0) / 301
    return (10.0 if faulty else -10.0) + rank[level] + tie


def readings_of(report: Report) -> dict[str, Any]:
    """Every scalar reading of the run and of the site with the worst level, flat, by name.

    loss_ratio: mean loss at the trial's end over its first loss; loss_change_ratio: the change
    over the loss before the trial.
    """
    run = report.now.run
    found = _scalars(run)
    sites = sorted(report.now.sites, key=lambda site: LEVELS.index(site.level))
    for site in sites[:1]:
        found |= _scalars(site)
        memory = site.memory_needed
        found["memory_over_window"] = None if memory is None else memory / max(site.window, 1)
        found["memory_known"] = site.memory_source in ("declared", "estimated") and not site.bypass
    if run.trial_steps:
        nonfinite = run.nonfinite_steps or 0
        found["nonfinite_share"] = nonfinite / run.trial_steps
        found["trial_stopped"] = run.trial_stopped is not None
        found["loss_ratio"] = _over(run.loss_above_start, run.loss, 1)
        found["loss_change_ratio"] = _over(run.loss_change, run.loss, 0)
    found["level"] = report.level
    found["half_precision"] = run.precision == "fp16"
    found["errors"] = sum(finding.severity == "error" for finding in report.findings)
    found["findings"] = " ".join(sorted({finding.code for finding in report.findings}))
    return found


def derived(readings: Readings) -> dict[str, Any]:
    """The readings with what follows from them: adaptive: whether Adam or a kin scales steps."""
    return dict(readings) | {"adaptive": readings.get("optimizer") in ("adam", "adamw")}


def with_trial(static: Readings, before: Readings, after: Readings) -> dict[str, Any]:
    """The readings of a static audit with those of another one's trial.

    before, after: that other audit without and with the trial; only what the trial changed
    there passes over, so that one trial serves audits that differ in what they were told.
    """
    found = dict(static) | {name: after[name] for name in TRIAL_READINGS if name in after}
    if after["level"] != before["level"]:
        found["level"] = min(static["level"], after["level"], key=LEVELS.index)
    found["errors"] = static["errors"] + max(0, after["errors"] - before["errors"])
    return found


Stored = Mapping[str, Readings]
VIEWS: dict[str, Callable[[Stored], Readings]] = {
    "memory estimated": lambda stored: stored["estimated"],
    "memory declared": lambda stored: stored["declared"],
    "memory estimated, trial": lambda stored: stored["trial"],
    "memory declared, trial": lambda stored: with_trial(
        stored["declared"], stored["estimated"], stored["trial"]
    ),
}
"""What is scored side by side, from the readings of every mode."""


def _over(change: float | None, loss: float | None, offset: float) -> float | None:
    return None if change is None or not loss or loss <= 0 else offset + change / loss


def _scalars(record: Record) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {k: v for k, v in dict(record).items() if v is None or isinstance(v, plain)}


def audited(stage: Stage, mode: str) -> Report:
    """The audit that a user would run before training, in one of the modes."""
    said = MODES[mode](stage)
    return rnnguard.audit(stage.model, stage.optimizer, stage.batches, loss=stage.loss, **said)


def judged(run: Run) -> dict[str, str]:
    """The row of one run: level, score and readings for every mode, and what an audit took."""
    row = {"task": run.task, "mutation": run.mutation, "seed": str(run.seed)}
    for mode in MODES:
        started = time.perf_counter()
        try:
            readings = readings_of(audited(staged(run), mode))
        except Exception as error:  # an audit that fails is a result of the benchmark
            readings = {
                "level": "unknown",
                "errors": 0,
                "findings": "",
                "failed": repr(error)[:200],
            }
        seconds = time.perf_counter() - started
        row |= {
            f"level {mode}": str(readings["level"]),
            f"score {mode}": f"{score(derived(readings)):.4g}",
            f"seconds {mode}": f"{seconds:.3f}",
            f"readings {mode}": json.dumps(_finite(readings), separators=(",", ":")),
        }
    return row


def _finite(readings: dict[str, Any]) -> dict[str, Any]:
    """Readings as JSON knows them: infinities as large numbers, NaN as nothing."""
    found: dict[str, Any] = {}
    for name, value in readings.items():
        if isinstance(value, float) and not math.isfinite(value):
            value = None if value != value else math.copysign(1e300, value)
        found[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    return found
