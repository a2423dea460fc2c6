"""Trainable parameters that no gradient reaches."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from rnnguard.inspection.optimized import missing_parameters
from rnnguard.inspection.own_code import called_by_forward, methods_of, names_in
from rnnguard.inspection.pathways import made_from
from rnnguard.probe.gradients import Gradients, parameter_gradients
from rnnguard.probe.snapshot import moved, untouched
from rnnguard.probe.stillness import reseed
from rnnguard.probe.subject import Subject

PASSES = 3
NUDGE = 0.01  # of a parameter's rms
NAMED = 3  # names in a sentence
_SETS_UP = re.compile("init|reset")


def idle_parameters(
    subject: Subject, gradients: Gradients, explained: Collection[str] = ()
) -> tuple[str, ...]:
    """The trainable parameters that no batch gives a gradient; in `untouched`.

    `gradients` are those measured on some batches already; a few more passes, on weights moved
    a little, tell what only seems idle, as behind a matrix that starts at zero. `explained` are
    names that another finding is about; what an optimizer does not hold is left out on purpose.
    A gradient that is there but exactly zero counts only where all of a module's parameters have
    none. Without a loss, what a method that `forward` does not call makes use of is left out.
    """
    if subject.batches.basis in ("site alone", "not run") or not gradients.by_parameter:
        return ()
    trainable = dict(_trainable(subject.model))
    cut_off = {name for name in trainable if name not in gradients.by_parameter}
    still = {name for name in trainable if gradients.by_parameter.get(name) == 0}
    alone = _without_neighbours(still | cut_off, trainable)
    # A bias beside a weight that learns may have no meaning, as that of an energy, and no harm.
    suspects = alone | {name for name in cut_off if "bias" not in name.rpartition(".")[2]}
    suspects -= set(explained) | _left_to_others(subject)
    if not subject.batches.has_loss:
        suspects = {name for name in suspects if not _is_used_elsewhere(subject.model, name)}
    suspects = _still_idle(subject, suspects) if suspects else suspects
    return tuple(name for name in trainable if name in suspects)


def in_words(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listed = [f"`{name}`" for name in names]
    if len(listed) > NAMED + 1:
        return f"{', '.join(listed[:NAMED])} and {len(listed) - NAMED} more"
    return " and ".join(filter(None, (", ".join(listed[:-1]), *listed[-1:])))


def feeding(graph: fx.Graph, calls: Collection[fx.Node]) -> set[str]:
    """The parameters that the calls are computed from, those of what stands before included."""
    ends = set(calls)
    weights = [node for node in graph.nodes if node.meta.get("name") == "parameter"]
    return {str(node.target) for node in weights if not made_from(node).isdisjoint(ends)}


def _trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, UninitializedParameter):
            yield name, parameter


def _left_to_others(subject: Subject) -> set[str]:
    """The parameters that the optimizer is not to train, where there is one."""
    optimizer = subject.optimizer
    return set() if optimizer is None else set(missing_parameters(subject.model, optimizer))


def _without_neighbours(suspects: set[str], trainable: Iterable[str]) -> set[str]:
    """The suspects of modules that have no parameter with a gradient."""
    alive = {_owner(name) for name in trainable if name not in suspects}
    return {name for name in suspects if _owner(name) not in alive}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _still_idle(subject: Subject, suspects: set[str]) -> set[str]:
    """Those of the suspects that a few more passes give no gradient either."""
    model, batches = subject.model, subject.batches
    # Behind a matrix that starts at zero a parameter only seems idle.
    parameters = [parameter for _, parameter in _trainable(model)]
    reseed(subject.seed)
    with untouched(model, optimizer=subject.optimizer), moved(parameters, NUDGE):
        for turn in range(min(PASSES, 1 + len(batches.batches))):
            batch = batches.fresh(batches.batches[turn % len(batches.batches)])
            scalar = batches.scalar(batches.forward(model, batch), batch, subject.seed)
            if scalar is None or not scalar.requires_grad:
                return set()
            found = parameter_gradients(model, scalar)
            suspects -= {name for name, gradient in found.items() if _is_alive(gradient)}
    return suspects


def _is_alive(gradient: Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool((values != 0).any())


def _is_used_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether a method that `forward` does not call uses the parameter or what holds it."""
    holder: object = model
    for part in name.split("."):
        if part in _elsewhere(type(holder)):
            return True
        holder = getattr(holder, part, None)
    return False


def _elsewhere(cls: type) -> set[str]:
    """The names that a user's class uses in methods besides `forward` and what that calls."""
    methods = methods_of(cls)
    called = called_by_forward(methods)
    rest = [code for name, codes in methods.items() for code in codes
            if name not in called and not _SETS_UP.search(name)]  # fmt: skip
    return {name for code in rest for name in names_in(code)}
