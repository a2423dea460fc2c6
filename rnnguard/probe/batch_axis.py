"""Along which axis the samples of a batch lie, where something tells it for certain.

The loader's batch size, the target or the output tell it; without one of them nothing is said,
so that a sound model with time first is not taken for one that mixes samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rnnguard.inspection.batches import Batch, with_tensors
from rnnguard.inspection.recording import tensors_in
from rnnguard.measurements import Site

Rows = Callable[[int], Tensor]
SHORT = 24  # steps in which samples that are mixed up meet


@dataclass(frozen=True)
class Samples:
    """Along which axis of the input the samples lie, how many, and how long the other one is.

    Not `firm` where the output's shape alone tells it, as rows may be nodes of one graph, too.
    """

    axis: int
    count: int
    across: int
    firm: bool = True


def batch_size_of(data: object) -> int | None:
    """How many samples a loader puts into a batch; None where it does not say."""
    for holder in (data, getattr(data, "batch_sampler", None)):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def samples_of(
    batch: Batch, output: Any, sites: Sequence[Site], batch_size: int | None
) -> Samples | None:
    """The axis of the samples, from the loader, the target or the output, in this order."""
    given = first_input(batch)
    if given is None:
        return None
    shape = tuple(given.shape)
    if batch_size is not None and shape.count(batch_size) == 1:
        return _axis(shape, batch_size)
    # A single sequence without an axis for samples may have a target for each of its steps.
    if max((site.batch for site in sites), default=1) < 2:
        return None
    target, flat = next(tensors_in(batch.target), None), _flat_output(output)
    found = None if target is None else _told_by(target, shape)
    if found is not None or flat is None:
        return found
    told = _told_by(flat, shape)
    return None if told is None else replace(told, firm=False)


def _told_by(tensor: Tensor, shape: tuple[int, ...]) -> Samples | None:
    """What a target or output of one entry, or one row of classes, per sample tells."""
    if not 1 <= tensor.dim() <= 2:
        return None
    if tensor.dim() == 2 and (tensor.shape[1] in shape[:2] or not tensor.is_floating_point()):
        return None
    return _axis(shape, len(tensor))


def _axis(shape: tuple[int, ...], count: int) -> Samples | None:
    places = [axis for axis in (0, 1) if shape[axis] == count]
    if len(places) != 1 or count < 2:
        return None
    return Samples(places[0], count, shape[1 - places[0]])


def first_input(batch: Batch) -> Tensor | None:
    """The first input with an axis besides that of the samples."""
    tensors = tensors_in((batch.args, batch.kwargs))
    return next((t for t in tensors if t.dim() >= 2), None)


def _flat_output(output: Any) -> Tensor | None:
    return next((t for t in tensors_in(output) if t.dim() == 2 and t.is_floating_point()), None)


def own_axis(tensor: Tensor, batch: Batch, samples: Samples) -> int | None:
    """The axis of the samples in one of the inputs, where it is certain."""
    given = first_input(batch)
    if given is not None and tensor.shape == given.shape:
        return samples.axis
    axes = [axis for axis, size in enumerate(tensor.shape) if size == samples.count]
    return axes[0] if len(axes) == 1 else None


def shortened(batch: Batch, samples: Samples) -> Batch | None:
    """The same with the first few steps only; None where that saves little, or is not certain."""
    if samples.across < 2 * SHORT or samples.count == SHORT:
        return None

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() == 1 and not tensor.is_floating_point():
            return tensor.clamp(max=SHORT)  # lengths
        axes = [axis for axis, size in enumerate(tensor.shape) if size == samples.across]
        return tensor.narrow(axes[0], 0, SHORT) if len(axes) == 1 else tensor

    args, kwargs = with_tensors((batch.args, dict(batch.kwargs)), cut)
    return Batch(args, kwargs, batch.target, batch.raw)


def rows_of(output: Any, samples: Samples) -> list[Rows]:
    """How a sample's part of the output may be taken, most often in one way; none: unknown."""
    tensors = [t for t in tensors_in(output) if t.is_floating_point() and t.dim()]
    return next((ways for t in tensors if (ways := _ways(t, samples))), [])


def _ways(tensor: Tensor, samples: Samples) -> list[Rows]:
    axes = [axis for axis, size in enumerate(tensor.shape) if size == samples.count]
    if len(axes) == 1:
        return [lambda i: tensor.select(axes[0], i)]
    # With several such axes, as of likenesses of samples to samples, nothing can be said.
    if axes or len(tensor) != samples.count * samples.across:
        return []
    each, count = samples.across, samples.count
    # Flattened, with the samples or with the steps in front.
    return [lambda i: tensor[i * each : (i + 1) * each], lambda i: tensor[i::count]]
