"""Faithful small forms of the wrappers that other libraries put around models and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import rnnguard.ranks


class Net(nn.Module):
    """An LSTM whose last step a head reads."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


class Accelerated(Optimizer):
    """As Accelerate's: an Optimizer by class, without hooks, that forwards what it holds."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Lightning:
    """As Lightning's: takes the class of what it wraps, and forwards unknown attributes."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("LightningSGD", (Lightning, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


class Private(Optimizer):
    """As Opacus': holds the real one under a name of its own and never was initialised."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.original_optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.original_optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.original_optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.original_optimizer.zero_grad(set_to_none)


class Lookahead(Optimizer):
    """Lookahead (Zhang et al. 2019): every few steps of the fast weights, halfway after them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class SharpnessAware(Optimizer):
    """SAM (Foret et al. 2021): climbs, looks again, and steps from where it was."""

    def __init__(self, params: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = SGD(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in held])
        moved = [(p, p.grad * (self.param_groups[0]["rho"] / norm)) for p in held]
        for p, way in moved:
            p.add_(way)
        with torch.enable_grad():
            loss = closure()
        for p, way in moved:
            p.sub_(way)
        self.base_optimizer.step()
        return loss


def one_after_the_other(monkeypatch: pytest.MonkeyPatch, *works: Callable[[], Any]) -> list[Any]:
    """Runs the works as if they were processes 0, 1, ... that train together.

    Process 0 runs first, and what it says is what the others hear; so no other may fail.
    """
    said: list[Any] = []
    results = []
    for number, work in enumerate(works):
        heard = iter(list(said))

        def exchange(failure: Any, word: Any, number: int = number, heard: Any = heard) -> Any:
            own = (failure, word)
            if number == 0:
                said.append(own)
                return [own, *[(None, None)] * (len(works) - 1)]
            others = [(None, None)] * len(works)
            return [next(heard), *others[1:number], own, *others[number + 1 :]]

        monkeypatch.setattr(rnnguard.ranks, "size", lambda: len(works))
        monkeypatch.setattr(torch.distributed, "get_rank", lambda number=number: number)
        monkeypatch.setattr(rnnguard.ranks, "_exchange", exchange)
        results.append(work())
    return results
