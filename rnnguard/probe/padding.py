"""Whether what is read out of a padded sequence changes with the amount of padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rnnguard.inspection.batches import Batch, with_tensors
from rnnguard.inspection.pathways import real_lengths
from rnnguard.inspection.recording import tensors_in
from rnnguard.measurements import Site
from rnnguard.probe.stillness import answer, as_called, differ, is_noisy
from rnnguard.probe.subject import Subject

Padding = Literal["no", "seen", "measured"]
GROWN = 4  # steps
PADDED = 0.02  # of all steps; fewer are no padding that matters


@dataclass(frozen=True)
class _Sequences:
    """The padded sequences of a batch: axes of time and samples, and which sample ends when."""

    time: int
    samples: int
    steps: int
    count: int
    padded: int
    real: int


def behind_padding(subject: Subject, site: Site) -> Padding:
    """Whether the site's state behind the padding is read out. In `untouched`.

    "seen" from the graph alone; "measured" where a padded sample's output, with noise held
    still, changes when the padding grows or goes; "no" where neither changes it. Lengths that
    were given stay as they are, and masks continue as in the padding.
    """
    read = site.readout in ("last_step", "final_state")
    if not read or site.padded <= PADDED or site.picked or site.packed:
        return "no"
    try:
        batch = as_called(subject, subject.largest)
        found = None if batch is None else _sequences(batch, site)
        if batch is None or found is None:
            return "seen"
        return _compared(subject, batch, found)
    except Exception:  # the model may refuse a longer batch, as one with fixed positions does
        return "seen"


def _compared(subject: Subject, batch: Batch, found: _Sequences) -> Padding:
    known = answer(subject, batch)
    whole = list(_of_sample(known, found))
    changed = _changes(whole, _outputs(subject, _grown(batch, found), found))
    if changed is False:
        # Long padding may have worn out all difference, which the sequence without any shows.
        changed = _changes(whole, _outputs(subject, _cut(batch, found), found))
    if changed is None:
        return "seen"
    if changed and is_noisy(subject, batch, known):
        return "seen"
    return "measured" if changed else "no"


def _sequences(batch: Batch, site: Site) -> _Sequences | None:
    """Where time and samples lie in the first input that has both, and who ends in padding."""
    for tensor in tensors_in((batch.args, batch.kwargs)):
        places = [axis for axis in (0, 1) if tensor.dim() >= 2 and tensor.shape[axis] == site.steps]
        if len(places) != 1 or tensor.shape[1 - places[0]] != site.batch:
            continue
        x = tensor.transpose(0, 1) if places[0] == 1 else tensor
        rows = x.reshape(site.steps, site.batch, -1)
        full = torch.full((site.batch,), site.steps, device=tensor.device)
        real = real_lengths(rows, full)
        shorter = torch.where(real < site.steps, real, 0)
        if not bool(shorter.any()):
            continue
        longest = int(shorter.argmax())
        return _Sequences(
            places[0], 1 - places[0], site.steps, site.batch, longest, int(shorter[longest])
        )
    return None


def _is_sequence(tensor: Tensor, found: _Sequences) -> bool:
    shape = tensor.shape
    return tensor.dim() >= 2 and (shape[found.time], shape[found.samples]) == (
        found.steps,
        found.count,
    )


def _grown(batch: Batch, found: _Sequences) -> Batch:
    """Some more steps for all samples, each as the padded sample's last one."""

    def longer(tensor: Tensor) -> Tensor:
        if not _is_sequence(tensor, found):
            return tensor
        last = tensor.narrow(found.time, found.steps - 1, 1)
        padding = last.narrow(found.samples, found.padded, 1)
        sizes = list(tensor.shape)
        sizes[found.time] = GROWN
        return torch.cat([tensor, padding.expand(sizes)], dim=found.time)

    changed: Batch = with_tensors(batch, longer)
    return changed


def _cut(batch: Batch, found: _Sequences) -> Batch:
    """All sequences only as long as the padded sample really is."""

    def shorter(tensor: Tensor) -> Tensor:
        if _is_sequence(tensor, found):
            return tensor.narrow(found.time, 0, found.real).clone()
        lengths = tensor.dim() == 1 and not tensor.is_floating_point()
        return tensor.clamp(max=found.real) if lengths and len(tensor) == found.count else tensor

    changed: Batch = with_tensors(batch, shorter)
    return changed


def _outputs(subject: Subject, batch: Batch, found: _Sequences) -> list[Tensor]:
    return list(_of_sample(answer(subject, batch), found))


def _of_sample(output: Any, found: _Sequences) -> Iterator[Tensor]:
    """The padded sample's part of what is given for each sample, whatever the time."""
    for tensor in tensors_in(output):
        axes = [axis for axis, size in enumerate(tensor.shape) if size == found.count]
        if tensor.is_floating_point() and len(axes) == 1:
            yield tensor.select(axes[0], found.padded)


def _changes(before: list[Tensor], after: list[Tensor]) -> bool | None:
    """Whether any output changes; None where no two can be compared."""
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a.shape == b.shape]
    return any(differ(a, b) for a, b in pairs) if pairs else None
