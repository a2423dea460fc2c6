"""One measurement of the whole model: recorded run, sites, readings, gradients; no trace left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from rnnguard.errors import RefusedError
from rnnguard.inspection.batches import Batch, Batches, inferred_batches
from rnnguard.inspection.gates import is_single_step
from rnnguard.inspection.provenance import looks_untrained
from rnnguard.inspection.recording import Recording, record, tensors_in
from rnnguard.inspection.sites import (
    FoundSite,
    SiteInput,
    find_sites,
    recurrent_modules,
    unregistered_calls,
)
from rnnguard.probe.demand import Demand, memory_demand
from rnnguard.probe.gradients import Gradients, gradient_norms
from rnnguard.probe.readings import measure_site, memory_needed
from rnnguard.probe.snapshot import untouched
from rnnguard.records import Measurement, OptimizerKind, RunReadings

INFERRED_STEPS = 64


@dataclass(frozen=True)
class Subject:
    """What is measured: model, optimizer, batches, and what the user said about the task."""

    model: nn.Module
    optimizer: Optimizer | None
    batches: Batches
    memory: int | None
    total_steps: int | None
    seed: int
    guarded: bool
    trained: Mapping[str, bool] = field(default_factory=dict)
    demands: Mapping[str, Demand] = field(default_factory=dict)

    @property
    def real_length(self) -> bool:
        """Whether the sequences are as long as the task makes them."""
        return self.batches.basis in ("real data", "given inputs")


@dataclass(frozen=True)
class Look:
    """A measurement together with the sites that it was taken at."""

    measurement: Measurement
    sites: tuple[FoundSite, ...]
    unregistered: tuple[str, ...]
    signature: tuple[Any, ...]


def measure(subject: Subject) -> Look:
    """Runs, records and measures; model, optimizer and random state stay as they were."""
    started = time.perf_counter()
    model, batches = subject.model, subject.batches
    with untouched(model):
        torch.manual_seed(subject.seed)
        recording = _recorded(subject)
        found = tuple(find_sites(model, recording))
        unregistered = tuple(unregistered_calls(model, recording))
        torch.manual_seed(subject.seed)
        gradients = gradient_norms(model, batches, subject.seed)
    sites = tuple(
        measure_site(
            site,
            memory_needed(
                site,
                subject.memory,
                subject.demands.get(site.record.path),
                subject.real_length,
            ),
            seed=subject.seed,
            trained=_is_trained(subject, site),
        )
        for site in found
    )
    run = run_readings(subject, gradients, time.perf_counter() - started)
    signature = tuple((tuple(t.shape), t.dtype) for t in tensors_in(recording.result))
    return Look(Measurement(run=run, sites=sites), found, unregistered, signature)


def _is_trained(subject: Subject, site: FoundSite) -> bool:
    """As found at the first look, since remedies must not change the answer; else looked up."""
    known = subject.trained.get(site.record.path)
    if known is not None:
        return known
    stepped = subject.optimizer is not None and len(subject.optimizer.state) > 0
    return stepped or not looks_untrained(site.module)


def with_demands(subject: Subject) -> Subject:
    """The subject with what its data demand of each site that reads out the last step."""
    targets = [batch.target for batch in subject.batches.batches]
    if not all(isinstance(target, Tensor) for target in targets):
        return subject
    given: dict[str, list[SiteInput]] = {}
    with untouched(subject.model):
        for index in range(len(targets)):
            torch.manual_seed(subject.seed)
            for site in find_sites(subject.model, _recorded(subject, index)):
                if _reads_last_step(site) and site.input.x.shape[1] == len(targets[index]):
                    given.setdefault(site.record.path, []).append(site.input)
    found = {
        path: memory_demand([p.x for p in parts], [p.lengths for p in parts], targets, subject.seed)
        for path, parts in given.items()
        if len(parts) == len(targets)
    }
    return replace(subject, demands={path: d for path, d in found.items() if d is not None})


def _reads_last_step(site: FoundSite) -> bool:
    """Whether the lag to the target is the distance to the end of the sequence."""
    return site.record.readout in ("last_step", "final_state") and not site.record.bidirectional


def _recorded(subject: Subject, index: int = 0) -> Recording:
    batches, model = subject.batches, subject.model
    batch = batches.batches[index]
    inputs = batch.raw if batches.step is not None else (batch.args, batch.kwargs)
    return record(lambda: batches.forward(model, batch), model, inputs)


def check_runs(subject: Subject) -> None:
    """Raises RefusedError (RG912) with torch's own words when the model or loss cannot run."""
    batches, batch = subject.batches, subject.batches.batches[0]
    stage = "step" if batches.step is not None else "model"
    try:
        with untouched(subject.model):
            output = batches.forward(subject.model, batch)
            stage = "loss" if batches.has_loss else "model"
            batches.scalar(output, batch, subject.seed)
    except Exception as error:
        inputs = batch.raw if stage in ("step", "loss") else (batch.args, batch.kwargs)
        words = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {words[0] if words else ''}".rstrip(".: ")
        given = ", ".join(f"{t.dtype}{list(t.shape)}" for t in tensors_in(inputs))
        fact = f"raised {said}, on {given or 'the batch given'}.".replace("torch.", "")
        cure = f"Give what it takes; {_expected(subject.model)}."
        raise RefusedError.of("RG912", stage, fact, cure) from error


