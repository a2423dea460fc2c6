"""Recurrent models in every style that users write them, as specimens for tests."""

from __future__ import annotations

from itertools import chain

from zoo import (
    cells_in_loops,
    decoders,
    dynamics,
    fused,
    gated,
    handwritten,
    latent,
    loops,
    memories,
    no_recurrence,
    not_time,
    packed,
    refinement,
    research,
    scans,
    stable,
    states,
    wrapped,
)
from zoo.specimen import Kind, Specimen

__all__ = ["Kind", "Specimen", "ZOO"]

_BY_HAND = (handwritten, gated, loops, states, packed, research, stable, dynamics, latent)
_MIXED = (wrapped, memories, scans, decoders, fused, cells_in_loops)
_OTHER = (not_time, refinement, no_recurrence)

ZOO: list[Specimen] = list(
    chain.from_iterable(module.SPECIMENS for module in (*_BY_HAND, *_MIXED, *_OTHER))
)
