"""What is measured: the model with its batches, checked to run, or guessed when none are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.errors import Refusal, RefusedError, refuse
from rnnguard.inspection.batches import Batch, Batches, cloned, inferred_batches
from rnnguard.inspection.gates import is_single_step
from rnnguard.inspection.recording import tensors_in
from rnnguard.inspection.sites import recurrent_modules
from rnnguard.measurements import Provenance
from rnnguard.probe.demand import Demand
from rnnguard.probe.gradients import parameter_gradients
from rnnguard.probe.snapshot import untouched

if TYPE_CHECKING:
    from rnnguard.probe.usage import Usage

INFERRED_STEPS = 64


@dataclass(frozen=True)
class Subject:
    """What is measured: model, optimizer, batches, and what the user said about the task.

    `batch_size`: samples in a batch as a loader says. `usage`, once it is known.
    """

    model: nn.Module
    optimizer: Optimizer | None
    batches: Batches
    memory: int | None
    total_steps: int | None
    seed: int
    guarded: bool
    provenance: Mapping[str, Provenance] = field(default_factory=dict)
    demands: Mapping[str, Demand] = field(default_factory=dict)
    batch_size: int | None = None
    usage: Usage | None = None

    @property
    def largest(self) -> int:
        """The batch with the most to read: of sequences of different length, the longest."""
        sizes = [sum(t.numel() for t in tensors_in(b.raw)) for b in self.batches.batches]
        return sizes.index(max(sizes))

    @property
    def real_length(self) -> bool:
        """Whether the sequences are as long as the task makes them."""
        return self.batches.basis in ("real data", "given inputs")


def check_runs(subject: Subject) -> Subject:
    """The subject, which then knows whether the model changes its input in place.

    Raises RefusedError (RG912) with torch's own words when the model or loss cannot run.
    """
    batches, batch = subject.batches, cloned(subject.batches.batches[subject.largest])
    mine = [t for t in tensors_in(batch) if not t.is_inference()]
    versions = [tensor._version for tensor in mine]
    stage = "step" if batches.step is not None else "model"
    try:
        with untouched(subject.model, optimizer=subject.optimizer):
            output = batches.forward(subject.model, batch)
            stage = "loss" if batches.loss is not None else stage
            scalar = batches.scalar(output, batch, subject.seed)
            reason = _no_gradient(batches, stage, scalar)
            if reason is None and scalar is not None and scalar.requires_grad:
                stage = "backward"
                parameter_gradients(subject.model, scalar)
    except Exception as error:
        if stage == "backward":
            whole = f"differentiating the loss raised {type(error).__name__}: {error}"
            said = whole.splitlines()[0]
            cure = "Detach a state that is kept between calls, and call no backward inside `step`."
            raise RefusedError.of("RG912", stage, f"{said.rstrip('.')}.", cure) from error
        inputs = batch.raw if stage in ("step", "loss") else (batch.args, batch.kwargs)
        words = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {words[0] if words else ''}".rstrip(".: ")
        given = ", ".join(f"{t.dtype}{list(t.shape)}" for t in tensors_in(inputs))
        fact = f"raised {said}, on {given or 'the batch given'}.".replace("torch.", "")
        cure = f"Give what it takes; {_expected(subject.model)}."
        raise RefusedError.of("RG912", stage, fact, cure) from error
    refuse([] if reason is None else [reason])
    consumed = [tensor._version for tensor in mine] != versions
    return replace(subject, batches=replace(batches, consumed=consumed))


def _no_gradient(batches: Batches, stage: str, scalar: Tensor | None) -> Refusal | None:
    """Why a loss cannot be differentiated, if so; without a loss there is nothing to demand."""
    if not batches.has_loss or batches.basis == "site alone":
        return None
    if scalar is None:
        return Refusal("RG912", stage, "it gives no tensor.", "Give the loss as a tensor.")
    if scalar.numel() != 1:
        fact = f"it gives a tensor of shape {list(scalar.shape)}, not one number."
        return Refusal("RG912", stage, fact, "Reduce it, as with `.mean()`.")
    if not scalar.requires_grad:
        fact = "the loss does not depend on any trainable parameter."
        return Refusal("RG912", stage, fact, "Look for no_grad, detach or frozen weights.")
    return None


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
