"""A plain RNN whose units see their own past only, each bounded for the memory needed.

Li et al. 2018 (arXiv 1803.04831): |u| <= 2^(1/T), and long from the start where only the last
output is read.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from rnnguard.inspection.gates import GATES
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.indrnn import IndependentRecurrence, IndRNN, indrnn_parts, starting_weights
from rnnguard.nn.sequences.activation import ACTIVATIONS
from rnnguard.records import Dose
from rnnguard.remedies.morph import morph_with
from rnnguard.remedies.remedy import (
    Remedy,
    drawn_by,
    form_of,
    memory_of,
    number_or_none,
    seeded,
)
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """The module's own activation, or what the row's `by` names.

    Raises RulesError (RG914) for an activation that does not exist.
    """
    form = form_of("indrnn", wanted, "activation", [*ACTIVATIONS])
    if site is None or site.cell not in GATES or GATES[site.cell].gated:
        return None
    bound: Dose = {"bound": wanted["bound"]} if "bound" in wanted else {}
    read_last = site.readout in ("last_step", "final_state")
    memory = memory_of(wanted, site, least=1)
    return {**form, **bound, **memory, "read_last": read_last, "seed": run.seed}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    activation, generator = dose.get("activation"), seeded(dose)
    build = partial(
        indrnn_parts,
        activation=None if activation is None else str(activation),
        memory=number_or_none(dose, "memory"),
        bound=number_or_none(dose, "bound"),
        read_last=bool(dose.get("read_last")),
    )
    parts = morph_with(edit, module, {nn.RNN: IndRNN}, build)
    if parts is None:
        return
    part = parts["recurrence"]
    assert isinstance(module, nn.RNNBase) and isinstance(part, IndependentRecurrence)
    with drawn_by(dose):
        fresh = starting_weights(module, part, generator)
    for name, value in fresh.items():
        edit.write_(module.get_parameter(name), value)


INDRNN = Remedy(
    name="indrnn",
    tier="structure",
    summary="A plain RNN's units made independent, with a bound on each; recurrent weights anew.",
    apply=_apply,
    aim="health",
    prescription=_prescribe,
    adds="recurrence",
    doses={
        "by": "the activation, by default the module's own",
        "activation": "the activation that `by` chose",
        "memory": "steps T over which a gradient may double at most: |u| <= 2^(1/T)",
        "bound": "the largest |u| itself, instead of a memory",
        "read_last": "whether the last output alone is read; units then start long",
        "seed": "of the draw; the seed of the run",
    },
    refs=("Li et al. 2018 (arXiv 1803.04831)",),
)
