"""The batches of a run: as many as training asks for, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Generator, Tensor

from benchmarks.diagnosis import sequences
from benchmarks.diagnosis.sequences import IGNORED

Pair = tuple[Tensor, Tensor]
Draw = Callable[[int, int, Generator], Pair]
"""draw(batch, steps, generator) -> (inputs, targets)."""

HELD_OUT_SEED = 10**6
LARGEST_BATCH = 64
"""What is larger is the held-out set, which some data keep apart from the training batches."""
SYMBOLS, TAGS, FAR = 4, 12, 6
LEAD = 6
TAU = 17


class Stream:
    """Batches by number, drawn when first asked for; iterating gives those of one budget."""

    def __init__(self, draw: Draw, batch: int, steps: int, seed: int, count: int) -> None:
        self._draw, self._batch, self._steps, self._count = draw, batch, steps, count
        self._generator = Generator().manual_seed(1000 + seed)
        self._drawn: list[Pair] = []

    def __getitem__(self, index: int) -> Pair:
        while len(self._drawn) <= index:
            self._drawn.append(self._draw(self._batch, self._steps, self._generator))
        return self._drawn[index]

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(self._count))

    def __len__(self) -> int:
        return self._count


@cache
def held_out(draw: Draw, count: int, steps: int) -> Pair:
    """The fixed set that every run of a task is scored on."""
    return draw(count, steps, Generator().manual_seed(HELD_OUT_SEED))


def without_lengths(source: sequences.Source) -> Draw:
    """A source of equally long sequences without the lengths that it does not have."""

    def draw(batch: int, steps: int, generator: Generator) -> Pair:
        x, _, y = source(batch, steps, generator)
        return x, y

    return draw


def copying(batch: int, steps: int, generator: Generator) -> Pair:
    """Five symbols of four, silence, a cue, and the five symbols again as targets."""
    count = 5
    symbols = torch.randint(SYMBOLS, (batch, count), generator=generator)
    x = torch.zeros(batch, steps, SYMBOLS + 1)
    x[:, :count].scatter_(2, symbols[..., None], 1)
    x[:, -count - 1, SYMBOLS] = 1
    y = torch.full((batch, steps), IGNORED)
    y[:, -count:] = symbols
    return x, y


def tagging(batch: int, steps: int, generator: Generator) -> Pair:
    """Whether the token six steps before is larger than that six steps after: half from each side.

    One direction alone knows the first of the two, and is right three times in four at best.
    """
    x = torch.randint(TAGS, (batch, steps), generator=generator)
    y = torch.full((batch, steps), IGNORED)
    y[:, FAR:-FAR] = (x[:, : -2 * FAR] > x[:, 2 * FAR :]).long()
    return x, y


def permuted_digits(batch: int, steps: int, generator: Generator) -> Pair:
    """Handwritten digits pixel by pixel, all in the same random order."""
    x, _, y = sequences.digit_pixels(batch, steps, generator)
    return x[:, torch.randperm(steps, generator=Generator().manual_seed(0))], y


def characters(batch: int, steps: int, generator: Generator) -> Pair:
    """Windows of the standard library's help text; every step asks for the next character."""
    ids = sequences.text()[0]
    cut = int(len(ids) * 0.9)
    low, high = (cut, len(ids)) if batch > LARGEST_BATCH else (0, cut)
    starts = low + torch.randint(high - low - steps - 1, (batch, 1), generator=generator)
    rows = ids[starts + torch.arange(steps + 1)]
    return rows[:, :-1], rows[:, 1:]


def forecast(batch: int, steps: int, generator: Generator) -> Pair:
    """Windows of a noisy Mackey-Glass series; every step asks for the value six steps ahead."""
    series = mackey_glass()
    cut = int(len(series) * 0.8)
    low, high = (cut, len(series)) if batch > LARGEST_BATCH else (0, cut)
    starts = low + torch.randint(high - low - steps - LEAD, (batch, 1), generator=generator)
    rows = series[starts + torch.arange(steps + LEAD)]
    noise = 0.1 * torch.randn(batch, steps, generator=generator)
    return (rows[:, :steps] + noise)[..., None], rows[:, LEAD:][..., None]


@cache
def mackey_glass(length: int = 20_000, fine: int = 10) -> Tensor:
    """x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x by Euler steps of 0.1, mean 0, variance 1."""
    delay = TAU * fine
    x = [1.2] * (delay + 1)
    for _ in range((length + 500) * fine):
        past = x[-1 - delay]
        x.append(x[-1] + (0.2 * past / (1 + past**10) - 0.1 * x[-1]) / fine)
    series = torch.tensor(x[-length * fine :: fine])
    return (series - series.mean()) / series.std()
