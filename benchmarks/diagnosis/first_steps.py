"""What a peer sees: statistics of parameters, gradients and loss over the first training steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.diagnosis.models import SequenceModel
from benchmarks.diagnosis.sequences import IGNORED
from benchmarks.diagnosis.training import Run, Stage, staged, steps_of

STEPS = 50


@dataclass(frozen=True)
class ParameterFacts:
    """One parameter tensor and its unclipped gradient at one step; update: mean |change|."""

    name: str
    kernel: bool
    norm: float
    mean_abs: float
    mean: float
    zero_share: float
    weight_mean_abs: float
    weight_mean: float
    weight_variance: float
    weight_tiny_share: float
    update: float = float("nan")


@dataclass(frozen=True)
class StepFacts:
    """One training step; skill: accuracy, or for regression the loss's fall since the start."""

    loss: float
    skill: float
    parameters: tuple[ParameterFacts, ...]
    layer_outputs: tuple[float, ...]
    input_mean: float
    input_std: float
    finite: bool

    @property
    def kernels(self) -> list[ParameterFacts]:
        return [p for p in self.parameters if p.kernel]

    @property
    def total_norm(self) -> float:
        return float(sum(p.norm**2 for p in self.parameters) ** 0.5)


@dataclass(frozen=True)
class FirstSteps:
    """The first steps of a run, with what is fixed over them."""

    steps: tuple[StepFacts, ...]
    rate: float
    radius: float | None
    """Spectral radius of the first recurrent matrix; None where it is not square."""
    stopped: bool

    @property
    def start(self) -> FirstSteps:
        """The same facts after the first backward pass alone."""
        return FirstSteps(self.steps[:1], self.rate, self.radius, False)


def first_steps(run: Run, count: int = STEPS) -> FirstSteps:
    """Trains the first steps of that very run: same start, same batches, same clip."""
    stage = staged(run)
    radius = _radius(stage.model)
    seen: list[StepFacts] = []
    outputs: list[float] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: outputs.append(_mean_abs(out)))
        for module in (stage.model.embedding, stage.model.rnn)
    ]
    before: list[Tensor] = []
    stopped = False
    try:
        for (inputs, target), loss in steps_of(stage):
            parameters = [p.detach().float().clone() for p in stage.model.parameters()]
            if seen:
                seen[-1] = _with_updates(seen[-1], before, parameters)
            before = parameters
            if len(seen) == count:
                break
            first = seen[0].loss if seen else loss
            skill = _skill(stage, inputs, target, loss, first) if len(seen) % 10 == 9 else 0.0
            seen.append(_facts(stage, inputs, loss, skill, tuple(outputs)))
            outputs.clear()
    except RuntimeError:
        stopped = True
    for hook in hooks:
        hook.remove()
    return FirstSteps(tuple(seen), stage.setting.rate, radius, stopped)


def _facts(
    stage: Stage, inputs: Tensor, loss: float, skill: float, outputs: tuple[float, ...]
) -> StepFacts:
    x = (inputs[0] if isinstance(inputs, tuple) else inputs).float()
    found = tuple(
        _parameter(name, p) for name, p in stage.model.named_parameters() if p.grad is not None
    )
    finite = all(torch.isfinite(torch.tensor((p.norm, p.weight_mean_abs))).all() for p in found)
    return StepFacts(loss, skill, found, outputs, float(x.mean()), float(x.std()), finite)


@torch.no_grad()
def _parameter(name: str, parameter: nn.Parameter) -> ParameterFacts:
    assert parameter.grad is not None
    gradient, weight = parameter.grad.float(), parameter.detach().float()
    return ParameterFacts(
        name=name,
        kernel=parameter.dim() > 1,
        norm=float(gradient.norm()),
        mean_abs=float(gradient.abs().mean()),
        mean=float(gradient.mean()),
        zero_share=float((gradient == 0).double().mean()),
        weight_mean_abs=float(weight.abs().mean()),
        weight_mean=float(weight.mean()),
        weight_variance=float(weight.var()) if weight.numel() > 1 else float("nan"),
        weight_tiny_share=float((weight.abs() < 1e-5).double().mean()),
    )


def _with_updates(facts: StepFacts, before: list[Tensor], after: list[Tensor]) -> StepFacts:
    changes = [float((b - a).abs().mean()) for b, a in zip(after, before, strict=True)]
    updated = tuple(
        ParameterFacts(**{**vars(p), "update": change})
        for p, change in zip(facts.parameters, changes, strict=True)
    )
    return StepFacts(**{**vars(facts), "parameters": updated})


@torch.no_grad()
def _skill(stage: Stage, inputs: Tensor, target: Tensor, loss: float, first: float) -> float:
    if stage.task.metric == "error":
        return 1 - loss / first
    state = stage.model.state
    out = stage.model(*inputs) if isinstance(inputs, tuple) else stage.model(inputs)
    stage.model.state = state
    return float((out.argmax(-1) == target)[target != IGNORED].double().mean())


def _radius(model: SequenceModel) -> float | None:
    weight = model.rnn.get_parameter("weight_hh_l0").detach().double()
    if weight.shape[0] != weight.shape[1]:
        return None
    return float(torch.linalg.eigvals(weight).abs().max())


def _mean_abs(out: Tensor | tuple[Tensor, ...]) -> float:
    first = out if isinstance(out, Tensor) else out[0]
    data = first.data if not isinstance(first, Tensor) else first
    return float(data.detach().float().abs().mean())
