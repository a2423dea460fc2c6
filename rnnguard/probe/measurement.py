"""One measurement of the whole model: recorded run, sites, readings, gradients; no trace left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from rnnguard.inspection.batches import Batches
from rnnguard.inspection.loops import Loop, find_loops
from rnnguard.inspection.neighbours import layers_behind, parts_of, spans_of
from rnnguard.inspection.optimized import decay_on_biases, missing_parameters
from rnnguard.inspection.progress import progress_of
from rnnguard.inspection.provenance import provenance_of, provenance_of_written
from rnnguard.inspection.recording import Recording, record, tensors_in
from rnnguard.inspection.sites import (
    FoundSite,
    find_sites,
    unregistered_calls,
)
from rnnguard.inspection.written import WrittenSite, relative, rounds, written_sites
from rnnguard.measurements import Measurement, Provenance, RunReadings, Site, SiteReadings
from rnnguard.probe.backflow import Backflow
from rnnguard.probe.carryover import (
    answers_differently,
    carried_over,
    held_by,
    kept_tensors,
    place_of,
    takes_graph_along,
)
from rnnguard.probe.gradients import Gradients, gradient_norms
from rnnguard.probe.layer_ratio import layer_ratio
from rnnguard.probe.nonfinite import first_nonfinite
from rnnguard.probe.readings import Memory, measure_site, memory_needed
from rnnguard.probe.resettable import holders, resets
from rnnguard.probe.snapshot import untouched
from rnnguard.probe.stillness import reseed
from rnnguard.probe.subject import Subject
from rnnguard.probe.usage import Usage, proven, seen_in
from rnnguard.probe.written_readings import measure_written, with_backflow
from rnnguard.records import OptimizerKind


@dataclass(frozen=True)
class Look:
    """A measurement together with the sites that it was taken at."""

    measurement: Measurement
    sites: tuple[FoundSite | WrittenSite, ...]
    rounds: tuple[Loop, ...]
    unregistered: tuple[str, ...]
    signature: tuple[Any, ...]
    usage: Usage | None = None


def measure(subject: Subject) -> Look:
    """Runs, records and measures; model, optimizer and random state stay as they were."""
    started = time.perf_counter()
    model, batches = subject.model, subject.batches
    with untouched(model, optimizer=subject.optimizer):
        reseed(subject.seed)
        recording = recorded(subject, subject.largest)
        loops = find_loops(recording.graph)
        native = find_sites(model, recording, cells_in(rounds(loops)))
        known = {call for site in native for call in site.calls}
        written = [with_backflow(site) for site in written_sites(model, loops, known)]
        found: tuple[FoundSite | WrittenSite, ...] = (*native, *(site for site, _ in written))
        usage = subject.usage or seen_in(recording, subject, found)
        unregistered = tuple(unregistered_calls(model, recording))
        # Inside, since some models make their recurrent weights anew in every forward.
        sites = [_measured(subject, site) for site in native]
        sites += [_measured_written(subject, site, flow) for site, flow in written]
        sites, kept = _with_carryover(subject, recording, sites)
        reseed(subject.seed)
        gradients = gradient_norms(model, batches, subject.seed)
        if subject.usage is None:
            usage = proven(usage, recording, subject, found, gradients)
        first_bad = _first_bad(subject, gradients.first_bad)
    run = run_readings(subject, gradients, time.perf_counter() - started)
    places = {name: place for each in (kept, first_bad) for name, place in each["places"].items()}
    run = usage.of_run(run.model_copy(update=kept | first_bad | {"places": places}))
    ratios = {site.record.path: layer_ratio(site, gradients.by_parameter) for site in native}
    sites = [s.model_copy(update={"layer_ratio": ratios.get(s.path)}) for s in sites]
    signature = tuple(_form(tensor) for tensor in tensors_in(recording.result))
    measurement = Measurement(run=run, sites=tuple(map(usage.of_site, sites)))
    return Look(measurement, found, tuple(rounds(loops)), unregistered, signature, usage)


def _first_bad(subject: Subject, batch: int | None) -> dict[str, Any]:
    """The first value of that batch that is not finite, in words and by the user's line."""
    if batch is None:
        return {"places": {}}
    found = first_nonfinite(subject, batch)
    if found is None:
        words = f"batch {batch}, not found again when run once more"
        return {"first_nonfinite": words, "places": {}}
    places = {} if found.location is None else {"nonfinite": str(relative(found.location))}
    return {"first_nonfinite": str(found), "places": places}


def unmeasured(subject: Subject) -> Look:
    """What is known of a model that must not be run: the optimizer's facts, and no site."""
    batches = Batches((), "not run", None, None, None)
    run = run_readings(replace(subject, batches=batches), Gradients((), None, False), 0.0)
    return Look(Measurement(run=run, sites=()), (), (), (), ())


