"""The subject's training loop, one real optimizer step at a time, with what each one showed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.inspection.gates import is_recurrent
from rnnguard.probe.holdings import keeper, same_bits
from rnnguard.probe.nonfinite import (
    FirstNonfinite,
    Search,
    named_inputs,
    named_parameters,
    nonfinite_parameter,
)
from rnnguard.probe.reachable import mutables
from rnnguard.probe.snapshot import Snapshot
from rnnguard.probe.subject import Subject

Stage = Literal["forward", "loss", "backward", "step", "scheduler"]
_ROUNDING = 1e-4  # relative; a clip that takes away less than this is not told from none


@dataclass
class StepReading:
    """What one step showed: its first loss, the norm before and after a clip, what moved.

    `moved` and `weights` are Euclidean norms by parameter: of the change, and of the
    parameter before it.
    """

    loss: float = math.nan
    norm: float = math.nan
    calibrating: bool = False
    applied: bool = False
    cut_to: float | None = None
    moved: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


class Training:
    """Forward, backward, clip, step and schedule as in the user's own training.

    With an optimizer that needs a closure, loss and norm are those of its first call. A
    `scheduler` steps once after each step that moved parameters.
    """

    def __init__(
        self, subject: Subject, optimizer: Optimizer, scaler: Any = None, scheduler: Any = None
    ) -> None:
        self.stage: Stage = "forward"
        self.first_nonfinite: FirstNonfinite | None = None
        self._subject = subject
        self._optimizer = optimizer
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scheduler = scheduler
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self._named = named_parameters(subject.model, held)
        names = {id(parameter): name for name, parameter in self._named.items()}
        self.parameters: dict[str, Tensor] = {names[id(p)]: p for p in held}
        self._batches = subject.batches.batches
        # A model may write into its input, which a loader would give anew.
        self._fresh = [[keeper(held) for held in mutables(batch)] for batch in self._batches]
        self._needs_closure = needs_closure(optimizer)
        self._index = 0
        self._reading = StepReading()
        self._last_norm: float | None = None

    def losses(self) -> tuple[float, ...]:
        """The loss of every batch as the model stands; none where one of them cannot be had.

        Leaves whatever a forward leaves behind.
        """
        try:
            return tuple(float(self._loss(i).detach()) for i in range(len(self._batches)))
        except Exception:
            return ()

    def step(self, index: int) -> StepReading:
        """The step of that number, from 0; raises what model, loss or optimizer raise."""
        self._index, self._reading, self._last_norm = index, StepReading(), None
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        # Within a surrounding autocast, casts of the weights would outlive the step.
        torch.clear_autocast_cache()
        if self._needs_closure:
            self.stage = "step"
            closure: Any = self._evaluated  # torch takes a tensor here, and declares a float
            self._optimizer.step(closure)
        else:
            self._evaluated()
            self._stepped()
        self._compare(before)
        if self._scheduler is not None and self._reading.applied:
            self.stage = "scheduler"
            _advance(self._scheduler, self._reading.loss)
        return self._reading

    def plain_step(self, number: int) -> float:
        """One step on the batch of that number; gives its first loss and reads nothing else."""
        first: list[Tensor] = []

        def evaluated() -> Tensor:
            self._optimizer.zero_grad()
            loss = self._loss(number)
            torch.autograd.backward(loss)
            first.append(loss.detach())
            return first[-1]

        torch.clear_autocast_cache()
        if self._needs_closure:
            closure: Any = evaluated
            self._optimizer.step(closure)
        else:
            evaluated()
            self._optimizer.step()
        return float(first[0])

    def _stepped(self) -> None:
        if self._scaler is None:
            self._optimizer.step()
            return
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def _evaluated(self) -> Tensor:
        """The loss of the batch, its gradients in place; what a closure gives."""
        number = self._index % len(self._batches)
        self._optimizer.zero_grad()
        state = self._state()
        loss = self._loss(number)
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        self.stage = "backward"
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        value = float(loss.detach())
        norm = gradient_norm(self.parameters.values()) / scale
        if self._last_norm is None:
            self._reading.loss, self._reading.norm = value, norm
        self._last_norm = norm
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._look_again(state, number)
        self.stage = "step"
        return loss.detach()

    def _loss(self, number: int) -> Tensor:
        for give_back in self._fresh[number]:
            give_back()
        batches = self._subject.batches
        batch = batches.fresh(self._batches[number])
        self.stage = "forward"
        output = batches.forward(self._subject.model, batch)
        self.stage = "loss"
        loss = batches.scalar(output, batch, self._subject.seed)
        if loss is None:
            raise TypeError("the loss is no tensor")
        return loss

    def _state(self) -> Snapshot:
        """All that a forward may change; parameters are as good as constant until the step."""
        batches = self._subject.batches
        run = (batches.loss, batches.step)
        return Snapshot(self._subject.model, others=run, leaving=self._all_parameters())

    def _all_parameters(self) -> list[Tensor]:
        return list(self._named.values())

    def _look_again(self, state: Snapshot, number: int) -> None:
        """Runs the failing batch once more, unscaled, at the same parameters and state."""
        if self.first_nonfinite is not None and self._scaler is None:
            return
        gradients = [(p, p.grad) for p in self._all_parameters()]
        after = self._state()
        stage = self.stage
        try:
            state.restore()
            for give_back in self._fresh[number]:
                give_back()
            found, repeatable = self._search(number)
            # Gradients that are finite without the scale were only scaled too far.
            scaled = self._scaler is not None and repeatable
            self._reading.calibrating = scaled and found is None
            unclear = FirstNonfinite(step=self._index, batch=number, phase=_phase(self._reading))
            if self.first_nonfinite is None and not self._reading.calibrating:
                self.first_nonfinite = found or unclear
        finally:
            after.restore()
            self.stage = stage
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def _search(self, number: int) -> tuple[FirstNonfinite | None, bool]:
        """The place, if any, and whether the step could be run once more."""
        batch = self._batches[number]
        for parameter in self._all_parameters():
            parameter.grad = None
        raw = batch.raw if self._subject.batches.step is not None else batch.args
        inputs = named_inputs(raw, batch.kwargs, batch.target)
        search = Search(self._subject.model, inputs, self._named, self._index, number)
        try:
            return search.run(lambda: self._loss(number)), True
        except Exception:
            return None, False

    def _compare(self, before: dict[str, Tensor]) -> None:
        reading = self._reading
        for name, parameter in self.parameters.items():
            reading.weights[name] = _norm(before[name])
            same = same_bits(parameter, before[name])
            reading.moved[name] = 0.0 if same else _norm(parameter.detach() - before[name])
            reading.applied |= not same
        if reading.applied and self._last_norm is not None:
            left = gradient_norm(self.parameters.values())
            if left < self._last_norm * (1 - _ROUNDING):
                reading.cut_to = left
        if self.first_nonfinite is None and not all(map(math.isfinite, reading.moved.values())):
            number = self._index % len(self._batches)
            self.first_nonfinite = nonfinite_parameter(self.parameters, self._index, number)


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Gradients on, whatever surrounds the call."""
    recurrent = [module for module in model.modules() if is_recurrent(module)]
    # cuDNN refuses backward through a recurrence in eval mode.
    cudnn = torch.backends.cudnn.enabled and all(module.training for module in recurrent)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.backends.cudnn.flags(enabled=cudnn),
    ):
        yield


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step evaluates the loss itself, as that of LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """The Euclidean norm of all gradients together, in float64; 0 when there are none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return math.hypot(*map(_norm, gradients)) if gradients else 0.0


def _norm(tensor: Tensor) -> float:
    dense = tensor.detach()
    dense = dense.coalesce().values() if dense.is_sparse else dense
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    # Apple's devices have no float64.
    dtype = torch.float32 if dense.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(dense, dtype=dtype))


def _advance(scheduler: Any, loss: float) -> None:
    metrics = inspect.signature(scheduler.step).parameters.get("metrics")
    scheduler.step(loss) if metrics is not None else scheduler.step()


def _phase(reading: StepReading) -> Literal["forward", "backward"]:
    return "backward" if math.isfinite(reading.loss) else "forward"
