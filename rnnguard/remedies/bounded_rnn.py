"""A plain RNN whose recurrent matrix is bounded in its spectral norm at each forward.

The bound lets a gradient grow twofold at most over the memory needed, as Li et al. 2018 (arXiv
1803.04831, section 3.2) bound independent units.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from rnnguard.inspection.gates import GATES
from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.nn.bounded_rnn import BoundedRNN, bounded_parts
from rnnguard.nn.sequences.activation import ACTIVATIONS
from rnnguard.records import Dose
from rnnguard.remedies.morph import morph_with
from rnnguard.remedies.remedy import Remedy, form_of, memory_of, number_or_none
from rnnguard.rewrite.edit import Edit


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    """The module's own activation, or what the row's `by` names; a `bound` of the row's goes first.

    Raises RulesError (RG914) for an activation that does not exist.
    """
    form = form_of("bounded_rnn", wanted, "activation", [*ACTIVATIONS])
    if site is None or site.cell not in GATES or GATES[site.cell].gated:
        return None
    if "bound" in wanted:
        return {**form, "bound": wanted["bound"]}
    return {**form, **memory_of(wanted, site, least=1)}


def _apply(edit: Edit, module: nn.Module, dose: Dose) -> None:
    activation = dose.get("activation")
    memory, bound = number_or_none(dose, "memory"), number_or_none(dose, "bound")
    chosen = None if activation is None else str(activation)
    build = partial(bounded_parts, activation=chosen, memory=memory, bound=bound)
    morph_with(edit, module, {nn.RNN: BoundedRNN}, build)


BOUNDED_RNN = Remedy(
    name="bounded_rnn",
    tier="structure",
    summary="A plain RNN whose recurrent matrix is kept within a spectral norm.",
    apply=_apply,
    aim="growth",
    prescription=_prescribe,
    adds="recurrence",
    doses={
        "by": "the activation, by default the module's own",
        "activation": "the activation that `by` chose",
        "memory": "steps T over which a gradient may double at most: a bound of 2^(1/T)",
        "bound": "the largest spectral norm itself, instead of a memory",
    },
    refs=("Li et al. 2018 (arXiv 1803.04831), section 3.2", "Pascanu et al. 2013, section 2.1"),
)
