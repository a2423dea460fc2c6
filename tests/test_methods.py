"""The methods of a user's class."""

from __future__ import annotations

from typing import Any

from torch import nn

from rnnguard.inspection.methods import called_by_forward, is_users, methods_of, names_in


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
