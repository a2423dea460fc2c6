"""The memory that the data demand: how far back a read-out must look to predict the target.

Read-outs of the last k steps are cross-validated for growing k; the memory needed is the
smallest k whose loss is within one standard error of the best, or the longest lag that a test
by itself is sure of. Where neither finds a signal, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from rnnguard.probe.demand_data import Part, parts_of, sequences_of
from rnnguard.probe.history import Array, Sequences, families, histories, scaled
from rnnguard.probe.lagscan import partial_p_values, scan_lags
from rnnguard.probe.samples import Samples, samples_of
from rnnguard.probe.small_systems import one_thread
from rnnguard.probe.window_readouts import (
    CHOSEN_LAGS,
    CLEAR,
    SUPPORTED,
    DenseReadouts,
    Fit,
    clear_gain,
    fewest_within,
    ladder,
    score,
    sparse_fit,
    tree_fit,
)
from rnnguard.records import Record

FEWEST = 48  # targets; below that, a score is mostly noise
SEQUENCES = 8  # with a target at every step
SAMPLES = 2048  # targets that read-outs are fitted to
VALUES = 8_000_000  # of those targets' histories, beyond which fewer are drawn
FEWER = 512
LONGEST = 2000  # steps looked back
ENOUGH = 0.95  # of the variance: what explains so much needs no richer features
PLAUSIBLE = 2.0  # standard errors; the lower end of the interval
EQUAL = 0.5  # standard errors; the upper end
TREE_COLUMNS = 500  # beyond which they find nothing that a line did not
RUNGS = 8  # windows between two rungs of the ladder, per refinement
REFINEMENTS = 2


@dataclass(frozen=True)
class Demand:
    """What the data ask for, in steps, with the scores that say so.

    `steps` is the memory needed, between `low` and `high`; `half` the window that already
    gives half of what the best one gives above chance; scores are balanced accuracies, or R^2
    for real-valued targets; `lags` go with the target at a false discovery rate of 5 %.
    """

    steps: int
    half: int
    score: float
    chance: float
    windows: tuple[int, ...]
    scores: tuple[float, ...]
    low: int
    high: int
    lags: tuple[int, ...]

    @property
    def concentration(self) -> float:
        """1 when all of the information lies at the longest lag, small when it is spread."""
        return self.half / self.steps


class MemoryDemand(Record):
    """The memory that data demand, in steps; all None where there is no signal to tell.

    `steps` is the number of last steps that must be remembered (1: the target depends on the
    present step alone), between `low` and `high`: the shortest window within two standard
    errors of the best one, and the shortest that is as good or holds every sure lag. `half`
    is the window that already gives half of what the best gives above chance. `scores` are
    those of the best read-out by window: balanced accuracy (chance is 1 over the number of
    classes) or R^2 (chance 0). `lags` are those associated with the target, 0 being the
    target's own step, at a false discovery rate of 5 %.
    """

    steps: int | None = None
    low: int | None = None
    high: int | None = None
    half: int | None = None
    source: Literal["estimated", "unknown"] = "unknown"
    score: float | None = None
    chance: float | None = None
    windows: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    lags: tuple[int, ...] = ()


def memory_demand(data: Any, *, seed: int = 0, batch_first: bool = True) -> MemoryDemand:
    """How many last steps of the inputs a prediction of the target needs, with an interval.

    data: an iterable of (inputs, target) batches, or one such pair; at most 2048 sequences
    and 2000 steps back are looked at. inputs: real values (B, T, F) or (B, T), integer token
    ids (B, T), a pair of padded inputs and lengths (B,), or a PackedSequence; (T, B, ...)
    unless `batch_first`. target: per sequence (B,) or (B, 1), classes (integer or bool) or
    real values, told after its last step; or per step (B, T) or (B, T, 1..16), where the class
    -100 marks steps without one, and only what goes beyond each step's own mean is predicted.

    The source is "unknown" where no read-out is clearly better than chance, where fewer than
    48 targets or 8 sequences are given, and where a value is not finite. Read-outs are linear
    in the channels of each step, of up to 6 channels also in their squares and products; what
    only several steps together tell (parity) is sought by trees, and rarely found.

    Raises RefusedError (RG912) for data of another form. Windows by cross-validation over
    sequences and the one-standard-error rule (Hastie, Tibshirani and Friedman, The Elements of
    Statistical Learning, section 7.10); lags as in `scan_lags`.
    """
    sequences = sequences_of(parts_of(data, batch_first))
    found = None if sequences is None else _demand(sequences, seed)
    if found is None:
        return MemoryDemand()
    fields = {name: getattr(found, name) for name in Demand.__dataclass_fields__}
    return MemoryDemand(source="estimated", **fields)


def demand_of(parts: list[Part], seed: int = 0) -> Demand | None:
    """The memory demanded by batches as a recurrence sees them; None when unclear."""
    sequences = sequences_of(parts) if parts else None
    return None if sequences is None else _demand(sequences, seed)


@one_thread()
def _demand(sequences: Sequences, seed: int) -> Demand | None:
    """From the best clear read-out and the tests lag by lag."""
    count = len(np.unique(sequences.rows))
    if len(sequences.rows) < FEWEST or count < SEQUENCES:
        return None
    reach = min(sequences.longest, LONGEST)
    values = scaled(sequences.values, seed)
    if values.shape[2] == 0:
        return None
    affordable = VALUES // (reach * values.shape[2])
    drawn = sequences.drawn(min(SAMPLES, max(FEWER, affordable)), seed)
    if not drawn.varies:
        return None
    samples = samples_of(drawn, sequences, seed)
    *_, richest = families(values)
    scan = scan_lags(richest, sequences, reach)
    found = _best_readout(values, drawn, samples, reach, seed, bool(scan.sure))
    if found is None:
        return None
    fit = found.fit
    for _ in range(REFINEMENTS):
        fit = _refined(fit, found.refit, samples)
    others = None
    if not sequences.per_step:
        others = partial_p_values(found.dense.x, found.dense.without_each_lag(), samples.classes)
    return _summarised(fit, samples, scan.found(others), max(scan.sure, default=-1) + 1)


@dataclass(frozen=True, eq=False)
class _Readout:
    """A read-out of features x (n, L, D), how to fit it to other windows, and the dense ones."""

    x: Array
    dense: DenseReadouts
    fit: Fit
    refit: Callable[[Sequence[int]], Fit]


def _best_readout(
    values: Array, drawn: Sequences, samples: Samples, reach: int, seed: int, supported: bool
) -> _Readout | None:
    """The simplest read-out that no other beats by more than its error; None if none is clear."""
    chance = SUPPORTED if supported else CLEAR
    tried: list[_Readout] = []
    gains: list[float] = []
    for features in families(values):
        tried += _lines(histories(features, drawn, reach), samples)
        gains += [clear_gain(r.fit, samples, chance) for r in tried[len(gains) :]]
        if max(gains) > ENOUGH:
            break
    if not any(gains):
        tried.append(_trees(tried[0], samples, seed))
        gains.append(clear_gain(tried[-1].fit, samples, chance))
    clear = [readout for readout, gain in zip(tried, gains, strict=True) if gain]
    if not clear:
        return None
    best = min((r.fit.losses[r.fit.best] for r in clear), key=lambda losses: float(losses.mean()))
    for readout in clear:
        gap, error = samples.mean_and_error(readout.fit.losses[readout.fit.best] - best)
        if gap <= error:
            return readout
    return None


def _lines(x: Array, samples: Samples) -> Iterator[_Readout]:
    """Ridge read-outs of whole windows, and of few lags."""
    windows = ladder(x.shape[1])
    dense = DenseReadouts(x, samples)
    yield _Readout(x, dense, dense.fit(windows), dense.fit)
    for lags in CHOSEN_LAGS:
        sparse = partial(sparse_fit, x, samples, lags=lags)
        yield _Readout(x, dense, sparse(windows), sparse)


def _trees(line: _Readout, samples: Samples, seed: int) -> _Readout:
    """On the features of a line."""
    x = line.x
    refit = partial(tree_fit, x, samples, seed=seed)
    # Every fourth rung, since trees are slow and only asked whether there is anything at all.
    few = [k for k in ladder(x.shape[1])[::-4] if k * x.shape[2] <= TREE_COLUMNS] or [1]
    return _Readout(x, line.dense, refit(few[::-1]), refit)


def _refined(fit: Fit, refit: Callable[[Sequence[int]], Fit], samples: Samples) -> Fit:
    """With more windows below those that the rules choose."""
    wanted: set[int] = set()
    for errors in (1.0, PLAUSIBLE):
        place = fewest_within(fit, samples, errors)
        high, low = fit.windows[place], fit.windows[place - 1] if place else 0
        between = np.linspace(low, high, RUNGS + 2).round().astype(int)
        wanted |= set(between.tolist()) - {low, high, 0}
    return fit.joined(refit(sorted(wanted))) if wanted else fit


def _summarised(fit: Fit, samples: Samples, lags: tuple[int, ...], sure: int) -> Demand:
    """`sure` is the window that holds every sure lag."""
    windows, losses = fit.windows, fit.losses.mean(1)
    chosen = fewest_within(fit, samples, 1.0)
    base = float(samples.baseline.mean())
    half = next(p for p, loss in enumerate(losses) if loss <= (base + losses.min()) / 2)
    steps = max(windows[chosen], sure)
    return Demand(
        steps=steps,
        half=min(windows[half], steps),
        score=score(fit.predictions[fit.best], samples),
        chance=1 / samples.classes if samples.classes else 0.0,
        windows=windows,
        scores=tuple(score(predictions, samples) for predictions in fit.predictions),
        low=windows[fewest_within(fit, samples, PLAUSIBLE)],
        high=max(steps, windows[fewest_within(fit, samples, EQUAL)]),
        lags=lags,
    )
