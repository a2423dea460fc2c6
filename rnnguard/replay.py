"""A saved plan applied as it stands, without a probe; all that speaks against it is told before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rnnguard.errors import Refusal, RefusedError
from rnnguard.inspection.gates import cell_of, is_plain
from rnnguard.inspection.neighbours import parts_of
from rnnguard.inspection.preflight import optimizer_refusals, rewrite_refusals, run_refusals
from rnnguard.inspection.progress import stepped
from rnnguard.inspection.provenance import provenance_of, provenance_of_written
from rnnguard.inspection.wrappers import opened
from rnnguard.measurements import Provenance
from rnnguard.nn.contract import is_ours
from rnnguard.probe.measurement import optimizer_kind
from rnnguard.records import Change, Dose, Plan, near_miss
from rnnguard.remedies import REMEDIES
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.rehearsal import Rehearsal
from rnnguard.rewrite.stepguard import refusals_for_clip

REMEDY: Mapping[str, Remedy] = {remedy.name: remedy for remedy in REMEDIES}
_ADAMS = ("adam", "adamw")
_ANEW = "Build the model that the plan was made for, then apply the plan."
# These scale what they find, so a second time is one too many, unless what they find was
# written anew by the remedy that is named.
_SCALING = {"critical_gain": "orthogonal", "written_critical_gain": ""}


def read_plan(plan: Plan | dict[str, Any] | str | Path) -> Plan:
    """The plan itself, or what its table, its JSON text or its file holds."""
    if isinstance(plan, Plan):
        return plan
    return Plan.from_json(plan) if isinstance(plan, str | Path) else Plan.from_dict(plan)


def replay(model: nn.Module, edit: Edit, plan: Plan) -> tuple[Change, ...]:
    """Applies every change of the plan; gives those that were not in place already."""
    done = []
    for change in plan:
        remedy, mark = REMEDY[change.remedy], edit.mark()
        remedy.apply(edit, target(model, remedy, change.path), change.dose)
        if edit.mark() > mark:
            done.append(change)
    if edit.made_no_difference():
        edit.rollback_()
        done = []
    result = {"outcome": "applied", "result": "replayed from a plan"}
    return tuple(change.model_copy(update=result) for change in done)


def target(model: nn.Module, remedy: Remedy, path: str | None) -> nn.Module:
    """What the remedy works on: the site's module, or the whole model."""
    return model if path is None or remedy.on_model else model.get_submodule(path)


def replay_refusals(model: nn.Module, optimizer: Optimizer, plan: Plan) -> list[Refusal]:
    """Everything that speaks against this plan on this model; nothing is touched."""
    named = [_misnamed(model, change) for change in plan]
    reasons = [reason for found in named for reason in found]
    sound = [change for change, found in zip(plan, named, strict=True) if not found]
    heavy = any(REMEDY[change.remedy].tier != "step" for change in sound)
    first = [*opened(model).hopeless, *optimizer_refusals(model, optimizer)]
    if heavy:
        first = [*run_refusals(model), *rewrite_refusals(model, optimizer, ())]
    if first:
        return [*reasons, *first]
    rehearsed = [_rehearsed(model, optimizer, change) for change in sound]
    reasons += [reason for each in rehearsed for reason in each.reasons]
    if any(each.tier == "step" for each in rehearsed):
        reasons += refusals_for_clip(optimizer)
    reasons += _trained(model, optimizer, rehearsed)
    return reasons + list(_scaled_twice(rehearsed))


@dataclass(frozen=True)
class _Rehearsed:
    """What one change would do here: whether anything at all, and what speaks against it."""

    change: Change
    tier: str
    acts: bool
    reasons: tuple[Refusal, ...]


class _ReadDose(dict[str, Any]):
    """A dose that knows which of its values were asked for."""

    def __init__(self, dose: Dose) -> None:
        super().__init__(dose)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _misnamed(model: nn.Module, change: Change) -> list[Refusal]:
    """Names in the change that this rnnguard or this model does not know."""
    place, remedy = change.path or "", REMEDY.get(change.remedy)
    if remedy is None:
        fact = f"the plan names a remedy {change.remedy!r} that does not exist;"
        return [Refusal("RG914", place, fact, near_miss(change.remedy, list(REMEDY)))]
    if remedy.tier != change.tier:
        fact = f"the plan calls {change.remedy} a {change.tier} change; it is one of {remedy.tier}."
        return [Refusal("RG914", place, fact, "Make the plan anew.")]
    if remedy.on_model:
        return list(_missing_parameters(model, change))
    paths = dict(model.named_modules(remove_duplicate=False))
    if remedy.tier == "step":
        return []
    if change.path is None or change.path not in paths:
        fact = "the plan names this path, which the model does not have."
        return [Refusal("RG915", str(change.path), fact, _ANEW)]
    module = paths[change.path]
    if cell_of(module) is None:
        fact = f"the plan's {change.remedy} is for a recurrence, not a {type(module).__name__}."
        return [Refusal("RG915", place, fact, _ANEW)]
    return []


def _missing_parameters(model: nn.Module, change: Change) -> Iterator[Refusal]:
    """The parameters that a hand-written site's change names and the model does not have."""
    for name in sorted(_named_in(change.dose) - set(dict(model.named_parameters()))):
        fact = f"the plan names the parameter {name}, which the model does not have."
        yield Refusal("RG915", change.path or "", fact, _ANEW)


