"""What every remedy is: a name, a tier, a dose from readings, and one application of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rnnguard.decision.verification import Aim
from rnnguard.errors import RulesError
from rnnguard.inspection.gates import (
    GATES,
    Gates,
    Weights,
    cell_of,
    parameter_name,
    recurrences,
    weights_of,
)
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.indrnn import IndependentRecurrence
from rnnguard.nn.layer_norm_cells import GateNorm
from rnnguard.nn.recurrent_weights import RecurrentWeights, recurrent_parameters
from rnnguard.records import Direction, Dose, Tier, near_miss
from rnnguard.rewrite.edit import Edit

Prescribe = Callable[[Dose, SiteReadings | None, RunReadings], Dose | None]
Apply = Callable[[Edit, nn.Module, Dose], None]


@dataclass(frozen=True)
class Remedy:
    """One cure. `aim` names the reading that must improve; None when no probe can tell, and it
    may then only not harm.

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
    """The child that it gives the site's module; the first of several."""
    on_request: bool = False
    """Whether no row of rnnguard's own applies it: nothing that a probe reads calls for it."""
    doses: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What each word of a dose means, of a row's and of the final one."""
    refs: tuple[str, ...] = ()

    def prescribe(self, wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
        return wanted if self.prescription is None else self.prescription(wanted, site, run)


# --- doses -------------------------------------------------------------------------------


def with_seed(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose:
    """The dose together with the run's seed."""
    return {**wanted, "seed": run.seed}


def memory_of(wanted: Dose, site: SiteReadings, *, least: int) -> dict[str, int]:
    """The `memory` of a dose: the steps that the row names, else those that the site needs.

    Empty where neither is known, or is below `least`.
    """
    steps = wanted.get("memory", site.memory_needed)
    return {"memory": int(steps)} if steps is not None and int(steps) >= least else {}


def form_of(remedy: str, wanted: Dose, key: str, forms: Sequence[str]) -> dict[str, str]:
    """The `key` of a dose: the form that the row's `by` names; empty where it names none.

    Raises RulesError (RG914) for a form that does not exist.
    """
    form = wanted.get("by") or wanted.get(key)
    if form is None:
        return {}
    if form not in forms:
        fact = f"the dose of {remedy} asks for the form {form!r};"
        raise RulesError.of("RG914", "", fact, near_miss(str(form), list(forms)))
    return {key: str(form)}


def number(dose: Dose, name: str, otherwise: float) -> float:
    """One number of a dose, which may be 0."""
    value = dose.get(name)
    return otherwise if value is None else float(value)


def number_or_none(dose: Dose, name: str) -> float | None:
    value = dose.get(name)
    return None if value is None else float(value)


# --- draws -------------------------------------------------------------------------------


def seeded(dose: Dose) -> torch.Generator:
    """The generator of the dose's own seed, so that a replayed plan writes the same values."""
    return torch.Generator().manual_seed(int(dose.get("seed") or 0))


@contextmanager
def drawn_by(dose: Dose) -> Iterator[None]:
    """Inside, what a module draws when it is built comes from the dose's own seed.

    Afterwards torch's random state is as before. Draws are the CPU's, wherever the module goes.
    """
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        # Not torch.manual_seed, which would set the state of every accelerator as well.
        torch.default_generator.manual_seed(int(dose.get("seed") or 0))
        yield


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """One uniform draw from each of `count` equal parts of 0..1: few units miss no time scale."""
    return (
        torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
    ) / count


# --- values ------------------------------------------------------------------------------


def each_weights(module: nn.Module) -> Iterator[Weights]:
    """The weights of every layer and direction."""
    for layer, direction in recurrences(module):
        yield weights_of(module, layer, direction)


def write_recurrent_(edit: Edit, module: nn.Module, fresh: Callable[[Weights], Tensor]) -> None:
    """Writes the recurrent weights of every layer and direction.

    A child that makes others of them follows, so that these are what the recurrence uses: the
    gains of a weight norm would otherwise undo their scale.
    """
    mark = edit.mark()
    for weights in each_weights(module):
        edit.write_(weights.hh, fresh(weights))
    child = getattr(module, "recurrent", None)
    if edit.mark() > mark and isinstance(child, RecurrentWeights):
        assert isinstance(module, nn.RNNBase)
        for name, value in child.completed(recurrent_parameters(module)).items():
            edit.write_(child.get_parameter(name), value)


def scaled_units(weight: Tensor, part: IndependentRecurrence, factor: float) -> Tensor:
    """An IndRNN's recurrent weights with what is used of them, the bounded diagonal, scaled."""
    units = weight.diagonal().clamp(-part.bound, part.bound) * factor
    return weight.diagonal_scatter(units.clamp(-part.bound, part.bound))


def write_keep_bias_(
    edit: Edit, module: nn.Module, layer: int, direction: Direction, keep: Tensor
) -> None:
    """Writes the keep gate's bias (H,) and, tied to it, that of an LSTM's input gate; 0 elsewhere.

    The two biases add, so the whole dose goes into bias_ih (pytorch #750). Inside a normalised
    sum they would be rescaled; it then goes into the norm's shift, whose other rows stay.
    """
    cell = cell_of(module)
    if cell is None or GATES[cell].keep is None:
        return
    gates, weights = GATES[cell], weights_of(module, layer, direction)
    norm = getattr(module, parameter_name(module, "norm", layer, direction), None)
    if isinstance(norm, GateNorm) and norm.active:
        edit.write_(norm.shift, with_keep(norm.shift.detach(), gates, keep))
    elif weights.bias_ih is not None and weights.bias_hh is not None:
        silent = torch.zeros_like(weights.bias_ih)
        edit.write_(weights.bias_ih, with_keep(silent, gates, keep))
        edit.write_(weights.bias_hh, torch.zeros_like(weights.bias_hh))


def with_keep(bias: Tensor, gates: Gates, keep: Tensor) -> Tensor:
    """The bias with these values for the keep gate, and tied to it for the write gate."""
    fresh = bias.double().clone()
    for gate, value in ((gates.keep, keep), (gates.write, 0 - keep)):
        if gate is not None:
            fresh[gates.block(gate, len(keep))] = value.to(fresh)
    return fresh
