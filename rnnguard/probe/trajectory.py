"""A site's layers and directions, run one after the other on the site's real input."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rnnguard.errors import RefusedError
from rnnguard.inspection.gates import Weights, cell_of, recurrences, weights_of
from rnnguard.inspection.sites import SiteInput
from rnnguard.probe.stepping import OwnRecurrence
from rnnguard.probe.steps import Trajectory, run
from rnnguard.records import Direction

Result = TypeVar("Result")


class MemoryWarning(UserWarning):
    """Memory ran out, so fewer sequences were measured than were given."""


@dataclass(frozen=True)
class LayerTrajectory:
    """A trajectory and where it stands; x is what this layer was given, (T, B, F)."""

    layer: int
    direction: Direction
    x: Tensor
    trajectory: Trajectory


@torch.no_grad()
def trajectories(
    module: nn.Module,
    given: SiteInput,
    *,
    sequences: int,
    longest: int,
    device: torch.device | None = None,
) -> list[LayerTrajectory]:
    """Every layer and direction over the first sequences and steps, without dropout.

    Runs in float32 or, for float64 inputs, in float64; the module is not called. It runs where
    the inputs are, or on copies of weights and inputs on `device`.
    """
    cell = cell_of(module)
    assert cell is not None
    if len(given.hidden) != len(recurrences(module)):
        fact = f"a {type(module).__name__} that calls the kernel layer by layer is not measured."
        cure = "Audit it without what stands between its layers."
        raise RefusedError.of("RG912", "", fact, cure)
    dtype = torch.float64 if given.x.dtype == torch.float64 else torch.float32
    place = given.x.device if device is None else device
    lengths = given.lengths[:sequences].clamp_max(longest).to(place)
    x = given.x[: int(lengths.max()), :sequences].to(place, dtype)
    done: list[LayerTrajectory] = []
    outputs: list[Tensor] = []
    own = _measured_copy(module, place, dtype) if isinstance(module, OwnRecurrence) else None
    for index, (layer, direction) in enumerate(recurrences(module)):
        if direction == "forward" and layer > 0:
            output, outputs = torch.cat(outputs, -1), []
            x = output if own is None else own.above(layer - 1, x, output)
        initial = (given.hidden, given.cell_state)
        state = tuple(s[index, :sequences].to(place, dtype) for s in initial if s is not None)
        ordered = x if direction == "forward" else _reversed(x, lengths)
        if own is None:
            weights = _as(weights_of(module, layer, direction), place, dtype)
            trajectory = run(cell, weights, ordered, state, lengths)
        else:
            weights, stepping = own.weights_used(layer, direction), own.stepping(layer, direction)
            state = own.starting(state)
            trajectory = run(cell, weights, ordered, state, lengths, stepping)
        done.append(LayerTrajectory(layer, direction, ordered, trajectory))
        h = trajectory.outputs
        outputs.append(h if direction == "forward" else _reversed(h, lengths))
    return done


def within_memory(measure: Callable[[int], Result], sequences: int) -> tuple[Result, str]:
    """What `measure` gives of so many sequences, or of half as many while memory runs out.

    With it a note that says so (also given as a MemoryWarning), or an empty one. Raises
    RefusedError (RG912) when not even one sequence fits.
    """
    count, found = sequences, _tried(measure, sequences)
    while found is None:
        if count == 1:
            cure = "Give shorter sequences, or `device` with more memory."
            fact = "memory runs out over a single sequence of this length."
            raise RefusedError.of("RG912", "inputs", fact, cure)
        count //= 2
        found = _tried(measure, count)
    if count == sequences:
        return found[0], ""
    note = f"memory ran out: {count} of {sequences} sequences were measured"
    warnings.warn(note, MemoryWarning, stacklevel=4)
    return found[0], note


def _tried(measure: Callable[[int], Result], count: int) -> tuple[Result] | None:
    """What `measure` gives, or None when memory ran out; its frames are gone by then."""
    try:
        return (measure(count),)
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        # The allocator of the CPU has no error class of its own.
        if "DefaultCPUAllocator" not in str(error):
            raise
        return None


def _measured_copy(module: Any, place: torch.device, dtype: torch.dtype) -> Any:
    """The module outside of training, with its own values in the dtype and place to measure in.

    It shares everything else, so that nothing of the user's that hangs on it is copied.
    """

    def moved(held: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value if value is None else _cast(value.detach(), place, dtype)
                for name, value in held.items()}  # fmt: skip

    made = module.__new__(type(module))
    made.__dict__.update(module.__dict__, training=False)
    made.__dict__["_parameters"] = moved(module._parameters)
    made.__dict__["_buffers"] = moved(module._buffers)
    made.__dict__["_modules"] = {
        name: child if child is None else _measured_copy(child, place, dtype)
        for name, child in module._modules.items()
    }
    return made


def _cast(value: Tensor, place: torch.device, dtype: torch.dtype) -> Tensor:
    return value.to(place, dtype) if value.is_floating_point() else value.to(place)


def _as(weights: Weights, place: torch.device, dtype: torch.dtype) -> Weights:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(place, dtype)

    ih, hh = weights.ih.detach().to(place, dtype), weights.hh.detach().to(place, dtype)
    return Weights(ih, hh, cast(weights.bias_ih), cast(weights.bias_hh), cast(weights.hr))


def _reversed(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence back to front within its own length; what lies behind stays in place."""
    steps = torch.arange(len(x), device=x.device)[:, None]
    source = torch.where(steps < lengths[None, :], lengths[None, :] - 1 - steps, steps)
    return x.gather(0, source[..., None].expand_as(x))
