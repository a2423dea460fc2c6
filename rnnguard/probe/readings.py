"""One site's readings, put together from its trajectories; and those of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rnnguard.inspection.gates import GATES, gate_bias, recurrent_block
from rnnguard.inspection.provenance import is_orthogonal_across_gates
from rnnguard.inspection.sites import FoundSite
from rnnguard.probe.demand import Demand
from rnnguard.probe.exponents import exponents
from rnnguard.probe.retention_curve import SILENCE, effective_length, log10_retention
from rnnguard.probe.trajectory import LayerTrajectory, trajectories
from rnnguard.records import LayerReadings, MemorySource, SiteReadings

VECTORS = 8
EXPONENTS = 4
LONGEST = 1024  # steps measured; a longer sequence is cut, its retention extrapolated


@dataclass(frozen=True)
class Memory:
    """How many steps back the task needs to look, and who says so."""

    steps: int | None
    source: MemorySource
    lag_concentration: float | None = None


def memory_needed(
    found: FoundSite, declared: int | None, demand: Demand | None, real_length: bool
) -> Memory:
    """The user's figure, else the data's, else the sequence length as bound, else unknown.

    The length bounds nothing when every step is read out (short lags may carry the
    loss) or when the length was made up.
    """
    concentration = None if demand is None else demand.concentration
    if declared is not None:
        return Memory(declared, "declared", concentration)
    if demand is not None:
        return Memory(demand.steps, "estimated", concentration)
    if not real_length or found.record.readout == "all_steps":
        return Memory(None, "unknown")
    return Memory(found.record.steps, "assumed")


@torch.no_grad()
def measure_site(found: FoundSite, memory: Memory, *, seed: int, trained: bool) -> SiteReadings:
    """All readings of one site, its level not yet judged."""
    sequences = 8 if found.record.hidden_size <= 256 else 4
    runs = trajectories(found.module, found.input, sequences=sequences, longest=LONGEST)
    layers = tuple(_measure_layer(found, run, seed) for run in runs)
    leading = _weakest_direction(layers, memory)
    curve = _best_of(layers, leading)
    growing = max(layers, key=lambda layer: layer.exponents[0].value)
    own = [layer for layer in layers if layer.direction == leading]
    slowest = max(own, key=lambda layer: layer.exponents[0].value)
    first = growing.exponents[0]
    expansive = first.value - 2 * first.stderr > 0
    shown = growing if expansive else slowest
    site, gates = found.record, GATES[found.record.cell]
    biases = [gate_bias(r.trajectory.weights, gates, gates.keep) for r in runs if gates.keep]
    shared = {
        name: getattr(site, name)
        for name in SiteReadings.model_fields.keys() & type(site).model_fields.keys()
    }
    return SiteReadings(
        **shared,
        exponents=shown.exponents,
        retention=curve,
        layer_readings=layers,
        decay_per_step=math.exp(shown.exponents[0].value),
        expansive=expansive,
        growth=max(layer.growth for layer in layers),
        growth_over_window=first.value * site.window,
        effective_length=effective_length(list(curve)),
        memory_needed=memory.steps,
        memory_source=memory.source,
        lag_concentration=memory.lag_concentration,
        retention_at_memory=_at(curve, memory.steps),
        spectral_radius=max(layer.spectral_radius for layer in layers),
        whole_matrix_orthogonal=any(
            is_orthogonal_across_gates(r.trajectory.weights, len(gates.blocks)) for r in runs
        ),
        forget_gate=_least([layer.forget_gate for layer in layers]),
        forget_bias=_least([None if b is None else float(b.mean()) for b in biases]),
        forget_bias_doubled=any(_is_doubled(run) for run in runs),
        saturation=max(layer.saturation for layer in layers),
        dead_units=None if site.cell != "rnn_relu" else max(r.dead_units or 0.0 for r in layers),
        input_rms=_rms(runs[0].x, runs[0].trajectory.lengths),
        input_drive=_drive(runs[0]),
        output_rms=_seen_by_readout(found, layers[-1].output_rms),
        silent_input=_share_silent(runs[0]) > 0.1,
        trained=trained,
    )


def _measure_layer(found: FoundSite, run: LayerTrajectory, seed: int) -> LayerReadings:
    trajectory = run.trajectory
    generator = torch.Generator().manual_seed(seed)
    curve = log10_retention(trajectory, vectors=VECTORS, generator=generator)
    gates = GATES[trajectory.cell]
    kept = _alive(trajectory.gates[gates.keep], trajectory.lengths) if gates.keep else None
    return LayerReadings(
        layer=run.layer,
        direction=run.direction,
        exponents=exponents(trajectory, count=EXPONENTS, generator=generator),
        retention=tuple(curve),
        growth=10 ** min(300.0, max(curve)),
        spectral_radius=spectral_radius(
            recurrent_block(trajectory.weights, gates, gates.candidate)
        ),
        forget_gate=None if kept is None else float(kept.mean()),
        saturation=_saturation(run),
        dead_units=_dead_units(run),
        output_rms=_rms(trajectory.outputs, trajectory.lengths),
    )


def _weakest_direction(layers: tuple[LayerReadings, ...], memory: Memory) -> str:
    """The direction that keeps least: the site's level is the worse one's."""
    directions = sorted({layer.direction for layer in layers})

    def kept(direction: str) -> float:
        curve = _best_of(layers, direction)
        at_memory = _at(curve, memory.steps)
        return curve[-1] if at_memory is None else at_memory

    return min(directions, key=kept)


def _best_of(layers: tuple[LayerReadings, ...], direction: str) -> tuple[float, ...]:
    """Of stacked layers the one with the longest memory carries the signal at each lag."""
    curves = [layer.retention for layer in layers if layer.direction == direction]
    return tuple(max(values) for values in zip(*curves, strict=True))


def _at(curve: tuple[float, ...], lag: int | None) -> float | None:
    """log10 R at the lag; beyond the measured curve along the slope of its second half."""
    if lag is None:
        return None
    if lag < len(curve):
        return curve[lag]
    last, half = len(curve) - 1, (len(curve) - 1) // 2
    slope = (curve[last] - curve[half]) / max(1, last - half)
    return max(SILENCE, curve[last] + slope * (lag - last))


def _least(values: list[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _alive(values: Tensor, lengths: Tensor) -> Tensor:
    """The values (T, B, n) at real steps only, as (steps, n)."""
    steps = torch.arange(len(values), device=values.device)[:, None]
    return values[steps < lengths[None, :]]


def _rms(values: Tensor, lengths: Tensor) -> float:
    return float(_alive(values, lengths).double().square().mean().sqrt())


def _seen_by_readout(found: FoundSite, rms: float) -> float:
    """The output's rms behind the norm that reads it, if any: r / sqrt(r^2 + eps)."""
    if not found.record.normalized:
        return rms
    norm = getattr(found.module, "output_norm", None)
    epsilon = float(getattr(norm, "eps", 1e-5))
    return rms / math.sqrt(rms * rms + epsilon)


