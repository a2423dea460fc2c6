"""Whether a sample's output depends on the other samples of its batch, which it must not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rnnguard.inspection.arguments import axes_of
from rnnguard.inspection.batches import Batch, cloned, with_tensors
from rnnguard.inspection.recording import record, tensors_in
from rnnguard.measurements import Site
from rnnguard.probe.batch_axis import Rows, Samples, own_axis, rows_of, samples_of, shortened
from rnnguard.probe.snapshot import untouched
from rnnguard.probe.stillness import answer, as_called, hold_still, is_noisy, reseed
from rnnguard.probe.subject import Subject

MIXED = 0.01
_MOMENTS = {"mean", "var", "std", "var_mean", "std_mean"}
_TRAINING = 5  # place of that argument of batch_norm


@dataclass(frozen=True)
class Leakage:
    """Share of what moves a sample's output that lies on other samples; `axis` in words.

    The larger share of the first and of the last sample, 0 where none is worth a word.
    `location` is that of the recurrence which runs along the samples, if one does.
    """

    share: float
    axis: str = ""
    location: str | None = None


def leakage(
    subject: Subject, sites: Sequence[Site] = (), batch_size: int | None = None
) -> Leakage | None:
    """How far samples are mixed; None where nothing tells which axis is theirs. In `untouched`.

    By the gradient |d out[i] / d x[j != i]| over |d out[i] / d x| of a float input, else by
    what changes when all samples are made alike. `sites` are those of the model, `batch_size`
    what `batch_size_of` the data gives. Means over the samples, as of a batch norm that the
    user spelled out, are meant to mix and give None.
    """
    try:
        batch = as_called(subject, subject.largest)
        if batch is None:
            return None
        if _is_sound_when_short(subject, batch, sites, batch_size):
            return Leakage(0.0)
        with untouched(subject.model, optimizer=subject.optimizer):
            found = _measured(subject, batch, sites, batch_size)
    except Exception:  # the model may refuse a batch that was altered
        return None
    if found is None or found[0] <= MIXED:
        return None if found is None else Leakage(0.0)
    return _told(*found, sites)


def _is_sound_when_short(
    subject: Subject, batch: Batch, sites: Sequence[Site], batch_size: int | None
) -> bool:
    """Whether the first few steps, at a fraction of the cost, show that no samples are mixed."""
    samples = samples_of(batch, None, sites, batch_size)
    short = None if samples is None else shortened(batch, samples)
    if short is None:
        return False
    try:
        with untouched(subject.model, optimizer=subject.optimizer):
            found = _measured(subject, short, sites, batch_size)
    except Exception:  # as of a model for sequences of one length
        return False
    return found is not None and found[0] <= MIXED


def _measured(
    subject: Subject, batch: Batch, sites: Sequence[Site], batch_size: int | None
) -> tuple[float, Samples] | None:
    smooth = any(t.is_floating_point() for t in tensors_in((batch.args, batch.kwargs)))
    output, inputs = _run(subject, batch) if smooth else (answer(subject, batch), [])
    samples = samples_of(batch, output, sites, batch_size)
    if samples is None:
        return None
    ways = rows_of(output, samples)
    share = _by_gradient(ways, inputs, batch, samples)
    if share is None:
        # Again, since the first run may have moved on a state that the model keeps.
        share = _by_change(subject, batch, samples, answer(subject, batch) if smooth else output)
    if share is None or (share > MIXED and _is_meant(subject, batch, samples)):
        return None
    return share, samples


def _run(subject: Subject, batch: Batch) -> tuple[Any, list[Tensor]]:
    """The output, and the float inputs that it may be differentiated by."""
    hold_still(subject.model)
    reseed(subject.seed)
    args, kwargs = cloned((batch.args, dict(batch.kwargs)))
    inputs = [t.detach_() for t in tensors_in((args, kwargs)) if t.is_floating_point()]
    for tensor in inputs:
        tensor.requires_grad_()
    # A copy again, since the model may write into what it is given.
    args, kwargs = cloned((args, kwargs))
    return subject.model(*args, **kwargs), inputs


def _by_gradient(
    ways: list[Rows], inputs: list[Tensor], batch: Batch, samples: Samples
) -> float | None:
    placed = [(tensor, axis) for tensor in inputs
              if (axis := own_axis(tensor, batch, samples)) is not None]  # fmt: skip
    if not placed or not ways or not ways[0](0).requires_grad:
        return None
    shares = []
    for rows in ways:
        ends = [_share(rows(i), placed, i) for i in (0, samples.count - 1)]
        known = [share for share in ends if share is not None]
        if len(known) < len(ends):
            return None
        shares.append(max(known))
    return min(shares)


def _share(row: Tensor, placed: list[tuple[Tensor, int]], index: int) -> float | None:
    generator = torch.Generator().manual_seed(index)
    weighted = (row * torch.randn(row.shape, generator=generator).to(row)).sum()
    tensors = [tensor for tensor, _ in placed]
    found = torch.autograd.grad(weighted, tensors, retain_graph=True, allow_unused=True)
    whole, others = 0.0, 0.0
    for gradient, (_, axis) in zip(found, placed, strict=True):
        if gradient is not None:
            own = torch.tensor([index], device=gradient.device)
            whole = math.hypot(whole, float(gradient.norm()))
            others = math.hypot(others, float(gradient.index_fill(axis, own, 0).norm()))
    return others / whole if whole > 0 and math.isfinite(whole) else None


def _by_change(subject: Subject, batch: Batch, samples: Samples, known: Any) -> float | None:
    """The share from runs in which all samples are copies of the first, or of the last.

    `known` is the output on the batch itself.
    """
    last = samples.count - 1
    altered = [answer(subject, _alike(batch, samples, end)) for end in (0, last)]
    runs = [rows_of(output, samples) for output in (known, *altered)]
    if not all(runs):
        return None
    shares = []
    for mixed, first, final in zip(*runs, strict=True):
        own = float((first(0) - final(last)).norm())
        moved = [float((mixed(i) - run(i)).norm()) for i, run in ((0, first), (last, final))]
        if own == 0 or not all(map(math.isfinite, moved)):
            return None
        shares.append(max(move / math.hypot(move, own) for move in moved))
    share = min(shares)
    return None if share > MIXED and is_noisy(subject, batch, known) else share


def _alike(batch: Batch, samples: Samples, index: int) -> Batch:
    """The batch with copies of one sample; what tells lengths stays as it is."""

    def copies(tensor: Tensor) -> Tensor:
        axis = own_axis(tensor, batch, samples) if tensor.dim() >= 2 else None
        if axis is None:
            return tensor
        return tensor.narrow(axis, index, 1).expand_as(tensor).clone()

    changed: Batch = with_tensors(batch, copies)
    return changed


def _is_meant(subject: Subject, batch: Batch, samples: Samples) -> bool:
    """Whether it takes means over its samples, or joins them by a matrix that it is given."""
    args, kwargs = cloned((batch.args, dict(batch.kwargs)))
    recording = record(lambda: subject.model(*args, **kwargs), subject.model, (args, kwargs))
    return any(_is_mean(node, samples) or _joins(node, samples) for node in recording.graph.nodes)


def _is_mean(node: fx.Node, samples: Samples) -> bool:
    """Whether it is a step of a batch norm, torch's or one that the user spelled out."""
    name, source = node.meta.get("name"), node.args[0] if node.args else None
    if name == "batch_norm":
        positional = node.args[_TRAINING] if len(node.args) > _TRAINING else False
        return bool(node.kwargs.get("training", positional))
    if name not in _MOMENTS or not isinstance(source, fx.Node):
        return False
    shape = source.meta.get("shape", ())
    return any(shape[axis] == samples.count for axis in axes_of(node)
               if -len(shape) <= axis < len(shape))  # fmt: skip


def _joins(node: fx.Node, samples: Samples) -> bool:
    """Whether it is a matrix of who meets whom, as that of a graph."""
    known = node.op in ("placeholder", "get_attr")
    return known and node.meta.get("shape", ())[-2:] == (samples.count, samples.count)


def _told(share: float, samples: Samples, sites: Sequence[Site]) -> Leakage | None:
    lie = f"the samples lie along axis {samples.axis} of the input"
    for site in sites:
        if site.steps == samples.count and site.batch != samples.count:
            return Leakage(share, f"{lie}, which `{site.label}` takes for time", site.location)
    return Leakage(share, f"{lie}, and meet before the output") if samples.firm else None
