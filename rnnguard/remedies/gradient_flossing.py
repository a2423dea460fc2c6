"""Recurrent weights trained for a moment so that the leading Lyapunov exponents come to zero.

Engelken 2023, Gradient flossing (arXiv 2312.17306). Inputs are made up, normal and as large as
the measured ones, so that a plan replays without data; each layer is fed what the layers below
give once they are done. Left out: projected LSTMs, whose state passes through a second matrix
that would have to follow, and cells of rnnguard, which make their weights or their steps in a
way of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import Weights, cell_of, recurrences, weights_of
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.probe.exponent_gradients import (
    Stretch,
    leading_exponents,
    state_size,
    stretch,
    trajectory_of,
)
from rnnguard.probe.stepping import OwnRecurrence
from rnnguard.records import Cell, Dose
from rnnguard.remedies.remedy import Remedy, number, seeded
from rnnguard.rewrite.edit import Edit

_STEPS, _EXPONENTS, _UPDATES, _RATE = 55, 8, 40, 0.1
_SEQUENCES = 4
# Updates between two looks at the held-out sequences.
_LOOK = 4
# Chaotic moments on the way would otherwise throw a tanh RNN back.
_CLIP = 0.1


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    if site is None or site.cell == "custom" or site.trained or site.remade or site.proj_size:
        return None
    measured = 1.0 if site.input_rms is None else site.input_rms
    return {
        "steps": int(number(wanted, "steps", _STEPS)),
        "exponents": int(number(wanted, "exponents", _EXPONENTS)),
        "updates": int(number(wanted, "updates", _UPDATES)),
        "rate": number(wanted, "rate", _RATE),
        "target": number(wanted, "target", 0.0),
        "input_rms": float(f"{number(wanted, 'input_rms', measured):.4g}"),
        "seed": run.seed,
    }


def gentler(dose: Dose) -> Dose:
    """Half of the updates, which end nearer to where they began."""
    return {**dose, "updates": max(1, int(number(dose, "updates", _UPDATES)) // 2)}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    cell, rms = cell_of(module), number(dose, "input_rms", 1.0)
    assert cell is not None
    flossing, generator = _flossing(cell, dose), seeded(dose)
    first = weights_of(module, 0, "forward")
    if isinstance(module, OwnRecurrence) or first.hr is not None or first.hh.is_meta:
        return
    shape = (flossing.steps, _SEQUENCES * (1 + flossing.updates), first.ih.shape[1])
    x = rms * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    outputs: list[Tensor] = []
    for layer, way in recurrences(module):
        if way == "forward" and layer:
            x, outputs = torch.cat(outputs, -1), []
        held = weights_of(module, layer, way)
        fed = x if way == "forward" else x.flip(0)
        best = flossing.best(_exact(held), fed, generator)
        for param, value in ((held.hh, best.hh), (held.bias_ih, best.bias_ih)):
            if param is not None and value is not None:
                edit.write_(param, value)
        with torch.no_grad():
            h = trajectory_of(cell, best, fed).outputs
        outputs.append(h if way == "forward" else h.flip(0))


def _flossing(cell: Cell, dose: Dose) -> _Flossing:
    return _Flossing(
        cell,
        int(number(dose, "steps", _STEPS)),
        int(number(dose, "exponents", _EXPONENTS)),
        int(number(dose, "updates", _UPDATES)),
        number(dose, "rate", _RATE),
        number(dose, "target", 0.0),
    )


@dataclass(frozen=True)
class _Flossing:
    """A dose at work on one layer in one direction, in float64 on the CPU like its draws."""

    cell: Cell
    steps: int
    exponents: int
    updates: int
    rate: float
    target: float

    def best(self, held: Weights, x: Tensor, generator: torch.Generator) -> Weights:
        """Of all weights on the way those whose exponents are nearest to the target; maybe `held`.

        x: (T, B, F), the held-out sequences and then those of each update.
        """
        held_out, *stretches = self._stretches(held, x, generator)
        with torch.no_grad():
            whole = leading_exponents(self.cell, held, held_out)
        count = int(whole.isfinite().long().cumprod(0).sum())
        if count == 0:
            return held
        held_out = held_out.leading(count)
        best, least = held, float((whole[:count] - self.target).square().mean())
        for weights in self._trained(held, [along.leading(count) for along in stretches]):
            with torch.no_grad():
                found = float(self._objective(weights, held_out))
            if found < least:
                best, least = _exact(weights), found
        return best

    def _stretches(self, held: Weights, x: Tensor, generator: torch.Generator) -> list[Stretch]:
        size = state_size(self.cell, held)
        # Engelken's transient: ten steps and a tenth of them all.
        warmup = 10 + math.ceil(self.steps / 10)
        return [
            stretch(part, size, count=self.exponents, warmup=warmup, generator=generator)
            for part in torch.split(x, _SEQUENCES, 1)
        ]

    def _trained(self, held: Weights, stretches: list[Stretch]) -> Iterator[Weights]:
        """The weights in training, every few updates and at the end."""
        weights = _trainable(held)
        leaves = [leaf for leaf in (weights.hh, weights.bias_ih) if leaf is not None]
        optimizer = torch.optim.Adam(leaves, self.rate / held.hidden_size**0.5)
        for done, along in enumerate(stretches, 1):
            self._update(weights, leaves, optimizer, along)
            if done % _LOOK == 0 or done == len(stretches):
                yield weights

    def _update(
        self, weights: Weights, leaves: list[Tensor], optimizer: torch.optim.Adam, along: Stretch
    ) -> None:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            objective = self._objective(weights, along)
            # A bias moves no exponent of a ReLU, except for those who look at finite steps.
            found = torch.autograd.grad(objective, leaves, materialize_grads=True)
        if all(bool(gradient.isfinite().all()) for gradient in found):
            for leaf, gradient in zip(leaves, found, strict=True):
                leaf.grad = gradient
            nn.utils.clip_grad_norm_(leaves, _CLIP)
            optimizer.step()

    def _objective(self, weights: Weights, along: Stretch) -> Tensor:
        found = leading_exponents(self.cell, weights, along)
        return (found - self.target).square().mean()


def _exact(weights: Weights) -> Weights:
    """A copy in float64 on the CPU, which no training moves."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to("cpu", torch.float64, copy=True)

    ih, hh = cast(weights.ih), cast(weights.hh)
    assert ih is not None and hh is not None
    return Weights(ih, hh, cast(weights.bias_ih), cast(weights.bias_hh), None)


def _trainable(held: Weights) -> Weights:
    """A copy whose recurrent matrix and bias collect gradients; of two biases one, as they add."""
    copy = _exact(held)
    bias = None if copy.bias_ih is None else copy.bias_ih.requires_grad_()
    return replace(copy, hh=copy.hh.requires_grad_(), bias_ih=bias)


GRADIENT_FLOSSING = Remedy(
    name="gradient_flossing",
    tier="values",
    summary="Recurrent weights pre-trained until the leading exponents are about zero.",
    apply=_apply,
    aim="health",
    gentler=gentler,
    prescription=_prescribe,
    doses={
        "steps": "of the made-up sequences, by default 55",
        "exponents": "how many of the leading ones, by default 8",
        "updates": "of the recurrent weights, by default 40",
        "rate": "Adam's, times the square root of the units, by default 0.1",
        "target": "what the exponents are led to, in nats per step, by default 0",
        "input_rms": "of the made-up inputs; the measured rms",
        "seed": "of the draws; the seed of the run",
    },
    refs=("Engelken 2023, Gradient flossing (arXiv 2312.17306)",),
)
