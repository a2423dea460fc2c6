"""The peers' published rules over a run's first steps, written from their documentation.

Every peer gives its excess: log10 of how far its farthest rule is beyond its threshold, so that
above zero is an alarm and the value ranks runs. Rules without a magnitude count 1 when they
fire. The re-applications are generous: all parameters are looked at where a tool would skip
recurrent layers, and rules that fire on any logits, on any input outside [-1, 1] or on any small
loss (activation_issue, normalised inputs, leakage) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from benchmarks.diagnosis.first_steps import FirstSteps, ParameterFacts, StepFacts

Peer = Callable[[FirstSteps], float]
SILENT = -99.0
FIRED = 1.0
CHECK = 10
"""Steps between two checks of the tools that look at every epoch or every tenth iteration."""


def above(value: float, limit: float) -> float:
    """log10 of value over limit; non-finite values are left to the rules about them."""
    if not math.isfinite(value) or value <= 0:
        return SILENT
    return math.log10(value / limit)


def below(value: float, limit: float) -> float:
    """log10 of limit over value; exact zeros count as three decades below."""
    if not math.isfinite(value):
        return SILENT
    return 3.0 if value <= 0 else math.log10(limit / value)


def fired(condition: bool) -> float:
    return FIRED if condition else SILENT


def worst(excesses: Iterator[float] | Sequence[float]) -> float:
    return max(excesses, default=SILENT)


def _each(seen: FirstSteps) -> Iterator[ParameterFacts]:
    for step in seen.steps:
        yield from step.parameters


def _kernels(seen: FirstSteps) -> Iterator[ParameterFacts]:
    for step in seen.steps:
        yield from step.kernels


def _nonfinite(seen: FirstSteps) -> float:
    return fired(any(not s.finite or not math.isfinite(s.loss) for s in seen.steps))


def sagemaker(seen: FirstSteps) -> float:
    """SageMaker Debugger: VanishingGradient, ExplodingTensor, WeightUpdateRatio, AllZero, loss."""
    checked = seen.steps[::CHECK]
    falls = [1 - later.loss / earlier.loss for earlier, later in pairwise(checked)]
    return worst([
        worst(below(p.mean_abs, 1e-7) for p in _kernels(seen)),
        worst(above(p.update / (p.weight_mean_abs + 1e-9), 10) for p in _kernels(seen)),
        worst(below(p.update / (p.weight_mean_abs + 1e-9), 1e-8) for p in _kernels(seen)),
        fired(any(p.zero_share == 1 for p in _kernels(seen))),
        fired(any(fall < -0.05 for fall in falls) or (falls != [] and max(falls) < 1e-3)),
        _nonfinite(seen),
    ])  # fmt: skip


def autotrainer(seen: FirstSteps) -> float:
    """AUTOTRAINER: kernel-norm ratio, dying ReLU, abnormal data; spoken while not converging.

    Ten steps stand for an epoch; at the start there is no accuracy yet, so nothing is held back.
    """
    symptoms = worst([
        worst(map(_autotrainer_gradients, seen.steps)),
        worst(above(_zero_share(step), 0.7) for step in seen.steps),
        worst(above(value, 10) for step in seen.steps for value in step.layer_outputs),
        fired(any(_collapsed(step) for step in seen.steps)),
    ])  # fmt: skip
    skills = [step.skill for step in seen.steps[CHECK - 1 :: CHECK]]
    if len(skills) < 2:
        return symptoms
    gain = max(later - earlier for earlier, later in pairwise(skills))
    if not math.isfinite(gain):
        return max(symptoms, FIRED)
    if max(skills) < 0.6 and gain < 0.01:
        return max(symptoms, FIRED)
    return symptoms if max(skills) < 0.6 or gain < 0.01 else min(symptoms, 0.0) - 10


def _autotrainer_gradients(step: StepFacts) -> float:
    first, last = step.kernels[0].norm, step.kernels[-1].norm
    if not math.isfinite(first) or not math.isfinite(last) or last == 0:
        return SILENT
    return max(min(below(first / last, 1e-3), below(first, 1e-4)), above(first / last, 70))


def _collapsed(step: StepFacts) -> bool:
    return not step.finite and (not math.isfinite(step.loss) or step.loss >= 1e3)


def _zero_share(step: StepFacts) -> float:
    return sum(p.zero_share for p in step.kernels) / max(1, len(step.kernels))


def deepdiagnosis(seen: FirstSteps) -> float:
    """DeepDiagnosis: mean |gradient|, NaN or zero means, weight variance, constant loss."""
    losses = [step.loss for step in seen.steps]
    return worst([
        worst(below(p.mean_abs, 1e-7) for p in _kernels(seen)),
        fired(any(p.mean == 0 or p.weight_mean == 0 for p in _kernels(seen))),
        worst(max(below(p.weight_variance, 1e-5), above(p.weight_variance, 10))
              for p in _kernels(seen)),
        fired(any(len(set(losses[i : i + 5])) == 1 for i in range(len(losses) - 4))),
        _nonfinite(seen),
    ])  # fmt: skip


def thedeepchecker(seen: FirstSteps) -> float:
    """TheDeepChecker, as documented: gradients, windows of five, update size, dead weights, loss.

    As shipped its buffer holds every value twice, which keeps the windows from ever firing.
    """
    series = _by_name(seen)
    losses = [step.loss for step in seen.steps]
    return worst([
        worst(max(below(p.mean_abs, 1e-6), above(p.mean_abs, 1e6)) for p in _kernels(seen)),
        worst(map(_trend, series.values())),
        worst(map(_update_size, series.values())) if len(seen.steps) >= CHECK else SILENT,
        fired(any(p.weight_tiny_share > 0.95 for p in _kernels(seen))),
        fired(_loss_stalls(losses)),
        _nonfinite(seen),
    ])  # fmt: skip


def _trend(parameters: list[ParameterFacts]) -> float:
    """Four successive ratios that all halve or all double; log2 of the mildest one."""
    found = SILENT
    for at in range(len(parameters) - 4):
        values = [p.mean_abs for p in parameters[at : at + 5]]
        if min(values) > 0 and all(map(math.isfinite, values)):
            ratios = [math.log2(later / earlier) for earlier, later in pairwise(values)]
            found = max(found, min(ratios) - 1, -max(ratios) - 1)
    return found


def _update_size(parameters: list[ParameterFacts]) -> float:
    sizes = [p.update / p.weight_mean_abs for p in parameters if p.weight_mean_abs > 0]
    logs = [math.log10(size) for size in sizes if size > 0 and math.isfinite(size)]
    if not logs:
        return fired(bool(sizes))
    mean = sum(logs) / len(logs)
    return max(mean + 1, -4 - mean)


def _loss_stalls(losses: list[float]) -> bool:
    checks = losses[CHECK - 1 :: CHECK]
    if len(checks) < 5 or not all(map(math.isfinite, losses)):
        return False
    falls = [1 - later / earlier for earlier, later in pairwise(checks)]
    changes = [later - earlier for earlier, later in pairwise(losses)]
    switches = sum(a * b < 0 for a, b in pairwise(changes))
    diverging = all(later / max(min(losses), 1e-12) >= 2 for later in checks[-5:])
    return max(falls) < 0.05 or diverging or 1 - switches / len(losses) < 0.5


def gradientflow(seen: FirstSteps) -> float:
    """GradientFlow, base rules: mean and largest norm, zeros, coefficient of variation."""
    found = [fired(seen.stopped), _nonfinite(seen)]
    for parameters in _by_name(seen).values():
        norms = [p.norm for p in parameters if math.isfinite(p.norm)]
        if not norms:
            continue
        mean = sum(norms) / len(norms)
        deviation = (sum((n - mean) ** 2 for n in norms) / len(norms)) ** 0.5
        found += [
            below(mean, 1e-6) if mean > 0 else SILENT,
            above(max(norms), 10),
            above(max(p.zero_share for p in parameters), 0.9),
            above(deviation / mean, 3) if mean > 0 else SILENT,
        ]
    return worst(found)


def gradientflow_recurrent(seen: FirstSteps) -> float:
    """GradientFlow's recurrent rules: spectral radius outside 0.75..1.05; no gated cells."""
    if seen.radius is None:
        return SILENT
    return max(below(seen.radius, 0.75), above(seen.radius, 1.05))


