"""The learning-rate finder (Smith 2017) with the defaults that its common packages publish."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

from benchmarks.outcomes.accounting import step
from benchmarks.outcomes.policies import Case, Prepared, clipped

LOWEST, HIGHEST, SWEEP = 1e-7, 10.0, 100
SMOOTHING, DIVERGED = 0.05, 5.0
SKIPPED_FIRST, SKIPPED_LAST = 10, 5


def found_rate_and_clip(case: Case) -> Prepared:
    """An exponential sweep over the first batches, the steepest slope as the rate, clip 1."""
    kept = {name: value.clone() for name, value in case.model.state_dict().items()}
    before = copy.deepcopy(case.optimizer.state_dict())
    rates, losses = _swept(case)
    case.model.load_state_dict(kept)
    case.optimizer.load_state_dict(before)
    rate = steepest(rates, losses)
    if rate is None:
        return clipped(case, done="no rate found")
    for group in case.optimizer.param_groups:
        group["lr"] = rate
    return clipped(case, done=f"rate {rate:.2g}")


def _swept(case: Case) -> tuple[list[float], list[float]]:
    rates: list[float] = []
    losses: list[float] = []
    for index in range(SWEEP):
        rate = LOWEST * (HIGHEST / LOWEST) ** (index / (SWEEP - 1))
        for group in case.optimizer.param_groups:
            group["lr"] = rate
        loss = float(step(case.model, case.optimizer, case.loss, case.data[index])[0])
        smooth = SMOOTHING * loss + (1 - SMOOTHING) * losses[-1] if losses else loss
        if not math.isfinite(smooth):
            break
        rates.append(rate)
        losses.append(smooth)
        if smooth > DIVERGED * min(losses):
            break
    return rates, losses


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate where the smoothed loss falls fastest, both ends of the sweep left out."""
    inner = slice(SKIPPED_FIRST, len(losses) - SKIPPED_LAST)
    if len(losses[inner]) < 2:
        return None
    return float(rates[inner][int(np.gradient(np.array(losses[inner])).argmin())])
