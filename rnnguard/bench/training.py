"""Training on windows of a text, and what is measured on the text held out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from rnnguard.bench.models import CharacterModel
from rnnguard.bench.text import Text
from rnnguard.probe import retention
from rnnguard.probe.results import Retention

Windows = Sequence[tuple[Tensor, Tensor]]

BLOCK = 16
"""Steps between two looks at losses and norms, each of which waits for an accelerator."""
CHUNK = 256
"""Steps of the held-out text that are predicted at a time."""


@dataclass(frozen=True)
class Steps:
    """Some steps in a row: losses in nats per character, norms before the clip, seconds.

    timed: those of the steps that the seconds are of; the first of all is left out, since
    it pays for what is made once.
    """

    losses: list[float]
    norms: list[float]
    seconds: float
    timed: int


def streams(text: str, characters: str, count: int) -> Tensor:
    """The text as `count` rows of numbers (count, N), one after the other; the rest is left out.

    A character's number is its place in `characters`, which are in order.
    """
    known, found = (numpy.frombuffer(t.encode("utf-32-le"), "<u4") for t in (characters, text))
    ids = torch.from_numpy(numpy.searchsorted(known, found))
    return ids[: len(ids) // count * count].view(count, -1)


def windows_of(rows: Tensor, length: int) -> Windows:
    """(ids, next ids) of at most `length` steps, in reading order."""
    last = rows.shape[1] - 1
    ends = ((start, min(start + length, last)) for start in range(0, last, length))
    return [(rows[:, start:end], rows[:, start + 1 : end + 1]) for start, end in ends]


def training_windows(text: Text, batch: int, length: int, device: str) -> Windows:
    """The windows of the training text that are full; one pass over them is an epoch."""
    rows = streams(text.training, text.characters, batch).to(device)
    return [window for window in windows_of(rows, length) if window[0].shape[1] == length]


def train_(
    model: CharacterModel, optimizer: Optimizer, windows: Windows, steps: int
) -> Iterator[Steps]:
    """Trains with the state carried from window to window; gives what came of every 16 steps.

    The gradient goes back through one window. Ends after the first loss that is not finite.
    """
    state, rows, begun, timed = None, list[Tensor](), time.perf_counter(), 0
    for step in range(steps):
        ids, following = windows[step % len(windows)]
        if step % len(windows) == 0:
            state = None  # the text starts again
        optimizer.zero_grad()
        logits, state = model(ids, state)
        loss = cross_entropy(logits.flatten(0, 1), following.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        # A guard clips inside the step, so this is the norm that it finds.
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        state = _detached(state)
        rows.append(torch.stack([loss.detach(), norm]))
        timed += step > 0
        if step == 0 or len(rows) == BLOCK or step == steps - 1:
            found = torch.stack(rows).tolist()
            seconds = time.perf_counter() - begun if timed else 0.0
            ended = next(
                (i + 1 for i, (loss, _) in enumerate(found) if not math.isfinite(loss)), None
            )
            losses, norms = zip(*found[:ended], strict=True)
            yield Steps([*losses], [*norms], seconds, timed)
            if ended:
                return
            rows, begun, timed = [], time.perf_counter(), 0


@torch.no_grad()
def bits_per_character(model: CharacterModel, rows: Tensor) -> float:
    """Mean bits of what follows each character of the rows (B, N), the state carried along."""
    state, nats = None, 0.0
    for ids, following in windows_of(rows, CHUNK):
        logits, state = model(ids, state)
        each = cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
        nats += float(each.cpu().double().sum())
    return nats / (rows.shape[0] * (rows.shape[1] - 1)) / math.log(2)


@torch.no_grad()
def retained(
    model: CharacterModel, rows: Tensor, warm_up: int, window: int, seed: int
) -> Retention:
    """The retention of the recurrence over `window` steps of the rows, behind those to warm up."""
    _, state = model(rows[:, :warm_up])
    inputs = model.embedding(rows[:, warm_up : warm_up + window])
    return retention(model.recurrence, inputs, state=state, seed=seed)


def _detached(state: Any) -> Any:
    return state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)