def _expected(model: nn.Module) -> str:
    """What the first layer takes, in words."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            return f"`{path}` is an Embedding of {module.num_embeddings} and takes integer ids"
        if path in recurrent_modules(model):
            layout = "(B, T, F)" if getattr(module, "batch_first", False) else "(T, B, F)"
            layout = "(B, F)" if is_single_step(module) else layout
            return f"`{path or 'the model'}` takes {layout} with F = {module.input_size}"
    return "see the model's forward"


def guessed_batches(model: nn.Module, memory: int | None, seed: int) -> Batches:
    """A made-up batch that the model runs on; else the recurrences alone on normal input."""
    steps = max(INFERRED_STEPS, memory or 0)
    for batches in inferred_batches(model, steps, seed):
        try:
            with untouched(model):
                batches.forward(model, batches.batches[0])
        except Exception:
            continue
        return batches
    return _sites_alone(model, steps, seed)


def _sites_alone(model: nn.Module, steps: int, seed: int) -> Batches:
    def run(_: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        outputs = [_run_alone(m, inputs[path]) for path, m in recurrent_modules(model).items()]
        weighted = [(output.float() * 1e-2).sum() for output in outputs]
        return torch.stack(weighted).sum()

    generator = torch.Generator().manual_seed(seed)
    inputs = {
        path: _normal(module, steps, generator) for path, module in recurrent_modules(model).items()
    }
    batch = Batch((), {}, None, inputs)
    return Batches((batch,) if inputs else (), "site alone", None, None, run)


def _normal(module: nn.Module, steps: int, generator: torch.Generator) -> Tensor:
    like = next(module.parameters())
    x = torch.randn(steps, 8, int(module.input_size), generator=generator)  # type: ignore[arg-type]
    return x.to(device=like.device, dtype=like.dtype)


def _run_alone(module: nn.Module, x: Tensor) -> Tensor:
    if not is_single_step(module):
        output: Tensor = module(x.transpose(0, 1) if module.batch_first else x)[0]
        return output
    state = None
    for step in x:
        state = module(step, state)
    assert state is not None
    last: Tensor = state[0] if isinstance(state, tuple) else state
    return last


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
        **_optimizer_readings(subject.optimizer, parameters),
    )


_Precision = Literal["fp64", "fp32", "bf16", "fp16"]
_PRECISIONS: dict[torch.dtype, _Precision] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def _optimizer_readings(optimizer: Optimizer | None, parameters: list[Any]) -> dict[str, Any]:
    groups = [] if optimizer is None else optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    missing = [p for p in parameters if p.requires_grad and id(p) not in held]
    rates = [group["lr"] for group in groups if isinstance(group.get("lr"), float)]
    return {
        "optimizer": optimizer_kind(optimizer),
        "learning_rate": rates[0] if rates else None,
        "weight_decay": float(max((g.get("weight_decay") or 0 for g in groups), default=0)),
        "amsgrad": any(group.get("amsgrad", False) for group in groups),
        "scheduled": any("initial_lr" in group for group in groups),
        "parameters_missing": len(missing) if optimizer is not None else 0,
    }


def optimizer_kind(optimizer: Optimizer | None) -> OptimizerKind:
    """Which family the optimizer is, as rules name them."""
    if optimizer is None:
        return "none"
    decoupled = any(g.get("decoupled_weight_decay") for g in optimizer.param_groups)
    if isinstance(optimizer, AdamW) or (isinstance(optimizer, Adam) and decoupled):
        return "adamw"
    if isinstance(optimizer, Adam):
        return "adam"
    return "sgd" if isinstance(optimizer, SGD) else "other"
