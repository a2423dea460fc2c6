"""Keep bias of a hand-written cell, spread over the time scales that the task needs.

Tallec and Ollivier, ICLR 2018, eq. 16, with each gate's place and sign as the cell's own
graph shows them: users order gates as they like, and some keep with one minus a sigmoid.
"""

from __future__ import annotations

from torch import Tensor, nn

from rnnguard.measurements import RunReadings, SiteReadings
from rnnguard.records import Dose
from rnnguard.remedies.remedy import Remedy, seeded, stratified
from rnnguard.rewrite.edit import Edit

Place = tuple[str, int, int, int]


def _prescribe(wanted: Dose, site: SiteReadings | None, run: RunReadings) -> Dose | None:
    t_max = wanted.get("t_max")
    if site is None or not site.gates or t_max is None or float(t_max) < 3:
        return None
    return {"t_max": int(t_max), "gates": " ".join(site.gates), "seed": run.seed}


def _apply(edit: Edit, model: nn.Module, dose: Dose) -> None:
    named, generator = dict(model.named_parameters()), seeded(dose)
    t_max = float(dose["t_max"] or 0)
    fresh: dict[str, Tensor] = {}
    for gate in str(dose["gates"]).split():
        keep, write = map(_places, gate.split("/"))
        _, start, stop, _ = keep[0]
        bias = (1 + (t_max - 2) * stratified(stop - start, generator)).log()
        for places, value in ((keep, bias), (write, -bias)):
            _set(places, value, named, fresh)
    for name, values in fresh.items():
        edit.write_(named[name], values)


def _set(
    places: list[Place], value: Tensor, named: dict[str, nn.Parameter], fresh: dict[str, Tensor]
) -> None:
    """The value in the first of the biases that are added up, nothing in the others."""
    for position, (name, start, stop, sign) in enumerate(places):
        values = fresh.setdefault(name, named[name].detach().double().clone())
        if stop - start == len(value):
            values[start:stop] = 0.0 if position else sign * value.to(values)


def _places(text: str) -> list[Place]:
    words = (word.rsplit(":", 3) for word in text.split("+") if word)
    return [(name, int(start), int(stop), int(sign)) for name, start, stop, sign in words]


WRITTEN_CHRONO_BIAS = Remedy(
    name="written_chrono_bias",
    tier="values",
    summary="Keep bias of a hand-written cell ~ log U(1, T - 1); the write gate's bias is tied.",
    apply=_apply,
    aim="health",
    on_model=True,
    prescription=_prescribe,
    doses={
        "t_max": "longest time scale in steps, from 3 on",
        "gates": "where the gates' biases stand; as the graph shows them",
        "seed": "of the draw; the seed of the run",
    },
    refs=("Tallec and Ollivier 2018, eq. 16 (arXiv 1804.11188)",),
)
