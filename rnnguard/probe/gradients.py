"""Gradient norms and losses over a few real backward passes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rnnguard.inspection.batches import Batches

PASSES = 3  # more would cost an audit more training steps than they tell


@dataclass(frozen=True)
class Gradients:
    """Total gradient norm per batch and mean loss; `nonfinite` when any was not finite.

    `by_parameter`: the median norm of each parameter that had a gradient in any batch, by name.
    `first_bad`: the first batch with a loss or norm that is not finite.
    """

    norms: tuple[float, ...]
    loss: float | None
    nonfinite: bool
    by_parameter: Mapping[str, float] = field(default_factory=dict)
    first_bad: int | None = None

    @property
    def median(self) -> float:
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        return statistics.median(finite) if finite else 0.0

    @property
    def spread(self) -> float:
        """Largest norm over the median one."""
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        return max(finite) / self.median if finite and self.median > 0 else 1.0


def parameter_gradients(model: nn.Module, scalar: Tensor) -> dict[str, Tensor]:
    """The gradients of the model's parameters by name; nothing outside the model gets one.

    The graph is kept, since a state from an earlier call may be part of it.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            scalar, parameters, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        # Reentrant checkpointing knows backward() only.
        scalar.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        found = tuple(p.grad for p in parameters)
        for parameter in parameters:
            parameter.grad = None
    pairs = zip(named, found, strict=True)
    return {name: gradient.detach() for name, gradient in pairs if gradient is not None}


def gradient_norms(model: nn.Module, batches: Batches, seed: int) -> Gradients:
    """One backward pass for a few of the batches, first and last among them; in `untouched`."""
    norms: list[float] = []
    losses: list[float] = []
    of: dict[str, list[float]] = {}
    bad: list[int] = []
    for number in _spread(len(batches.batches)):
        batch = batches.fresh(batches.batches[number])
        scalar = batches.scalar(batches.forward(model, batch), batch, seed)
        if scalar is None or not scalar.requires_grad:
            continue
        losses.append(float(scalar.detach()))
        found = parameter_gradients(model, scalar)
        dense = {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}
        norms.append(_norm(dense.values()) if dense else 0.0)
        if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
            bad.append(number)
        for name, gradient in dense.items():
            of.setdefault(name, []).append(_norm([gradient]))
    loss = statistics.fmean(losses) if losses and batches.has_loss else None
    by_parameter = {name: statistics.median(found) for name, found in of.items()}
    first_bad = min(bad, default=None)
    return Gradients(tuple(norms), loss, bool(bad), by_parameter, first_bad)


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors))


def _spread(batches: int) -> list[int]:
    """At most PASSES of so many batches, as far apart as they go."""
    last, count = batches - 1, min(PASSES, batches)
    return [round(i * last / max(1, count - 1)) for i in range(count)]
