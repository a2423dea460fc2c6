"""The memory that the data demand: how far back a read-out must look to predict the target.

Over growing windows of the last k steps a read-out is cross-validated; the memory needed is
the smallest k whose score is within noise of the best. A linear read-out comes first; trees
follow where it finds nothing. Where neither beats chance, nothing is claimed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDS = 3
FEWEST = 48  # sequences; below that, a score is mostly noise
CLEAR = 3.0  # standard errors above chance before anything is claimed


@dataclass(frozen=True)
class Demand:
    """What the data ask for, in steps, with the scores that say so.

    `steps` is the memory needed; `half` the window that already gives half of what the
    best one gives above chance; scores are accuracies, or R^2 for real-valued targets.
    """

    steps: int
    half: int
    score: float
    chance: float
    windows: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def concentration(self) -> float:
        """1 when all of the information lies at the longest lag, small when it is spread."""
        return self.half / self.steps


def memory_demand(
    inputs: Sequence[Tensor], lengths: Sequence[Tensor], targets: Sequence[Tensor], seed: int = 0
) -> Demand | None:
    """The memory demanded by batches of sequences with one target each; None when unclear.

    inputs: (T, B, F) each; lengths: (B,) each; targets: (B,) classes or (B,) or (B, 1) reals.
    """
    target = _target(targets)
    longest = max(int(length.max()) for length in lengths)
    if target is None or len(target) < FEWEST or longest < 2:
        return None
    rows = np.concatenate(
        [_right_aligned(x, n, longest) for x, n in zip(inputs, lengths, strict=True)]
    )
    if len(np.unique(target)) < 2 or not (np.isfinite(rows).all() and np.isfinite(target).all()):
        return None
    windows = ladder(longest)
    for readout in _readouts(target, seed):
        best, error = _score(readout, rows, target, longest)
        chance = _chance(target)
        if best - chance > max(CLEAR * error, 0.1 * (1 - chance)):
            scores = [_score(readout, rows, target, k)[0] for k in windows]
            return _summarised(windows, scores, chance, error)
    return None


def ladder(longest: int) -> tuple[int, ...]:
    """Windows 1, 2, 3, 4, 6, 8, 11, ... up to the longest, a factor of sqrt(2) apart."""
    powers = range(2 * math.ceil(math.log2(longest)) + 1)
    return tuple(sorted({min(longest, round(2 ** (p / 2))) for p in powers} | {longest}))


def _summarised(
    windows: tuple[int, ...], scores: list[float], chance: float, error: float
) -> Demand:
    best = max(scores)
    middle = chance + (best - chance) / 2
    steps = next(k for k, score in zip(windows, scores, strict=True) if score >= best - error)
    half = next(k for k, score in zip(windows, scores, strict=True) if score >= middle)
    return Demand(steps, min(half, steps), best, chance, windows, tuple(scores))


def _target(targets: Sequence[Tensor]) -> np.ndarray[Any, Any] | None:
    """One number per sequence, as an array; None for targets of any other form."""
    flat = [t.detach().cpu() for t in targets]
    flat = [t[:, 0] if t.dim() == 2 and t.shape[1] == 1 else t for t in flat]
    if any(t.dim() != 1 or t.is_complex() for t in flat):
        return None
    joined = torch.cat(flat)
    return joined.double().numpy() if joined.is_floating_point() else joined.numpy()


def _right_aligned(x: Tensor, lengths: Tensor, longest: int) -> np.ndarray[Any, Any]:
    """(B, longest, F) with every sequence's last step at the end and zeros before its start."""
    _, batch, width = x.shape
    rows = np.zeros((batch, longest, width), dtype=np.float32)
    values = x.detach().float().cpu().numpy()
    for row, length in enumerate(lengths.tolist()):
        rows[row, longest - length :] = values[:length, row]
    return rows


def _is_class(target: np.ndarray[Any, Any]) -> bool:
    return bool(target.dtype.kind in "biu")


def _chance(target: np.ndarray[Any, Any]) -> float:
    """What predicting the commonest class, or the mean, would score."""
    if not _is_class(target):
        return 0.0
    return float(np.unique(target, return_counts=True)[1].max() / len(target))


def _readouts(target: np.ndarray[Any, Any], seed: int) -> list[Any]:
    from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
    from sklearn.linear_model import RidgeClassifier, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    trees = {"n_estimators": 60, "random_state": seed, "n_jobs": 1}
    if _is_class(target):
        linear, forest = RidgeClassifier(alpha=30.0), ExtraTreesClassifier(**trees)
    else:
        linear, forest = RidgeCV(alphas=(1.0, 30.0, 1000.0)), ExtraTreesRegressor(**trees)
    return [make_pipeline(StandardScaler(), linear), forest]


def _score(
    readout: Any, rows: np.ndarray[Any, Any], target: np.ndarray[Any, Any], window: int
) -> tuple[float, float]:
    """Cross-validated score over sequences of the last `window` steps, and its error."""
    from sklearn.model_selection import KFold, cross_val_score

    features = rows[:, -window:].reshape(len(rows), -1)
    folds = KFold(FOLDS, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # That classes are rare in a fold is told by the score.
        warnings.simplefilter("ignore")
        scores = cross_val_score(readout, features, target, cv=folds)
    mean = float(scores.mean())
    spread = mean * (1 - mean) if _is_class(target) else (1 - mean) ** 2
    return mean, math.sqrt(max(spread, 1e-4) / len(target))
