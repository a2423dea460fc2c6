"""The public measuring functions: exponents and retention of one of torch's recurrences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnguard.probe.exponents import exponents
from rnnguard.probe.results import (
    Exponents,
    LayerExponent,
    LayerRetention,
    Measured,
    Retention,
)
from rnnguard.probe.retention_curve import log10_retention, weakest_direction
from rnnguard.probe.standalone import (
    Lengths,
    Standalone,
    State,
    check_recurrence,
    place_of,
    refused,
    standalone,
    standalone_input,
    undisturbed,
)
from rnnguard.probe.trajectory import within_memory

Device = torch.device | str | None
Result = TypeVar("Result", bound=Measured)


def lyapunov_exponents(
    module: nn.Module,
    inputs: Tensor | PackedSequence,
    *,
    k: int = 8,
    warmup: int = 20,
    lengths: Lengths = None,
    state: State = None,
    device: Device = None,
    seed: int = 0,
) -> Exponents:
    """The k leading Lyapunov exponents of a recurrence along its inputs, in nats per step.

    module: an nn.RNN, nn.LSTM or nn.GRU with any layers, directions and proj_size, or an
    nn.RNNCell, nn.LSTMCell or nn.GRUCell, which is stepped over the inputs; it stays as it is.
    inputs: real, as the module takes them: (T, B, F), with batch_first (B, T, F), or (T, F)
    for one sequence, or packed; a cell takes (T, B, F) or (T, F). lengths: (B,) steps of padded
    sequences. state: as the module takes it, zero when None. warmup: steps left out while the
    directions align, five time constants of the slowest unit or more. device: measure copies
    of weights and inputs there; None measures where the module is. seed: of the random
    directions.

    The Jacobian of stacked layers is block-triangular in the layer, so that their exponents are
    the union of those of the layers. Measured without dropout, in float32 or, for float64
    modules, in float64. Errors are those of the mean over sequences: give several, of 100
    steps or more. While memory runs out, half as many are measured, with a note and a
    MemoryWarning.

    Source: QR along the trajectory, Benettin et al. 1980; Vogt et al. 2022 for recurrent
    networks. Raises RefusedError: RG003 for a module that is no recurrence of torch, RG912 for
    inputs or options that it cannot take.
    """
    _check_at_least("k", k, 1)
    _check_at_least("warmup", warmup, 0)

    def measure(taken: Standalone) -> Exponents:
        longest = int(taken.runs[0].trajectory.lengths.max())
        used = min(warmup, longest - 1)
        found = []
        for run in taken.runs:
            generator = torch.Generator("cpu").manual_seed(seed)
            own = exponents(run.trajectory, count=k, generator=generator, warmup=used)
            place = {"layer": run.layer, "direction": run.direction}
            found += [LayerExponent(**exponent.model_dump(), **place) for exponent in own]
        found.sort(key=lambda entry: -entry.value)
        return Exponents(
            entries=tuple(found[:k]),
            steps=taken.steps,
            sequences=taken.sequences,
            warmup=used,
            notes=taken.notes + _left_out(taken, warmup),
        )

    return _measured(module, inputs, lengths, state, device, measure)


def retention(
    module: nn.Module,
    inputs: Tensor | PackedSequence,
    *,
    lags: Sequence[int] | None = None,
    vectors: int = 8,
    lengths: Lengths = None,
    state: State = None,
    device: Device = None,
    seed: int = 0,
) -> Retention:
    """Retention by lag: log10 R(k), what is left of the state gradient k steps back.

    R(k) is the rms, over sequences and random directions v, of the gradient of v . s_T with
    respect to s_{T-k}, over the same at k = 0; s is the whole state, (h, c) of an LSTM, and T
    each sequence's own last step. lags: those to give, in steps, every one from 0 when None.
    vectors: random directions per sequence. For everything else see `lyapunov_exponents`.

    Source: rnnguard's own measure, after Pascanu et al. 2013, equation 5. Raises RefusedError:
    RG003 for a module that is no recurrence of torch, RG912 for inputs or options that it
    cannot take.
    """
    _check_at_least("vectors", vectors, 1)

    def measure(taken: Standalone) -> Retention:
        curves = []
        for run in taken.runs:
            generator = torch.Generator("cpu").manual_seed(seed)
            curves.append(log10_retention(run.trajectory, vectors=vectors, generator=generator))
        shown = _checked(lags, len(curves[0].log10) - 1)
        layers = tuple(
            LayerRetention(lags=shown, curve=curve, layer=run.layer, direction=run.direction)
            for run, curve in zip(taken.runs, curves, strict=True)
        )
        ways = [(layer.direction, layer.curve) for layer in layers]
        direction, curve = weakest_direction(ways, len(curves[0].log10) - 1)
        return Retention(
            lags=shown,
            curve=curve,
            direction=direction,
            layers=layers,
            steps=taken.steps,
            sequences=taken.sequences,
            notes=taken.notes,
        )

    return _measured(module, inputs, lengths, state, device, measure)


def _measured(
    module: nn.Module,
    inputs: Tensor | PackedSequence,
    lengths: Lengths,
    state: State,
    device: Device,
    measure: Callable[[Standalone], Result],
) -> Result:
    """What `measure` makes of the recurrence on its inputs, of as many sequences as fit."""
    check_recurrence(module)
    place = place_of(device)
    home = next(module.parameters()).device
    with undisturbed(module, home if place is None else place):
        given = standalone_input(module, inputs, lengths, state)

        def of(sequences: int) -> Result:
            return measure(standalone(module, given, sequences, place))

        found, note = within_memory(of, given.x.shape[1])
    return found.model_copy(update={"notes": (*found.notes, note)}) if note else found


def _checked(lags: Sequence[int] | None, longest: int) -> tuple[int, ...]:
    """The lags asked for, in order; all of them when None."""
    if lags is None:
        return tuple(range(longest + 1))
    asked = tuple(sorted({int(lag) for lag in lags}))
    if not asked or asked[0] < 0 or asked[-1] > longest:
        fact = f"it is {list(lags)!r}." if len(lags) < 9 else f"it goes up to {asked[-1]}."
        raise refused("lags", fact, f"Give lags from 0 to {longest}, the steps measured.")
    return asked


def _left_out(taken: Standalone, warmup: int) -> tuple[str, ...]:
    """Says what the warm-up did not leave."""
    lengths = taken.runs[0].trajectory.lengths
    longest = int(lengths.max())
    if longest <= warmup:
        return (f"the sequences end before the warm-up; only step {longest} was measured",)
    short = int((lengths <= warmup).sum())
    if short:
        return (f"{short} of {taken.sequences} sequences end within the warm-up",)
    return ()


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise refused(name, f"it is {value}.", f"Give {least} or more.")