def _drive(run: LayerTrajectory) -> float:
    """Rms of what the input adds to the pre-activations."""
    driven = run.x @ run.trajectory.weights.ih.T
    return _rms(driven, run.trajectory.lengths)


def _share_silent(run: LayerTrajectory) -> float:
    return float((_alive(run.x, run.trajectory.lengths) == 0).all(-1).double().mean())


def _saturation(run: LayerTrajectory) -> float:
    """Share of gates outside 0.05..0.95, or for a plain RNN of |h| above 0.95."""
    trajectory = run.trajectory
    if trajectory.cell == "rnn_relu":
        return 0.0
    spec = GATES[trajectory.cell]
    if not spec.gated:
        return float((_alive(trajectory.outputs, trajectory.lengths).abs() > 0.95).double().mean())
    names = [name for name in spec.blocks if name != spec.candidate]
    values = torch.stack([_alive(trajectory.gates[n], trajectory.lengths) for n in names])
    return float(((values < 0.05) | (values > 0.95)).double().mean())


def _dead_units(run: LayerTrajectory) -> float | None:
    if run.trajectory.cell != "rnn_relu":
        return None
    alive = _alive(run.trajectory.outputs, run.trajectory.lengths)
    return float((alive == 0).all(0).double().mean())


def _is_doubled(run: LayerTrajectory) -> bool:
    """Whether the same positive keep bias stands in both bias vectors, which add."""
    weights = run.trajectory.weights
    gates = GATES[run.trajectory.cell]
    if gates.keep is None or weights.bias_ih is None or weights.bias_hh is None:
        return False
    rows = gates.block(gates.keep, weights.hidden_size)
    first, second = weights.bias_ih[rows], weights.bias_hh[rows]
    return bool((first == second).all() and (first > 0).all())


def spectral_radius(matrix: Tensor) -> float:
    """Largest modulus of an eigenvalue; beyond 1024 rows by powers, a few percent high."""
    if len(matrix) <= 1024:
        exact = matrix.double() if len(matrix) <= 512 else matrix.float()
        return float(torch.linalg.eigvals(exact).abs().max())
    generator = torch.Generator().manual_seed(0)
    block, logs = torch.randn(len(matrix), 8, generator=generator).to(matrix.device), []
    for _ in range(64):
        block, r = torch.linalg.qr(matrix.float() @ block)
        logs.append(float(r.diagonal().abs().max().log()))
    return math.exp(sum(logs[32:]) / 32)
