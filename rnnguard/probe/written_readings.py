"""The readings of a hand-written recurrence, taken along its own autograd graph."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rnnguard.errors import RefusedError
from rnnguard.inspection.wiring import GateBias
from rnnguard.inspection.written import WrittenSite
from rnnguard.measurements import Exponent, SiteReadings
from rnnguard.probe.backflow import Backflow
from rnnguard.probe.exponents import FLOOR, exponents_of
from rnnguard.probe.readings import EXPONENTS, LONGEST, VECTORS, Memory
from rnnguard.probe.retention_curve import RetentionCurve, log10_retention_of


def with_backflow(site: WrittenSite) -> tuple[WrittenSite, Backflow]:
    """The site with what only the autograd graph tells: its sequences, their width, the window.

    A loss at the end flows back to the last cut only; one at every step passes each piece.
    RefusedError (RG912) where autograd cannot pass through single steps.
    """
    try:
        whole = Backflow(site.loop.carried.states)
        pieces = whole.pieces
    except RuntimeError as error:
        fact = f"autograd cannot pass through a step alone: {str(error).partition('. ')[0]}."
        cure = "Checkpoint with `use_reentrant=False`, and change no value that autograd needs."
        raise RefusedError.of("RG912", site.record.label, fact, cure) from error
    everywhere = site.record.readout in ("all_steps", "pooled")
    piece = max(pieces, key=len) if everywhere else pieces[-1]
    flow = whole if len(piece) == whole.steps else whole.within(piece)
    known = {"batch": flow.sequences, "hidden_size": flow.width, "window": len(piece)}
    return replace(site, record=site.record.model_copy(update=known)), flow


def measure_written(
    site: WrittenSite, flow: Backflow, memory: Memory, *, seed: int, trained: bool
) -> SiteReadings:
    """All readings of the site that need no knowledge of its gates; its level not yet judged."""
    generator = torch.Generator().manual_seed(seed)
    curve, spectrum = _retention(flow, generator), _exponents(flow, generator)
    leading = spectrum[0]
    record = site.record
    shared = {
        name: getattr(record, name)
        for name in SiteReadings.model_fields.keys() & type(record).model_fields.keys()
    }
    at_memory = None if memory.steps is None else curve.at(memory.steps)
    interval = None if memory.steps is None else curve.interval_at(memory.steps)
    return SiteReadings(
        **shared,
        exponents=spectrum,
        retention=curve.log10,
        retention_stderr=curve.stderr,
        layer_readings=(),
        decay_per_step=math.exp(leading.value),
        expansive=leading.value - 2 * leading.stderr > 0,
        growth=10 ** min(300.0, max(curve.log10)),
        growth_over_window=leading.value * record.window,
        effective_length=curve.effective_length(),
        effective_length_interval=curve.effective_length_interval(),
        memory_needed=memory.steps,
        memory_needed_interval=memory.interval,
        memory_source=memory.source,
        lag_concentration=memory.lag_concentration,
        retention_at_memory=at_memory,
        retention_at_memory_interval=interval,
        spectral_radius=None,
        whole_matrix_orthogonal=False,
        forget_gate=None,
        forget_bias=None,
        forget_bias_doubled=False,
        saturation=None,
        dead_units=None,
        input_rms=None,
        input_drive=None,
        output_rms=None,
        silent_input=False,
        trained=trained,
        keep_gate=bool(site.wiring.gates),
        entries=tuple(f"{e.weight}:{e.axis}:{e.start}:{e.stop}" for e in site.wiring.entries),
        gates=tuple(f"{_listed(g.keep)}/{_listed(g.write)}" for g in site.wiring.gates),
    )


def _listed(biases: tuple[GateBias, ...]) -> str:
    return "+".join(f"{b.bias}:{b.start}:{b.stop}:{b.sign}" for b in biases)


def _retention(flow: Backflow, generator: torch.Generator) -> RetentionCurve:
    def pull(lag: int, g: Tensor) -> Tensor:
        return flow.pull(flow.steps - lag, g)

    return log10_retention_of(
        pull,
        batch=flow.sequences,
        state_size=flow.width,
        steps=min(flow.steps - 1, LONGEST),
        vectors=VECTORS,
        generator=generator,
        like=flow.like,
    )


def _exponents(flow: Backflow, generator: torch.Generator) -> tuple[Exponent, ...]:
    """Those of the transposed product, which has the same singular values, back through time."""
    if flow.steps < 2:
        return (Exponent(value=FLOOR, stderr=0.0),)

    def pull(step: int, q: Tensor) -> Tensor:
        return flow.pull(flow.steps - 1 - step, q.mT).mT

    return exponents_of(
        pull,
        batch=flow.sequences,
        state_size=flow.width,
        steps=min(flow.steps - 1, LONGEST),
        count=min(EXPONENTS, flow.narrowest),
        generator=generator,
        like=flow.like,
    )
