"""AUTOTRAINER's symptoms (ICSE 2021) by its published thresholds, read off a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

VANISHING_RATIO, VANISHING_NORM, EXPLODING_RATIO = 1e-3, 1e-4, 70.0
DEAD_SHARE, LOST_LOSS = 0.7, 1e3
SWING, SWING_SHARE = 0.03, 0.2
TOO_LOW, NO_GAIN = 0.6, 0.01


@dataclass
class Watched:
    """What a training has shown: an accuracy per epoch, and its gradients and loss by now."""

    accuracies: list[float] = field(default_factory=list)
    first: float = 1.0
    last: float = 1.0
    dead: float = 0.0
    loss: float = 0.0
    finite: bool = True

    def look(self, model: nn.Module, loss: Tensor) -> None:
        """Reads gradients and loss right after a step."""
        weights = [p for p in model.parameters() if p.ndim > 1 and p.grad is not None]
        gradients = [p.grad for p in weights if p.grad is not None]
        if not gradients:
            return
        self.first, self.last = float(gradients[0].norm()), float(gradients[-1].norm())
        entries = sum(g.numel() for g in gradients)
        self.dead = sum(int((g == 0).sum()) for g in gradients) / entries
        self.finite = all(bool(torch.isfinite(t).all()) for t in (*gradients, *weights))
        self.loss = float(loss)

    def symptom(self, epochs: int, every: int) -> str:
        """The first symptom that a check finds; none before 30 % of the planned epochs.

        A model whose activations fit its loss has no other ones than these.
        """
        done = len(self.accuracies)
        if done < 0.3 * epochs - every:
            return ""
        checks = self.accuracies[every - 1 :: every]
        gain = max((after - before for before, after in pairwise(checks)), default=math.inf)
        if max(self.accuracies) < TOO_LOW or gain < NO_GAIN:
            if self.dead >= DEAD_SHARE:
                return "dying"
            if self.first > EXPLODING_RATIO * self.last or self._lost():
                return "explode"
            if self.first < min(VANISHING_RATIO * self.last, VANISHING_NORM):
                return "vanish"
            if max(self.accuracies) < TOO_LOW and gain < NO_GAIN:
                return "not converging"
        return "unstable" if swings(self.accuracies) >= SWING_SHARE * done else ""

    def _lost(self) -> bool:
        return not self.finite and not (math.isfinite(self.loss) and self.loss < LOST_LOSS)


def swings(accuracies: Sequence[float]) -> int:
    """How many local maxima lie above the local minimum of the same number by 0.03 or more."""
    inner = range(1, len(accuracies) - 1)
    a = accuracies
    peaks = [a[i] for i in inner if a[i - 1] < a[i] > a[i + 1]]
    dips = [a[i] for i in inner if a[i - 1] > a[i] < a[i + 1]]
    return sum(abs(high - low) >= SWING for high, low in zip(peaks, dips, strict=False))
