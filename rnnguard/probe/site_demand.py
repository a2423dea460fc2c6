"""What the data demand of each site, from what the site is given when the model runs on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rnnguard.inspection.loops import find_loops
from rnnguard.inspection.recording import tensors_in
from rnnguard.inspection.sites import FoundSite, find_sites
from rnnguard.inspection.written import WrittenSite, rounds, written_sites
from rnnguard.measurements import Site
from rnnguard.probe.demand import demand_of
from rnnguard.probe.demand_data import Part, site_parts
from rnnguard.probe.measurement import cells_in, recorded
from rnnguard.probe.snapshot import untouched
from rnnguard.probe.subject import Subject

# Sequences that suffice where their values are so many that more would only cost time.
SUFFICIENT = 192
MANY = 4_000_000
_ENDS = ("last_step", "final_state")


def with_demands(subject: Subject) -> Subject:
    """The subject with what its data demand of each site that reads forward in time."""
    targets = [batch.target for batch in subject.batches.batches]
    if not all(isinstance(target, Tensor) and target.dim() > 0 for target in targets):
        return subject
    given: dict[str, list[Part]] = {}
    count = 0
    with untouched(subject.model, optimizer=subject.optimizer):
        for index in range(len(targets)):
            torch.manual_seed(subject.seed)
            for path, part in _parts(subject, index):
                given.setdefault(path, []).append(part)
            count += 1
            if given and all(map(_suffice, given.values())):
                break
    whole = {path: parts for path, parts in given.items() if len(parts) == count}
    found = {path: demand_of(parts, subject.seed) for path, parts in whole.items()}
    return replace(subject, demands={path: d for path, d in found.items() if d is not None})


def _suffice(parts: list[Part]) -> bool:
    values = sum(part.inputs.numel() for part in parts)
    return values >= MANY and sum(len(part.lengths) for part in parts) >= SUFFICIENT


def _parts(subject: Subject, index: int) -> Iterator[tuple[str, Part]]:
    """What each site is given of one batch, beside the target that it is read out for."""
    target = subject.batches.batches[index].target
    with torch.no_grad():
        recording = recorded(subject, index)
    loops = find_loops(recording.graph)
    native = find_sites(subject.model, recording, cells_in(rounds(loops)))
    known = {call for site in native for call in site.calls}
    sites: list[FoundSite | WrittenSite] = [*native]
    sites += written_sites(subject.model, loops, known)
    for site in sites:
        per_step = site.record.readout == "all_steps"
        if site.record.bidirectional or not (per_step or site.record.readout in _ENDS):
            continue
        x, lengths = _inputs(site, subject.batches.batches[index].raw)
        parts = None if x is None else site_parts([x], [lengths], [target], per_step)
        if parts and parts[0].inputs.shape[0] == len(parts[0].target):
            yield site.record.path, parts[0]


def _inputs(site: FoundSite | WrittenSite, raw: Any) -> tuple[Tensor | None, Tensor]:
    """The site's own inputs (T, B, F) and lengths; of a hand-written one the model's."""
    if isinstance(site, FoundSite):
        back = None if site.order is None else site.order.argsort()
        x, lengths = site.input.x, site.input.lengths
        return (x, lengths) if back is None else (x[:, back], lengths[back])
    for tensor in tensors_in(raw):
        found = _time_first(tensor, site.record)
        if found is not None:
            return found, torch.full((found.shape[1],), len(found))
    return None, torch.zeros(0)


def _time_first(tensor: Tensor, site: Site) -> Tensor | None:
    """A model's input as (T, B, F), if one of its first two axes is as long as the loop."""
    if tensor.dim() not in (2, 3) or site.steps not in tensor.shape[:2]:
        return None
    x = tensor if tensor.shape[0] == site.steps else tensor.transpose(0, 1)
    if x.dim() == 3:
        return x if x.is_floating_point() else None
    return x[..., None].float() if x.is_floating_point() else None
