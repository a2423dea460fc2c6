"""Weights of a recurrence that training cannot change, or changes in vain.

A recurrent module keeps a list of the tensors that its kernel takes. Code that writes a weight
anew in every forward, or keeps another list, leaves the parameters outside of what is computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, fx, nn

from rnnguard.inspection.arguments import is_cell, is_packed
from rnnguard.inspection.batches import Batch, cloned
from rnnguard.inspection.recording import tensors_in
from rnnguard.inspection.sites import FoundSite
from rnnguard.probe.batch_axis import samples_of, shortened
from rnnguard.probe.gradients import Gradients
from rnnguard.probe.snapshot import moved, same_bits, untouched
from rnnguard.probe.stillness import differ, reseed
from rnnguard.probe.subject import Subject

NUDGE = 0.3  # of a weight's rms
_WEIGHT = re.compile(r"(weight|bias)_(ih|hh|hr)")


def bypassed_weights(
    subject: Subject, sites: Sequence[FoundSite], gradients: Gradients
) -> dict[str, tuple[str, ...]]:
    """By path of a site the trainable weights that its training bypasses; in `untouched`.

    Those that its kernel was not given, and those overwritten in every forward, where another
    value of them leaves the output as it is; and those copied into a weight without gradient.
    """
    if not gradients.by_parameter:
        return {}
    named = _trainable(subject.model)
    own = {site.record.path: _own_weights(subject.model, site, named) for site in sites}
    try:
        every = sorted(set[str]().union(*own.values()))
        overwritten = _overwritten(subject, sites, every) if every else set[str]()
        found = {
            site.record.path: _of(subject, site, gradients, own[site.record.path], overwritten)
            for site in sites
        }
    except Exception:  # other weights may be ones that the model refuses
        return {}
    return {path: names for path, names in found.items() if names}


def _of(
    subject: Subject, site: FoundSite, gradients: Gradients, own: set[str], overwritten: set[str]
) -> tuple[str, ...]:
    named = _trainable(subject.model)
    slots = [_made_of(weight) for weight in _weights_in(site.calls)]
    taken = set[str]().union(*slots)
    reached = {name for name, norm in gradients.by_parameter.items() if norm > 0}
    # Where every weight of the kernel stands for a parameter, one that is left over harms nothing.
    stale = not all(slots)
    left_out = {n for n in own if n not in taken and n not in reached} if stale else set[str]()
    doubtful = left_out | (overwritten & own)
    proven = _without_effect(subject, sorted(doubtful)) if doubtful else set[str]()
    copied = {n for n in taken if n in named and n not in gradients.by_parameter}
    # A site that no gradient reaches has lost more than a weight, which is not told here.
    if not proven and (copied.isdisjoint(own) or reached.isdisjoint(taken)):
        copied = set()
    return tuple(name for name in named if name in proven | copied)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _own_weights(model: nn.Module, site: FoundSite, named: Iterable[str]) -> set[str]:
    """The parameters of the site's module that are, or are to become, weights of its kernel."""
    inside = {id(parameter) for parameter in site.module.parameters()}
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    return {name for name in named if ids[name] in inside and _WEIGHT.search(name)}


def _weights_in(calls: Iterable[fx.Node]) -> list[fx.Node]:
    """The tensors that the kernel was given as weights in its first call."""
    call = min(calls, key=lambda node: int(node.meta["order"]))
    given = call.args[2:] if is_cell(call) else call.args[3 if is_packed(call) else 2]
    parts = given if isinstance(given, tuple | list) else (given,)
    return [node for node in parts if isinstance(node, fx.Node)]


def _made_of(weight: fx.Node) -> set[str]:
    """The names of the parameters that a weight is, or is made from."""
    pending, seen = [weight], {weight}
    while pending:
        fresh = [node for node in pending.pop().all_input_nodes if node not in seen]
        seen.update(fresh)
        pending += fresh
    return {str(node.target) for node in seen if node.meta.get("name") == "parameter"}


def _overwritten(subject: Subject, sites: Sequence[FoundSite], names: list[str]) -> set[str]:
    """Those of the weights that a forward replaces, whatever it is run on."""
    batches = subject.batches
    batch = batches.batches[subject.largest]
    samples = samples_of(batch, None, [site.record for site in sites], subject.batch_size)
    short = None if samples is None or batches.step is not None else shortened(batch, samples)
    if short is not None:
        with suppress(Exception):  # as of a model for sequences of one length
            return _run(subject, names, short)[1]
    return _run(subject, names)[1]


def _without_effect(subject: Subject, names: list[str]) -> set[str]:
    """Those of the weights that may have other values without the output being another."""
    before = _run(subject, [])[0]
    if not _changes(before, _run(subject, names)[0]):
        return set(names)
    if len(names) == 1:
        return set()
    return {name for name in names if not _changes(before, _run(subject, [name])[0])}


def _run(
    subject: Subject, nudged: Sequence[str], batch: Batch | None = None
) -> tuple[list[Tensor], set[str]]:
    """The output with these weights moved, and those of them that are not left as they are."""
    model, batches = subject.model, subject.batches
    named = dict(model.named_parameters())
    reseed(subject.seed)
    with (
        untouched(model, optimizer=subject.optimizer),
        torch.no_grad(),
        moved([named[name] for name in nudged], NUDGE),
    ):
        given = {name: named[name].detach().clone() for name in nudged}
        reseed(subject.seed)
        own = cloned(batch or batches.batches[subject.largest])
        outputs = [t.clone() for t in tensors_in(batches.forward(model, own))]
        now = dict(model.named_parameters())
        lost = {n for n, value in given.items() if n not in now or not same_bits(now[n], value)}
    return outputs, lost


def _changes(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) != len(after) or any(map(differ, before, after))
