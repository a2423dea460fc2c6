"""One site's readings, put together from its trajectories; and those of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rnnguard.errors import RefusedError
from rnnguard.inspection.gates import GATES, gate_bias, recurrent_block
from rnnguard.inspection.provenance import is_orthogonal_across_gates
from rnnguard.inspection.sites import FoundSite
from rnnguard.measurements import LayerReadings, Site, SiteReadings
from rnnguard.probe.demand import Demand
from rnnguard.probe.exponents import exponents
from rnnguard.probe.input_recall import forward_memory
from rnnguard.probe.retention_curve import RetentionCurve, log10_retention, weakest_direction
from rnnguard.probe.trajectory import LayerTrajectory, trajectories, within_memory
from rnnguard.records import MemorySource

VECTORS = 8
EXPONENTS = 4
UNITS, CHANNELS = 32, 8  # that the forward memory is read from, and for
LONGEST = 1024  # steps measured; a longer sequence is cut, its retention extrapolated


@dataclass(frozen=True)
class Memory:
    """How many steps back the task needs to look, and who says so."""

    steps: int | None
    source: MemorySource
    lag_concentration: float | None = None
    interval: tuple[int, int] | None = None


def memory_needed(
    site: Site, declared: int | None, demand: Demand | None, real_length: bool
) -> Memory:
    """The user's figure, else the data's, else the sequence length as bound, else unknown.

    The length bounds nothing when every step is read out or pooled (each is one hop from the
    loss, and short lags may carry it) or when the length was made up.
    """
    concentration = None if demand is None else demand.concentration
    if declared is not None:
        return Memory(declared, "declared", concentration)
    if demand is not None:
        return Memory(demand.steps, "estimated", concentration, (demand.low, demand.high))
    if not real_length or site.readout in ("all_steps", "pooled"):
        return Memory(None, "unknown")
    return Memory(site.steps, "assumed")


@torch.no_grad()
def measure_site(found: FoundSite, memory: Memory, *, seed: int, trained: bool) -> SiteReadings:
    """All readings of one site, its level not yet judged.

    Of half as many sequences, with a MemoryWarning, while memory runs out.
    """
    wanted = 8 if found.record.hidden_size <= 256 else 4
    x = found.input.x

    def measure(sequences: int) -> SiteReadings:
        return _measured(found, memory, seed, trained, sequences)

    # In the caller's autocast the steps would run in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return within_memory(measure, min(wanted, x.shape[1]))[0]


def _measured(
    found: FoundSite, memory: Memory, seed: int, trained: bool, sequences: int
) -> SiteReadings:
    runs = trajectories(found.module, found.input, sequences=sequences, longest=LONGEST)
    measured = [_measure_layer(found, run, seed) for run in runs]
    layers, curves = tuple(layer for layer, _ in measured), [curve for _, curve in measured]
    ways = [run.direction for run in runs]
    lag = runs[0].trajectory.steps if memory.steps is None else memory.steps
    leading, curve = weakest_direction(list(zip(ways, curves, strict=True)), lag)
    growing = max(layers, key=lambda layer: layer.exponents[0].value)
    own = [layer for layer in layers if layer.direction == leading]
    slowest = max(own, key=lambda layer: layer.exponents[0].value)
    first = growing.exponents[0]
    expansive = first.value - 2 * first.stderr > 0
    shown = growing if expansive else slowest
    site, gates = found.record, GATES[found.record.cell]
    biases = [_keep_bias(run) for run in runs]
    shared = {
        name: getattr(site, name)
        for name in SiteReadings.model_fields.keys() & type(site).model_fields.keys()
    }
    return SiteReadings(
        **shared,
        exponents=shown.exponents,
        retention=curve.log10,
        retention_stderr=curve.stderr,
        layer_readings=layers,
        decay_per_step=math.exp(shown.exponents[0].value),
        expansive=expansive,
        growth=max(layer.growth for layer in layers),
        growth_over_window=first.value * site.window,
        effective_length=curve.effective_length(),
        effective_length_interval=curve.effective_length_interval(),
        memory_needed=memory.steps,
        memory_needed_interval=memory.interval,
        forward_reach=_forward_reach(runs),
        memory_source=memory.source,
        lag_concentration=memory.lag_concentration,
        retention_at_memory=None if memory.steps is None else curve.at(memory.steps),
        retention_at_memory_interval=(
            None if memory.steps is None else curve.interval_at(memory.steps)
        ),
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
        keep_gate=gates.gated,
    )


def _measure_layer(
    found: FoundSite, run: LayerTrajectory, seed: int
) -> tuple[LayerReadings, RetentionCurve]:
    trajectory = run.trajectory
    generator = torch.Generator().manual_seed(seed)
    curve = log10_retention(trajectory, vectors=VECTORS, generator=generator)
    gates = GATES[trajectory.cell]
    kept = _alive(trajectory.gates[gates.keep], trajectory.lengths) if gates.keep else None
    readings = LayerReadings(
        layer=run.layer,
        direction=run.direction,
        exponents=exponents(trajectory, count=EXPONENTS, generator=generator),
        retention=curve.log10,
        retention_stderr=curve.stderr,
        growth=10 ** min(300.0, max(curve.log10)),
        spectral_radius=spectral_radius(
            recurrent_block(trajectory.weights, gates, gates.candidate)
        ),
        forget_gate=None if kept is None else float(kept.mean()),
        saturation=_saturation(run),
        dead_units=_dead_units(run),
        output_rms=_rms(trajectory.outputs, trajectory.lengths),
    )
    return readings, curve


def _forward_reach(runs: list[LayerTrajectory]) -> int | None:
    """How far back the last layer's state still tells of the input; of a part of either.

    Fewer units and channels can only tell less, at a fraction of the cost.
    """
    outputs, x = runs[-1].trajectory.outputs, runs[0].x
    try:
        found = forward_memory(outputs[..., :UNITS], x[..., :CHANNELS], runs[0].trajectory.lengths)
    except RefusedError:
        return None
    return found.reach


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


def _keep_bias(run: LayerTrajectory) -> Tensor | None:
    """The keep gate's offset, wherever the cell holds it."""
    trajectory, gates = run.trajectory, GATES[run.trajectory.cell]
    told = None if trajectory.stepping is None else trajectory.stepping.keep_bias
    if told is not None or gates.keep is None:
        return told
    return gate_bias(trajectory.weights, gates, gates.keep)


def _drive(run: LayerTrajectory) -> float:
    """Rms of what the input adds to the pre-activations."""
    trajectory = run.trajectory
    told = trajectory.stepping
    driven = run.x @ trajectory.weights.ih.T if told is None else told.drive(run.x)
    return _rms(driven, trajectory.lengths)


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
