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


# What a user says to the audit besides model, optimizer, data and loss; each mode is judged apart.
MODES: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "estimated": lambda stage: {},
    "declared": lambda stage: {"memory": stage.task.declared_memory(stage.setting)},
}


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


# The health table of the design as signs with a magnitude; rows of a trial speak where it ran.
TABLE: tuple[Threshold, ...] = (
    Threshold("nonfinite", "above", 0.5, 0.1),
    Threshold("growth_over_window", "above", math.log(100), math.log(10), needs=("expansive",)),
    Threshold("growth", "above", 2.0, log=True),
    Threshold("memory_over_window", "above", 0.1, 0.1, log=True, needs=("memory_known",)),
    Threshold("retention_at_memory", "below", -4.0, needs=("memory_known",)),
    Threshold("saturation", "above", 0.8, 0.1),
    Threshold("input_drive", "above", math.log10(4), log=True),
    Threshold("half_precision", "above", 0.5, 0.1),
    Threshold("trial_stopped", "above", 0.5, 0.1),
    Threshold("nonfinite_share", "above", 0.0, 0.1),
    Threshold("spike_rate", "above", 0.05, 0.05),
    Threshold("recurrent_update_ratio", "above", -1.0),
    Threshold("loss_ratio", "above", 0.0, 0.1, log=True),
)


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
    """Every scalar reading of the run and of the site with the worst level, flat, by name."""
    measurement = report.now
    found = _scalars(measurement.run)
    sites = sorted(measurement.sites, key=lambda site: LEVELS.index(site.level))
    for site in sites[:1]:
        found |= _scalars(site)
        memory = site.memory_needed
        found["memory_over_window"] = None if memory is None else memory / max(site.window, 1)
        found["memory_known"] = site.memory_source in ("declared", "estimated")
    trial = getattr(report, "trial", None)
    found |= trial_readings(trial) if trial is not None else {}
    found["level"] = report.level
    found["half_precision"] = measurement.run.precision == "fp16"
    found["errors"] = sum(finding.severity == "error" for finding in report.findings)
    found["findings"] = " ".join(sorted({finding.code for finding in report.findings}))
    return found


def trial_readings(trial: Any) -> dict[str, Any]:
    """What a trial showed, flat; `trial` has the fields of `rnnguard.probe.trial.Trial`.

    loss_ratio: mean loss of the last fifth over the first loss. loss_change_errors: change of
    the loss in its own standard errors.
    """
    steps = max(trial.steps, 1)
    change, error = trial.loss_change, trial.loss_change_stderr
    first = trial.losses[0] if trial.losses else 0.0
    last = None if trial.loss_above_start is None else trial.loss_above_start + first
    return {
        "trial_stopped": trial.stopped is not None and trial.stopped.stage != "time",
        "nonfinite_share": len(trial.nonfinite_steps) / steps,
        "spike_rate": trial.spike_rate,
        "clip_fraction": trial.clip_fraction,
        "recurrent_update_ratio": trial.recurrent_update_ratio,
        "largest_update_ratio": max(trial.update_ratios.values(), default=None),
        "trial_norm": trial.median_norm,
        "loss_ratio": last / first if last is not None and first > 0 else None,
        "loss_change_errors": change / error if change is not None and error else None,
    }


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
            f"score {mode}": f"{score(readings):.4g}",
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
