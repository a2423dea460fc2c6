"""What every remedy is: a name, a tier, a dose from readings, and one application of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnnguard.decision.verification import Aim
from rnnguard.inspection.gates import GATES, Weights, cell_of, recurrences, weights_of
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose, Tier
from rnnguard.rewrite.edit import Edit

Prescribe = Callable[[Dose, SiteReadings | None, RunReadings], Dose | None]
Apply = Callable[[Edit, nn.Module, Dose], None]


@dataclass(frozen=True)
class Remedy:
    """One cure. `aim` names the reading that must improve; None when no probe can tell.

    `prescribe` gives the final dose, or None when the readings show nothing left to do;
    `apply` works on the site's module, or on the whole model for remedies of the run and, with
    `on_model`, for those of hand-written sites, whose dose names the parameters. `gentler`
    gives a smaller dose than one that was taken back.
    """

    name: str
    tier: Tier
    summary: str
    apply: Apply
    aim: Aim | None = None
    on_model: bool = False
    gentler: Callable[[Dose], Dose] | None = None
    prescription: Prescribe | None = None
    adds: str | None = None
    """The child that it gives the site's module."""

    def prescribe(self, wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
        return wanted if self.prescription is None else self.prescription(wanted, site, run)


def each_weights(module: nn.Module) -> Iterator[Weights]:
    """The weights of every layer and direction."""
    for layer, direction in recurrences(module):
        yield weights_of(module, layer, direction)


def seeded(dose: Dose) -> torch.Generator:
    """The generator of the dose's own seed, so that a replayed plan writes the same values."""
    return torch.Generator().manual_seed(int(dose.get("seed") or 0))


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """One uniform draw from each of `count` equal parts of 0..1: few units miss no time scale."""
    return (
        torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
    ) / count


def with_seed(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose:
    """The dose together with the run's seed."""
    return {**wanted, "seed": run.seed}


def write_keep_bias_(edit: Edit, module: nn.Module, weights: Weights, keep: Tensor) -> None:
    """Writes the keep gate's bias (H,) and, tied to it, that of an LSTM's input gate; 0 elsewhere.

    The two biases add, so the whole dose goes into bias_ih (pytorch #750).
    """
    cell = cell_of(module)
    if cell is None or GATES[cell].keep is None:
        return
    if weights.bias_ih is None or weights.bias_hh is None:
        return
    gates, hidden = GATES[cell], weights.hidden_size
    bias = torch.zeros(len(gates.blocks) * hidden, dtype=torch.float64)
    for gate, value in ((gates.keep, keep), (gates.write, -keep)):
        if gate is not None:
            bias[gates.block(gate, hidden)] = value
    edit.write_(weights.bias_ih, bias)
    edit.write_(weights.bias_hh, torch.zeros_like(weights.bias_hh))
