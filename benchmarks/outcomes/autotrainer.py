"""AUTOTRAINER's repairs in their order, each one trained anew from the same weights.

A port to PyTorch by its published description. As in the original, activations and initialisers
leave the recurrent layer alone, so that the ones for hidden dense layers redraw the head only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Adamax, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau

from benchmarks.diagnosis.sequences import IGNORED
from benchmarks.outcomes.policies import Case, Prepared
from benchmarks.outcomes.recipes import head_of, put_before_head_
from benchmarks.outcomes.symptoms import Watched

EPOCH, EVERY = 20, 3
"""Steps of an epoch, and epochs between two checks (the original's default)."""
MOST = 10
DRAWN: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "SGD": (SGD, 0.01),
    "Adam": (Adam, 1e-3),
    "Nadam": (NAdam, 1e-3),
    "Adamax": (Adamax, 1e-3),
    "RMSprop": (RMSprop, 1e-3),
}
Repair = Callable[[Case, Random], Prepared]
"""A repair of a fresh copy of the case."""


def autotrainer(case: Case) -> Prepared:
    """The user's training under watch; whenever a symptom shows, the next repair is trained."""
    return Repairing(case).watched(Prepared(case.model, case.optimizer, "watched"))


class Repairing:
    """The repairs that are left, and what each of them starts from."""

    def __init__(self, case: Case) -> None:
        self._case, self._start = case, copy.deepcopy(case.model)
        self._drawn = Random(f"{case.seed} {case.task.name} {case.name}")
        self._left: Iterator[tuple[str, Repair]] | None = None

    def watched(self, prepared: Prepared) -> Prepared:
        """The same training, given up for the next repair when a check finds a symptom."""
        shown, shares, epochs = Watched(), list[float](), self._case.task.budget // EPOCH

        def watch(steps: int, loss: Tensor, output: Tensor, target: Tensor) -> Prepared | None:
            if prepared.watch is not None:
                prepared.watch(steps, loss, output, target)
            shares.append(share_right(output, target, loss, self._case))
            if steps % EPOCH:
                return None
            shown.accuracies.append(fmean(shares))
            shares.clear()
            if steps % (EPOCH * EVERY):
                return None
            shown.look(prepared.model, loss)
            symptom = shown.symptom(epochs, EVERY)
            return self._repaired(symptom, prepared.done) if symptom else None

        return replace(prepared, watch=watch)

    def _repaired(self, symptom: str, done: str) -> Prepared | None:
        if self._left is None:
            self._left = iter(REPAIRS[symptom][:MOST])
        name, repair = next(self._left, ("", None))
        if repair is None:
            return None
        model = copy.deepcopy(self._start)
        optimizer = self._case.task.optimizer_of(model)
        prepared = repair(replace(self._case, model=model, optimizer=optimizer), self._drawn)
        return self.watched(replace(prepared, done=f"{done}; {symptom}: {name}"))


def share_right(output: Tensor, target: Tensor, loss: Tensor, case: Case) -> float:
    """The accuracy; for values, the share of a constant answer's error that is gone."""
    if case.task.metric == "error":
        return max(1 - float(loss) / -case.task.chance, 0.0)
    asked = target != IGNORED
    return float((output.detach().argmax(-1) == target)[asked].float().mean())


def _redrawn(draw: Callable[[Tensor], object]) -> Repair:
    def repair(case: Case, drawn: Random) -> Prepared:
        with torch.no_grad():
            draw(head_of(case.model).weight)
        return Prepared(case.model, case.optimizer)

    return repair


def lecun_uniform_(weight: Tensor) -> None:
    """U(-a, a) with a = sqrt(3 / inputs)."""
    bound = (3 / weight.shape[1]) ** 0.5
    nn.init.uniform_(weight, -bound, bound)


def _random_start(case: Case, drawn: Random) -> Prepared:
    draws = (
        nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_,
        nn.init.xavier_normal_, lecun_uniform_,
    )  # fmt: skip
    return _redrawn(drawn.choice(draws))(case, drawn)


class StepNorm(nn.BatchNorm1d):
    """Batch normalisation of (B, H) or, over all steps, of (B, T, H)."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = super().forward(input.flatten(0, -2)).view_as(input)
        return out


def _normalised(case: Case, drawn: Random) -> Prepared:
    put_before_head_(case, StepNorm(head_of(case.model).in_features))
    return Prepared(case.model, case.optimizer)


def _clipped(case: Case, drawn: Random) -> Prepared:
    most = drawn.uniform(9, 10)
    parameters = list(case.model.parameters())
    return Prepared(
        case.model, case.optimizer,
        before_update=lambda: nn.utils.clip_grad_value_(parameters, most),
    )  # fmt: skip


def _trained_by(kind: Callable[..., Optimizer], rate: float, **options: float) -> Repair:
    def repair(case: Case, drawn: Random) -> Prepared:
        return Prepared(case.model, kind(case.model.parameters(), lr=rate, **options))

    return repair


def _other_optimizer(case: Case, drawn: Random) -> Prepared:
    kind, rate = DRAWN[drawn.choice(list(DRAWN))]
    return _trained_by(kind, rate)(case, drawn)


def _momentum(case: Case, drawn: Random) -> Prepared:
    return _trained_by(SGD, 0.01, momentum=drawn.uniform(0.01, 0.9))(case, drawn)


def _rate(factor: float) -> Repair:
    def repair(case: Case, drawn: Random) -> Prepared:
        first = 0.01 if case.task.optimizer == "sgd" else 1e-3
        for group in case.optimizer.param_groups:
            group["lr"] = first * factor
        return Prepared(case.model, case.optimizer)

    return repair


def _lowered_on_plateau(case: Case, drawn: Random) -> Prepared:
    schedule = ReduceLROnPlateau(case.optimizer, factor=0.2, patience=5, min_lr=1e-3)
    sums = [0.0]

    def watch(steps: int, loss: Tensor, output: Tensor, target: Tensor) -> None:
        sums[0] += float(loss)
        if steps % EPOCH == 0:
            schedule.step(sums[0] / EPOCH)
            sums[0] = 0.0

    return Prepared(case.model, case.optimizer, watch=watch)


_SELU = ("SELU", _redrawn(lecun_uniform_))
_RELU = ("ReLU", _redrawn(nn.init.kaiming_uniform_))
_TANH = ("tanh", _redrawn(nn.init.kaiming_uniform_))
_NORM = ("batch norm", _normalised)
_RANDOM = ("random start", _random_start)
_CLIP = ("clip values", _clipped)
REPAIRS: dict[str, tuple[tuple[str, Repair], ...]] = {
    "vanish": (_SELU, _RELU, _NORM),
    "explode": (_SELU, _RELU, _CLIP, _CLIP, _TANH, _NORM),
    "dying": (_SELU, _NORM, *[_RANDOM] * 3),
    "unstable": (
        ("Adam", _trained_by(Adam, 1e-3)),
        *[(f"rate x0.1^{j}", _rate(0.1**j)) for j in (1, 2, 3)],
        ("rate on plateau", _lowered_on_plateau),
        *[("momentum", _momentum)] * 3,
        *[_RANDOM] * 2,
    ),
    "not converging": (
        *[("other optimizer", _other_optimizer)] * 3,
        *[(f"rate x10^{j}", _rate(10.0**j)) for j in (1, 2, 3)],
        *[_RANDOM] * 3,
    ),
}
"""By symptom, in the original's "balance" order.

Its larger batches are left out, since every policy sees the same ones, and so is its input noise.
"""