def _with_carryover(
    subject: Subject, recording: Recording, sites: list[SiteReadings]
) -> tuple[list[SiteReadings], dict[str, Any]]:
    """The sites that go on from the state of the batch before, and whether its graph is kept."""
    kept = kept_tensors(recording)
    if not kept:
        return sites, {"places": {}}
    held = holders(subject.model, kept)
    reseed(subject.seed)
    again = recorded(subject, subject.largest, kept)
    carried = carried_over(subject.model, again)
    silent = answers_differently(recording, again)
    reset = resets(subject.model, carried, held, subject.batches.step) if silent else {}
    told = [
        site.model_copy(
            update={"carried_over": site.path in carried, "resettable": reset.get(site.path)}
        )
        for site in sites
    ]
    nodes = {node for nodes in carried.values() for node in nodes}
    read = {str(node.target) for node in nodes if takes_graph_along(node)}
    with_graph = [t for i, t in enumerate(kept) if t.grad_fn is not None and f"kept{i}" in read]
    place = next((place_of(recording, tensor) for tensor in with_graph), None)
    places = {} if place is None else {"graph_kept": place}
    return told, {"graph_kept": bool(with_graph), "places": places}


def cells_in(loops: Iterable[Loop]) -> set[fx.Node]:
    """The calls of torch's cells in the loops."""
    return {call for loop in loops for call in loop.native}


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """What must stay of an output: decoding until a stop token may change its length."""
    width = tensor.shape[-1] if tensor.is_floating_point() and tensor.dim() else None
    return tensor.dim(), width, tensor.dtype


def _measured(subject: Subject, site: FoundSite) -> SiteReadings:
    own = list(site.module.parameters(recurse=False))
    beside = layers_behind(subject.model, site.record.path)
    known = _provenance(subject, site.record, own, lambda: provenance_of(site.module, beside))
    memory = _memory(subject, site.record)
    readings = measure_site(site, memory, seed=subject.seed, trained=known.trained)
    return readings.model_copy(update={"provenance": known})


def _measured_written(subject: Subject, site: WrittenSite, flow: Backflow) -> SiteReadings:
    named = dict(subject.model.named_parameters())
    own = [named[name] for name in site.record.weights if name in named]
    biases = {b.bias for g in site.wiring.gates for b in (*g.keep, *g.write)}
    touched = [*own, *(named[name] for name in sorted(biases) if name in named)]
    parts = parts_of(site.record.weights, spans_of(site.wiring), named)
    known = _provenance(subject, site.record, touched, lambda: provenance_of_written(parts))
    memory = _memory(subject, site.record)
    readings = measure_written(site, flow, memory, seed=subject.seed, trained=known.trained)
    return readings.model_copy(update={"provenance": known})


def _memory(subject: Subject, site: Site) -> Memory:
    demand = subject.demands.get(site.path)
    return memory_needed(site, subject.memory, demand, subject.real_length)


def _provenance(
    subject: Subject, site: Site, own: list[nn.Parameter], look: Callable[[], Provenance]
) -> Provenance:
    """As found at the first look, since remedies must not change the answer; else looked up."""
    known = subject.provenance.get(site.path)
    return known or progress_of(own, subject.optimizer) or look()


def recorded(subject: Subject, index: int, kept: Iterable[Tensor] = ()) -> Recording:
    """One of the batches run and recorded."""
    batches, model = subject.batches, subject.model
    batch = batches.fresh(batches.batches[index])
    inputs = batch.raw if batches.step is not None else (batch.args, batch.kwargs)
    held = partial(held_by, batches.step)
    return record(lambda: batches.forward(model, batch), model, inputs, kept, held)


def run_readings(subject: Subject, gradients: Gradients, seconds: float) -> RunReadings:
    """The readings of the run: what it rests on, gradients, and the optimizer's facts."""
    parameters = list(subject.model.parameters())
    first = next((p for p in parameters if p.is_floating_point()), None)
    dtype = first.dtype if first is not None else torch.float32
    return RunReadings(
        basis=subject.batches.basis,
        batches=len(subject.batches.batches),
        loss=gradients.loss,
        grad_norm=gradients.median,
        grad_norm_spread=gradients.spread,
        nonfinite=gradients.nonfinite,
        precision=_PRECISIONS.get(dtype, "fp32"),
        device=first.device.type if first is not None else "cpu",
        guarded=subject.guarded,
        batches_per_epoch=subject.batches.per_epoch,
        total_steps=subject.total_steps,
        seed=subject.seed,
        seconds=seconds,
        torch=torch.__version__,
        **_optimizer_readings(subject.optimizer, subject.model),
    )


_Precision = Literal["fp64", "fp32", "bf16", "fp16"]
_PRECISIONS: dict[torch.dtype, _Precision] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def _optimizer_readings(optimizer: Optimizer | None, model: nn.Module) -> dict[str, Any]:
    groups = [] if optimizer is None else optimizer.param_groups
    rates = [group["lr"] for group in groups if isinstance(group.get("lr"), float)]
    return {
        "optimizer": optimizer_kind(optimizer),
        "learning_rate": rates[0] if rates else None,
        "weight_decay": 0.0 if optimizer is None else decay_on_biases(model, optimizer),
        "amsgrad": any(group.get("amsgrad", False) for group in groups),
        "scheduled": any("initial_lr" in group for group in groups),
        "parameters_missing": 0 if optimizer is None else len(missing_parameters(model, optimizer)),
    }


def optimizer_kind(optimizer: Optimizer | None) -> OptimizerKind:
    """Which family the optimizer is, as rules name them."""
    if optimizer is None:
        return "none"
    decoupled = any(g.get("decoupled_weight_decay") for g in optimizer.param_groups)
    # Exact types only: a user's subclass has a step of its own.
    if type(optimizer) is AdamW or (type(optimizer) is Adam and decoupled):
        return "adamw"
    if type(optimizer) is Adam:
        return "adam"
    return "sgd" if type(optimizer) is SGD else "other"
