"""Whether an optimizer has moved the weights already, and what it says about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.measurements import Provenance

# Where optimizers count their steps: torch's and most others in the state of each parameter,
# some (Prodigy, D-Adaptation, apex) in the group; the last one is rnnguard's own guard.
_IN_STATE = ("step", "n_iter", "k")
_IN_GROUP = ("rnnguard_step", "step", "k")


def progress_of(own: Sequence[nn.Parameter], optimizer: Optimizer | None) -> Provenance | None:
    """Why the weights count as trained for what is done with them; None when nothing says so."""
    if any(not parameter.requires_grad for parameter in own):
        return Provenance(verdict="unsure", reason="they are frozen, as their owner wants them")
    if optimizer is None:
        return None
    held = {held for group in optimizer.param_groups for held in _ids(group["params"])}
    if not _ids(own) <= held:
        return Provenance(verdict="unsure", reason="the optimizer given does not hold all of them")
    return stepped(own, optimizer)


def stepped(own: Sequence[nn.Parameter], optimizer: Optimizer) -> Provenance | None:
    """The verdict "trained" when the optimizer has made steps with the weights, else None."""
    steps = steps_made(own, optimizer)
    if steps == 0:
        return None
    count = f"{steps} step{'s' if steps > 1 else ''}" if steps else "steps"
    return Provenance(verdict="trained", reason=f"the optimizer has made {count} with them")


def steps_made(own: Sequence[nn.Parameter], optimizer: Optimizer) -> int | None:
    """The steps that the optimizer has made with the weights; None: some, it does not say how many.

    Some optimizers make their state before any step, and plain SGD keeps none at all: of that,
    only the guard's count or a scheduler's watch over `step` tells. LBFGS keeps the state of all
    parameters with the first one, so its count holds for every weight.
    """
    ids = _ids(own)
    groups = [g for g in optimizer.param_groups if not ids.isdisjoint(_ids(g["params"]))]
    states = [optimizer.state[p] for p in own if p in optimizer.state]
    whole = [s for s in optimizer.state.values() if isinstance(s, Mapping) and "n_iter" in s]
    counts = [_number(state.get(key)) for state in (*states, *whole) for key in _IN_STATE]
    counts += [_number(group.get(key)) for group in groups for key in _IN_GROUP]
    known = [count for count in counts if count is not None]
    if known and max(known) > 0:
        return int(max(known))
    silent = [state for state in states if not any(key in state for key in _IN_STATE)]
    if any(map(_has_content, silent)) or _seen_by_scheduler(optimizer):
        return None
    return 0


def _has_content(state: object) -> bool:
    values = state.values() if isinstance(state, Mapping) else (state,)
    return any(value is not None for value in values)


def _seen_by_scheduler(optimizer: Optimizer) -> bool:
    """Whether a scheduler of torch has seen `step` run, which it notes on the optimizer."""
    return bool(getattr(optimizer, "_opt_called", False))


def _number(value: object) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain else None  # type: ignore[arg-type]


def _ids(parameters: Iterable[Tensor]) -> set[int]:
    return {id(parameter) for parameter in parameters}
