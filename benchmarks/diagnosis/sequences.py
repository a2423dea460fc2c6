"""The data of the tasks: each generator gives inputs, lengths if they differ, and targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Generator, Tensor

from rnnguard.demo import digit_sequences

Sample = tuple[Tensor, Tensor | None, Tensor]
Source = Callable[[int, int, Generator], Sample]
"""source(batch, steps, generator) -> (inputs, lengths or None, targets)."""

IGNORED = -100


def recall(batch: int, steps: int, generator: Generator) -> Sample:
    """The symbol of step 0 (one of 4) among N(0, 1) noise in a fifth channel."""
    label = torch.randint(4, (batch,), generator=generator)
    x = torch.zeros(batch, steps, 5)
    x[torch.arange(batch), 0, label] = 1
    x[:, 1:, 4] = torch.randn(batch, steps - 1, generator=generator)
    return x, None, label


def recall_of_lengths(batch: int, steps: int, generator: Generator) -> Sample:
    """Recall over sequences of half to full length, padded with zeros."""
    x, _, label = recall(batch, steps, generator)
    lengths = torch.randint(steps // 2, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    return _padded(x, lengths), lengths, label


def recent_of_lengths(batch: int, steps: int, generator: Generator) -> Sample:
    """Whether the last three values before the padding have a positive sum."""
    x = torch.randn(batch, steps, 1, generator=generator)
    lengths = torch.randint(steps // 4, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    ends = lengths[:, None] - torch.arange(1, 4)
    label = (x[torch.arange(batch)[:, None], ends, 0].sum(1) > 0).long()
    return _padded(x, lengths), lengths, label


def recent(batch: int, steps: int, generator: Generator) -> Sample:
    """Whether the last three values of N(0, 1) noise have a positive sum."""
    x = torch.randn(batch, steps, 1, generator=generator)
    return x, None, (x[:, -3:, 0].sum(1) > 0).long()


def spiky(batch: int, steps: int, generator: Generator) -> Sample:
    """The symbol of the step before the last among noise with rare outliers of twenty times."""
    label = torch.randint(4, (batch,), generator=generator)
    x = torch.zeros(batch, steps, 5)
    x[torch.arange(batch), -3, label] = 1
    noise = torch.randn(batch, steps, generator=generator)
    rare = torch.rand(batch, steps, generator=generator) < 0.01
    x[..., 4] = torch.where(rare, 20 * noise, noise)
    return x, None, label


def silent(batch: int, steps: int, generator: Generator) -> Sample:
    """Silence, with one pulse in one of 4 channels within the last eight steps."""
    label = torch.randint(4, (batch,), generator=generator)
    place = steps - 1 - torch.randint(8, (batch,), generator=generator)
    x = torch.zeros(batch, steps, 4)
    x[torch.arange(batch), place, label] = 1
    return x, None, label


def adding(batch: int, steps: int, generator: Generator) -> Sample:
    """The sum of the two marked values of a sequence of uniform ones."""
    rows = torch.arange(batch)
    x = torch.zeros(batch, steps, 2)
    x[..., 0] = torch.rand(batch, steps, generator=generator)
    first = torch.randint(steps // 2, (batch,), generator=generator)
    second = torch.randint(steps // 2, steps, (batch,), generator=generator)
    x[rows, first, 1] = x[rows, second, 1] = 1
    return x, None, (x[rows, first, 0] + x[rows, second, 0])[:, None]


def copying(batch: int, steps: int, generator: Generator) -> Sample:
    """Two symbols of 4, a silence, a cue, and the two symbols again as targets."""
    symbols = torch.randint(4, (batch, 2), generator=generator)
    x = torch.zeros(batch, steps, 5)
    x[:, :2].scatter_(2, symbols[..., None], 1)
    x[:, -2, 4] = 1
    y = torch.full((batch, steps), IGNORED)
    y[:, -2:] = symbols
    return x, None, y


def ordering(batch: int, steps: int, generator: Generator) -> Sample:
    """The order of two of two symbols, one early and one midway among four distractors."""
    rows = torch.arange(batch)
    tokens = torch.randint(2, 6, (batch, steps), generator=generator)
    marks = torch.randint(2, (batch, 2), generator=generator)
    for part, (low, high) in enumerate(((0.1, 0.2), (0.5, 0.6))):
        start, end = int(low * steps), max(int(high * steps), int(low * steps) + 1)
        tokens[rows, torch.randint(start, end, (batch,), generator=generator)] = marks[:, part]
    return torch.nn.functional.one_hot(tokens, 6).float(), None, marks[:, 0] * 2 + marks[:, 1]


def echo(batch: int, steps: int, generator: Generator) -> Sample:
    """Every step asks for the value of five steps before."""
    x = torch.rand(batch, steps, 1, generator=generator) * 2 - 1
    return x, None, torch.nn.functional.pad(x, (0, 0, 5, 0))[:, :steps]


def waves(batch: int, steps: int, generator: Generator) -> Sample:
    """Every step asks for the next value of a noisy sine of unknown frequency and phase."""
    frequency = 0.2 + 0.4 * torch.rand(batch, 1, generator=generator)
    phase = 6.28 * torch.rand(batch, 1, generator=generator)
    clean = torch.sin(frequency * torch.arange(steps + 1) + phase)[..., None]
    noise = 0.05 * torch.randn(batch, steps + 1, 1, generator=generator)
    return (clean + noise)[:, :-1], None, clean[:, 1:]


def tagging(batch: int, steps: int, generator: Generator) -> Sample:
    """Every token asks whether the token before it is larger than the one after it."""
    x = torch.randint(12, (batch, steps), generator=generator)
    before = torch.nn.functional.pad(x, (1, 0))[:, :steps]
    after = torch.nn.functional.pad(x, (0, 1))[:, 1:]
    return x, None, (before > after).long()


def digit_pixels(batch: int, steps: int, generator: Generator) -> Sample:
    """Handwritten digits pixel by pixel, (B, 64, 1)."""
    x, y = _drawn(batch, generator)
    return x, None, y


def digit_rows(batch: int, steps: int, generator: Generator) -> Sample:
    """Handwritten digits row by row, (B, 8, 8)."""
    x, y = _drawn(batch, generator)
    return x.reshape(batch, 8, 8), None, y


def _drawn(batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
    (x, y), held_out = _digits()
    # The held-out sample is the one draw that is larger than a training batch.
    if batch > 128:
        x, y = held_out
    pick = torch.randint(len(x), (batch,), generator=generator)
    return x[pick], y[pick]


@cache
def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return digit_sequences()


@cache
def text() -> tuple[Tensor, int]:
    """The standard library's own help text as character codes, and the alphabet's size."""
    from pydoc_data.topics import topics

    joined = "".join(topics[key] for key in sorted(topics))[:200_000]
    codes = {character: code for code, character in enumerate(sorted(set(joined)))}
    return torch.tensor([codes[character] for character in joined]), len(codes)


def streams(batch: int, steps: int, count: int, seed: int) -> list[Sample]:
    """`count` successive windows of `batch` parallel streams of text, targets one step ahead."""
    ids = text()[0]
    reach = steps * count + 1
    generator = torch.Generator().manual_seed(seed)
    # The last tenth is held out; its streams start there whatever the seed.
    held_out = seed >= 10**6
    low, high = (int(len(ids) * 0.9), len(ids)) if held_out else (0, int(len(ids) * 0.9))
    starts = low + torch.randint(high - low - reach, (batch, 1), generator=generator)
    rows = ids[starts + torch.arange(reach)]
    pairs = zip(
        torch.split(rows[:, :-1], steps, 1), torch.split(rows[:, 1:], steps, 1), strict=True
    )
    return [(x, None, y) for x, y in pairs]


def _padded(x: Tensor, lengths: Tensor) -> Tensor:
    return x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
