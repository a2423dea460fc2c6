"""A short training under given changes, of which only the losses remain."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from rnnguard.probe.subject import Subject
from rnnguard.probe.training import Training, as_in_training

RECENT = 5
# Sizes of the first loss by which the latest ones may lie above it: a wild start comes back.
WORST = 3.0


def order_of(batches: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: every batch once in an order of its own, then anew."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps / batches)
    drawn = [torch.randperm(batches, generator=generator) for _ in range(passes)]
    numbers: list[int] = torch.cat(drawn)[:steps].tolist()
    return numbers


def losses_of(
    subject: Subject, steps: int, seed: int, until: float = math.inf
) -> tuple[tuple[float, ...], str | None]:
    """The losses of real optimizer steps, and why they ended early if they did.

    The seed orders the batches and draws what the model draws. Hopeless courses end early, and
    so do all at `until` on the clock of `time.perf_counter`. Model and optimizer stay as trained:
    to be called under a Snapshot. Raises what model, loss or optimizer raise.
    """
    optimizer = subject.optimizer
    assert optimizer is not None
    training = Training(subject, optimizer)
    losses: list[float] = []
    torch.manual_seed(seed)
    with as_in_training(subject.model):
        for number in order_of(len(subject.batches.batches), steps, seed):
            if time.perf_counter() > until:
                return tuple(losses), "time was up"
            losses.append(training.plain_step(number))
            if words := _hopeless(losses):
                return tuple(losses), words
    return tuple(losses), None


def _hopeless(losses: Sequence[float]) -> str | None:
    """Why a course cannot come to anything, if so."""
    if not math.isfinite(losses[-1]):
        return f"the loss was not finite at step {len(losses)}"
    recent = statistics.fmean(losses[-RECENT:])
    if len(losses) > RECENT and recent - losses[0] > WORST * abs(losses[0]):
        return f"the loss had risen from {losses[0]:.3g} to {recent:.3g} by step {len(losses)}"
    return None
