"""A site's layers and directions, run one after the other on the site's real input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import Weights, cell_of, recurrences, weights_of
from rnnguard.inspection.sites import SiteInput
from rnnguard.probe.steps import Trajectory, run
from rnnguard.records import Direction


@dataclass(frozen=True)
class LayerTrajectory:
    """A trajectory and where it stands; x is what this layer was given, (T, B, F)."""

    layer: int
    direction: Direction
    x: Tensor
    trajectory: Trajectory


@torch.no_grad()
def trajectories(
    module: nn.Module, given: SiteInput, *, sequences: int, longest: int
) -> list[LayerTrajectory]:
    """Every layer and direction over the first sequences and steps, without dropout.

    Runs in float32 or, for float64 modules, in float64; the module is not called.
    """
    cell = cell_of(module)
    assert cell is not None
    dtype = torch.float64 if given.x.dtype == torch.float64 else torch.float32
    lengths = given.lengths[:sequences].clamp_max(longest)
    x = given.x[: int(lengths.max()), :sequences].to(dtype)
    done: list[LayerTrajectory] = []
    outputs: list[Tensor] = []
    for index, (layer, direction) in enumerate(recurrences(module)):
        if direction == "forward" and layer > 0:
            x, outputs = torch.cat(outputs, -1), []
        weights = _as(weights_of(module, layer, direction), dtype)
        initial = (given.hidden, given.cell_state)
        state = tuple(s[index, :sequences].to(dtype) for s in initial if s is not None)
        ordered = x if direction == "forward" else _reversed(x, lengths)
        trajectory = run(cell, weights, ordered, state, lengths)
        done.append(LayerTrajectory(layer, direction, ordered, trajectory))
        h = trajectory.outputs
        outputs.append(h if direction == "forward" else _reversed(h, lengths))
    return done


def _as(weights: Weights, dtype: torch.dtype) -> Weights:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype)

    return replace(
        weights,
        ih=weights.ih.detach().to(dtype),
        hh=weights.hh.detach().to(dtype),
        bias_ih=cast(weights.bias_ih),
        bias_hh=cast(weights.bias_hh),
        hr=cast(weights.hr),
    )


def _reversed(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence back to front within its own length; what lies behind stays in place."""
    steps = torch.arange(len(x), device=x.device)[:, None]
    source = torch.where(steps < lengths[None, :], lengths[None, :] - 1 - steps, steps)
    return x.gather(0, source[..., None].expand_as(x))
