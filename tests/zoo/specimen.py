"""What a specimen says of itself, and how its model and its inputs are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

Kind = Literal["native", "written", "iterations", "tree", "none"]
Draw = Callable[[Generator], Any]
Inputs = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Specimen:
    """One model as users write it, and what a careful reader would say of its recurrences.

    build    a new model, always with the same weights
    inputs   the arguments of forward, always the same
    kind     native: all its recurrences over time are torch's own modules or cells;
             written: at least one is spelled out by the user; iterations: the loop refines
             something and is not time; tree: the loop follows a tree; none: no recurrence
    steps    time steps of the recurrences (rounds of iterations, nodes of a tree, 0 for none);
             differs from every other size, so that the axis of time can be told
    sites    recurrences of that kind: one per fused module (all layers and directions), one
             per set of weights that is stepped through time
    window   the most steps that a gradient passes; None: all of them
    weights  the names in state_dict of what acts on the carried state of a written recurrence
    note     what makes it worth keeping
    causal   the first tensor of the output has an axis of time and never looks ahead
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    kind: Kind
    steps: int
    sites: int
    window: int | None
    weights: tuple[str, ...]
    note: str
    causal: bool


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return make()


def _drawn(draws: tuple[Draw, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(11)
    return tuple(draw(generator) for draw in draws)


def drawn(*draws: Draw) -> Inputs:
    """The arguments of forward, drawn one after the other."""
    return partial(_drawn, draws)


def floats(*shape: int) -> Draw:
    """Standard-normal numbers of that shape."""
    return lambda generator: torch.randn(*shape, generator=generator)


def tokens(*shape: int, below: int) -> Draw:
    """Integer ids of that shape."""
    return lambda generator: torch.randint(below, shape, generator=generator)


def mask(*shape: int) -> Draw:
    """Zeros and ones of that shape as float."""
    return lambda generator: (torch.rand(*shape, generator=generator) < 0.9).float()


def positive(*shape: int) -> Draw:
    """Numbers between 0.1 and 1.1, such as gaps in time."""
    return lambda generator: torch.rand(*shape, generator=generator) + 0.1


def fixed(value: Any) -> Draw:
    """The same value every time; a tensor is copied."""
    return lambda _: value.clone() if isinstance(value, Tensor) else value


def written(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Inputs,
    steps: int,
    weights: tuple[str, ...],
    note: str,
    *,
    sites: int = 1,
    window: int | None = None,
    causal: bool = True,
) -> Specimen:
    """A recurrence over time that the user spelled out."""
    build = partial(_seeded, make)
    return Specimen(name, build, inputs, "written", steps, sites, window, weights, note, causal)


def native(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Inputs,
    steps: int,
    note: str,
    *,
    sites: int = 1,
    window: int | None = None,
    causal: bool = True,
) -> Specimen:
    """Recurrences over time that are torch's own modules or cells."""
    build = partial(_seeded, make)
    return Specimen(name, build, inputs, "native", steps, sites, window, (), note, causal)


def not_time(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Inputs,
    kind: Literal["iterations", "tree", "none"],
    rounds: int,
    note: str,
) -> Specimen:
    """A model whose loop, if it has one, is no recurrence over time."""
    sites = 0 if kind == "none" else 1
    build = partial(_seeded, make)
    return Specimen(name, build, inputs, kind, rounds, sites, None, (), note, False)
