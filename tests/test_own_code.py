"""The user's classes and functions, and what they call."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

import rnnguard.nn
from rnnguard.inspection.own_code import (
    called_by_forward,
    is_users,
    methods_of,
    names_in,
    own_functions,
    variables_of,
)

CARRIED = object()


class Base(nn.Module):
    def helper(self) -> Any:
        return self._inner()

    def _inner(self) -> Any:
        return [self.deep for _ in range(3)]

    def other(self) -> None: ...


class Model(Base):
    def forward(self, x: Any) -> Any:
        return self.helper()

    @property
    def state(self) -> Any: ...

    @state.setter
    def state(self, value: Any) -> None:
        self.kept = value

    @staticmethod
    def free() -> None: ...


def test_methods_with_those_of_bases_but_not_torchs() -> None:
    found = methods_of(Model)
    assert set(found) == {"helper", "_inner", "other", "forward", "state", "free"}
    assert len(found["state"]) == 2


def test_what_forward_calls() -> None:
    found = methods_of(Model)
    assert called_by_forward(found) & set(found) == {"forward", "helper", "_inner"}


def test_names_of_inner_functions_count() -> None:
    assert "deep" in set(names_in(Base._inner.__code__))


def test_whose_a_class_is() -> None:
    names: dict[str, Any] = {}
    exec("class Own: ...", names)
    assert is_users(Model) and is_users(names["Own"])
    assert not is_users(nn.Linear) and not is_users(object)


def test_own_functions_are_neither_torchs_nor_ours() -> None:
    model = nn.Sequential(nn.LSTM(5, 16), rnnguard.nn.LayerNormLSTM(16, 8))
    assert own_functions(model, nn.MSELoss(), nn.functional.relu, None, torch.relu) == []


def test_own_functions_of_callables() -> None:
    class Step:
        def __call__(self, batch: Any) -> Any:
            return self.inner(batch)

        def inner(self, batch: Any) -> Any:
            return batch

    names = {f.__name__ for f in own_functions(Step())}
    assert names == {"__call__", "inner"}
    assert {f.__name__ for f in own_functions(partial(Step().inner, 1))} == {"inner"}


def test_variables_that_a_function_may_read() -> None:
    kept: list[float] = [1.0]

    def step(batch: Any) -> Any:
        if batch is None:
            return unbound
        return kept, CARRIED

    assert [value for value in variables_of(own_functions(step)) if value in (kept, CARRIED)] == [
        CARRIED,
        kept,
    ]
    unbound = None
