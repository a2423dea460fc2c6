"""What the model's code does with its recurrences: the readings that need no dynamics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from rnnguard.inspection.cuts import cut_at
from rnnguard.inspection.hidden_state import state_index
from rnnguard.inspection.kernel_layout import is_contiguous, refuses_backward
from rnnguard.inspection.makers import made_at
from rnnguard.inspection.optimized import foreign_parameters, missing_parameters
from rnnguard.inspection.recording import Recording
from rnnguard.inspection.sites import FoundSite
from rnnguard.inspection.source import source_readings
from rnnguard.inspection.written import WrittenSite, relative
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.probe.bypassed import bypassed_weights
from rnnguard.probe.gradients import Gradients
from rnnguard.probe.idle import feeding, idle_parameters, in_words
from rnnguard.probe.leakage import leakage
from rnnguard.probe.padding import behind_padding
from rnnguard.probe.reach import reach_share
from rnnguard.probe.reverse_read import steps_seen
from rnnguard.probe.subject import Subject

Found = FoundSite | WrittenSite
Fields = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Fields of RunUsage, and by path those of SiteUsage."""

    run: Fields
    sites: Mapping[str, Fields]

    def of_site(self, site: SiteReadings) -> SiteReadings:
        """The site's readings with these."""
        own = self.sites.get(site.path, {})
        return site.model_copy(update=own | {"reach_share": reach_share(site)})

    def of_run(self, run: RunReadings) -> RunReadings:
        """The run's readings with these."""
        places = run.places | self.run.get("places", {})
        return run.model_copy(update=self.run | {"places": places})


def seen_in(recording: Recording, subject: Subject, sites: Sequence[Found]) -> Usage:
    """What the recorded graph and the user's source tell; right behind the recording."""
    batches, model = subject.batches, subject.model
    run = source_readings(model, loss=batches.loss, step=batches.step)
    optimizer = subject.optimizer
    if optimizer is not None:
        criterion = batches.loss if isinstance(batches.loss, nn.Module) else None
        run["parameters_foreign"] = len(foreign_parameters(model, optimizer, criterion))
    return Usage(run, {site.record.path: _seen(recording, subject, site) for site in sites})


def _seen(recording: Recording, subject: Subject, site: Found) -> Fields:
    optimizer = subject.optimizer
    groups = [] if optimizer is None else optimizer.param_groups
    held = None if optimizer is None else {id(p) for group in groups for p in group["params"]}
    places = {"detached": cut_at(recording, site, subject.model, held)}
    found: Fields = {"detached": places["detached"] is not None}
    if isinstance(site, FoundSite):
        found |= _seen_of_native(recording, subject, site, places)
    return found | {"places": {name: place for name, place in places.items() if place}}


def _seen_of_native(
    recording: Recording, subject: Subject, site: FoundSite, places: dict[str, str | None]
) -> Fields:
    batches = subject.batches
    batch = batches.batches[subject.largest]
    scalar = batches.scalar(recording.result, batch, subject.seed)
    label, places["state_index"] = state_index(site.calls)
    read = steps_seen(site, recording, scalar)
    places["reverse_seen"] = None if read is None else read.place
    used = [w for call in recording.calls if call.node in site.calls for w in call.weights]
    return {
        "state_index": label,
        "reverse_seen": None if read is None else read.reverse,
        "contiguous": is_contiguous(site.module, used),
        "eval_mode": refuses_backward(site.module, site.input.x.device.type),
    }


def proven(
    usage: Usage, recording: Recording, subject: Subject, sites: Sequence[Found],
    gradients: Gradients,
) -> Usage:  # fmt: skip
    """The same with what runs on altered inputs and weights prove; inside `untouched`."""
    native = [site for site in sites if isinstance(site, FoundSite)]
    bypassed = bypassed_weights(subject, native, gradients)
    found: dict[str, Fields] = {path: dict(fields) for path, fields in usage.sites.items()}
    for path, names in bypassed.items():
        found[path] |= {"bypassed_weights": len(names), "bypassed_names": in_words(names)}
    for each in native:
        found[each.record.path]["behind_padding"] = behind_padding(subject, each.record)
    explained = {name for names in bypassed.values() for name in names}
    for site in sites:
        if found[site.record.path]["detached"]:
            explained |= feeding(recording.graph, _calls(site))
    idle = idle_parameters(subject, gradients, explained)
    missing = _missing(subject, gradients)
    run = usage.run | {"parameters_idle": len(idle), "idle_names": in_words(idle)}
    if subject.optimizer is not None:
        run |= {"parameters_missing": len(missing), "missing_names": in_words(missing)}
    for reading, names in (("parameters_idle", idle), ("parameters_missing", missing)):
        if names and (place := made_at(subject.model, names[0])) is not None:
            run["places"] = run["places"] | {reading: str(relative(place))}
    return Usage(run | _mixed(subject, sites, run["places"], found), found)


def _missing(subject: Subject, gradients: Gradients) -> tuple[str, ...]:
    """What the optimizer lacks of the parameters that a gradient reaches."""
    if subject.optimizer is None:
        return ()
    names = missing_parameters(subject.model, subject.optimizer)
    # Without any gradient it is a copy that something else keeps up, or never used.
    return tuple(name for name in names if name in gradients.by_parameter)


def _calls(site: Found) -> Collection[fx.Node]:
    return site.calls if isinstance(site, FoundSite) else site.loop.uses


def _mixed(
    subject: Subject, sites: Sequence[Found], places: dict[str, str], seen: Mapping[str, Fields]
) -> Fields:
    mixed = leakage(subject, [site.record for site in sites], subject.batch_size)
    if mixed is None:
        return {}
    views = (f["places"].get("state_index") for f in seen.values()
             if f.get("state_index") == "mixed axes")  # fmt: skip
    place = mixed.location or next(views, None)
    places = places | ({"leakage": place} if place and mixed.share else {})
    return {"leakage": mixed.share, "mixed_axis": mixed.axis, "places": places}
