"""Gradient norms and losses over a few real backward passes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnnguard.inspection.batches import Batch, Batches

PASSES = 3  # more would cost an audit more training steps than they tell


@dataclass(frozen=True)
class Gradients:
    """Total gradient norm per batch and mean loss; `nonfinite` when any was not finite."""

    norms: tuple[float, ...]
    loss: float | None
    nonfinite: bool

    @property
    def median(self) -> float:
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        return statistics.median(finite) if finite else 0.0

    @property
    def spread(self) -> float:
        """Largest norm over the median one."""
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        return max(finite) / self.median if finite and self.median > 0 else 1.0


def parameter_gradients(model: nn.Module, scalar: Tensor) -> list[Tensor]:
    """The gradients of the model's parameters; nothing outside the model gets one.

    The graph is kept, since a state from an earlier call may be part of it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
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
    return [gradient.detach() for gradient in found if gradient is not None]


def gradient_norms(model: nn.Module, batches: Batches, seed: int) -> Gradients:
    """One backward pass for a few of the batches, first and last among them; in `untouched`."""
    norms: list[float] = []
    losses: list[float] = []
    for batch in _spread(batches.batches):
        batch = batches.fresh(batch)
        scalar = batches.scalar(batches.forward(model, batch), batch, seed)
        if scalar is None or not scalar.requires_grad:
            continue
        losses.append(float(scalar.detach()))
        found = parameter_gradients(model, scalar)
        dense = [g.to_dense() if g.is_sparse else g for g in found]
        norms.append(float(torch.nn.utils.get_total_norm(dense)) if dense else 0.0)
    nonfinite = not all(map(math.isfinite, (*norms, *losses)))
    loss = statistics.fmean(losses) if losses and batches.has_loss else None
    return Gradients(tuple(norms), loss, nonfinite)


def _spread(batches: Sequence[Batch]) -> list[Batch]:
    """At most PASSES of the batches, as far apart as they go."""
    last, count = len(batches) - 1, min(PASSES, len(batches))
    return [batches[round(i * last / max(1, count - 1))] for i in range(count)]