def dlcheck(seen: FirstSteps) -> float:
    """DLCheck: gradient norms, update ratio by learning rate, weights, constant loss, inputs."""
    losses = [step.loss for step in seen.steps if math.isfinite(step.loss)]
    ratios = [
        _mean_log([seen.rate * p.mean_abs / p.weight_mean_abs for p in parameters
                   if p.weight_mean_abs > 0])
        for parameters in _by_name(seen).values()
    ]  # fmt: skip
    return worst([
        worst(max(above(p.norm, 1e6), below(p.norm, 1e-7)) for p in _each(seen)),
        worst(max(ratio - 1, -8 - ratio) for ratio in ratios if math.isfinite(ratio)),
        worst(above(p.weight_mean_abs, 1e4) for p in _each(seen)),
        fired(len(losses) > 1 and max(losses) - min(losses) < 1e-6),
        worst(max(above(abs(s.input_mean), 10), above(s.input_std, 100)) for s in seen.steps),
        _nonfinite(seen),
    ])  # fmt: skip


def norm_above_one(seen: FirstSteps) -> float:
    """Total gradient norm above 1 at the median step: where clip_grad_norm_(1.0) would act."""
    norms = sorted(step.total_norm for step in seen.steps if math.isfinite(step.total_norm))
    return above(norms[len(norms) // 2], 1) if norms else FIRED


def loss_not_falling(seen: FirstSteps) -> float:
    """No tool: the mean loss of the last ten observed steps is not below that of the first ten."""
    losses = [step.loss for step in seen.steps]
    if len(losses) < 2 * CHECK or not all(map(math.isfinite, losses)):
        return SILENT if len(losses) == 1 and not seen.stopped else 3.0
    return above(sum(losses[-CHECK:]) / max(sum(losses[:CHECK]), 1e-12), 1)


PEERS: dict[str, Peer] = {
    "SageMaker Debugger": sagemaker,
    "AUTOTRAINER": autotrainer,
    "DeepDiagnosis": deepdiagnosis,
    "TheDeepChecker": thedeepchecker,
    "GradientFlow": gradientflow,
    "GradientFlow recurrent": gradientflow_recurrent,
    "DLCheck": dlcheck,
    "norm > 1": norm_above_one,
    "loss not falling": loss_not_falling,
}


def judged(seen: FirstSteps) -> dict[str, float]:
    """Every peer's excess at the start and over the first steps, by column name."""
    found: dict[str, float] = {}
    for name, peer in PEERS.items():
        found[f"{name} @1"] = _bounded(peer(seen.start)) if seen.steps else FIRED
        found[f"{name} @{CHECK * 5}"] = _bounded(max(peer(seen), fired(seen.stopped)))
    return found


def _bounded(value: float) -> float:
    return min(max(value, SILENT), -SILENT)


def _by_name(seen: FirstSteps) -> dict[str, list[ParameterFacts]]:
    series: dict[str, list[ParameterFacts]] = {}
    for parameter in _kernels(seen):
        series.setdefault(parameter.name, []).append(parameter)
    return series


def _mean_log(values: list[float]) -> float:
    logs = [math.log10(v) for v in values if v > 0 and math.isfinite(v)]
    return sum(logs) / len(logs) if logs else math.nan