def _named_in(dose: Dose) -> set[str]:
    words = f"{dose.get('entries', '')} {dose.get('gates', '')}"
    return {word.split(":")[0] for word in re.split(r"[\s+/]+", words) if word}


def _rehearsed(model: nn.Module, optimizer: Optimizer, change: Change) -> _Rehearsed:
    remedy, dose = REMEDY[change.remedy], _ReadDose(change.dose)
    rehearsal, module = Rehearsal(model, optimizer), target(model, remedy, change.path)
    try:
        remedy.apply(rehearsal, module, dose)
        reasons = [*_unread(change, dose), *_idle(change, optimizer, module, rehearsal)]
    except RefusedError as refused:
        reasons = list(refused.reasons)
    except Exception as error:
        said = f"no {error}" if isinstance(error, KeyError) else f"{error or type(error).__name__}"
        fact = f"{change.remedy} cannot be applied with the dose {change.dose}: {said}."
        reasons = [Refusal("RG915", change.path or "", fact, _ANEW)]
    return _Rehearsed(change, remedy.tier, rehearsal.changes > 0, tuple(reasons))


def _unread(change: Change, dose: _ReadDose) -> Iterator[Refusal]:
    for name in sorted(set(dose) - dose.read):
        fact = f"{change.remedy} has no dose {name!r};"
        yield Refusal("RG914", change.path or "", fact, near_miss(name, sorted(dose.read)))


def _idle(
    change: Change, optimizer: Optimizer, module: nn.Module, rehearsal: Rehearsal
) -> Iterator[Refusal]:
    """Why a change finds nothing to act on; what is in place already is no reason."""
    place = change.path or ""
    if change.remedy in ("adamw", "amsgrad") and optimizer_kind(optimizer) not in _ADAMS:
        fact = f"the plan's {change.remedy} is made for Adam, not {type(optimizer).__name__}."
        yield Refusal("RG915", "optimizer", fact, _ANEW)
    elif rehearsal.verbs or _in_place(REMEDY[change.remedy], module):
        return
    elif REMEDY[change.remedy].tier == "structure" and not is_plain(module):
        fact = f"{type(module).__name__} is a class of its own, which is not morphed."
        yield Refusal("RG910", place, fact, "Only its values are changed.")
    else:
        fact = f"the plan's {change.remedy} finds nothing here to act on."
        yield Refusal("RG915", place, fact, _ANEW)


def _in_place(remedy: Remedy, module: nn.Module) -> bool:
    """Whether the module is what the remedy makes of one."""
    here = remedy.adds is None or hasattr(module, remedy.adds)
    return remedy.tier == "structure" and is_ours(module) and here


def _trained(
    model: nn.Module, optimizer: Optimizer, rehearsed: list[_Rehearsed]
) -> Iterator[Refusal]:
    """Sites whose weights are trained or loaded, and would get other values or another class."""
    seen: set[str | None] = set()
    for each in rehearsed:
        path = each.change.path
        if each.tier == "step" or not each.acts or path in seen:
            continue
        seen.add(path)
        known = _provenance(model, optimizer, each.change)
        if not known.trained:
            continue
        fact = f"{known}."
        cure = "Apply the plan before `load_state_dict`, to a model and optimizer built anew."
        yield Refusal("RG902", path or "", fact, cure)


def _provenance(model: nn.Module, optimizer: Optimizer, change: Change) -> Provenance:
    """What is known of the weights that the change would write."""
    dose, named = change.dose, dict(model.named_parameters())
    names = _named_in(dose)
    if not names:
        module = model.get_submodule(change.path or "")
        own = list(module.parameters(recurse=False))
        return stepped(own, optimizer) or provenance_of(module)
    own = [named[name] for name in sorted(names) if name in named]
    words = re.split(r"[\s+/]+", f"{dose.get('entries', '')} {dose.get('gates', '')}")
    places = [word.rsplit(":", 3) for word in words if word]
    # An entry is name:axis:start:stop, a gate's bias name:start:stop:sign.
    spans = [
        (n, int(a), int(b), int(c)) if named[n].dim() > 1 else (n, 0, int(a), int(b))
        for n, a, b, c in places
    ]
    parts = parts_of((n for n in sorted(names) if named[n].dim() > 1), spans, named)
    return stepped(own, optimizer) or provenance_of_written(parts)


def _scaled_twice(rehearsed: list[_Rehearsed]) -> Iterator[Refusal]:
    """Gains of a plan whose guard is in place on this optimizer: it was applied before."""
    steps = [each for each in rehearsed if each.tier == "step"]
    if not steps or any(each.acts or each.reasons for each in steps):
        return
    seen: set[tuple[str, str | None]] = set()
    for each in rehearsed:
        name, path = each.change.remedy, each.change.path
        if name in _SCALING and (_SCALING[name], path) not in seen and (name, path) not in seen:
            fact = f"the plan's guard is in place already, and a second {name} would be too much."
            cure = "Apply the plan once, to a model and optimizer built anew."
            yield Refusal("RG915", path or "", fact, cure)
        seen.add((name, path))
