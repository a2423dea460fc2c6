"""Whose code runs when torch is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnguard.inspection.caller import caller


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.found = caller({id(self): "inner"})
        return x


def test_the_innermost_known_module_and_the_line() -> None:
    inner = Inner()
    nn.Sequential(nn.Identity(), inner)(torch.zeros(1))
    found = inner.found
    assert (found.owner, found.module) == ("inner", None)
    assert found.location is not None and found.location.startswith(f"{__file__}:")


def test_two_calls_of_one_line_are_told_apart() -> None:
    found = [(caller({}), caller({})) for _ in range(2)]
    assert len({by.location for pair in found for by in pair}) == 1
    assert found[0][0] != found[0][1]
    assert found[0] == found[1]


def test_a_recurrent_module_is_told() -> None:
    seen = []

    class Own(nn.GRU):
        def forward(self, *args: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(caller({}))
            return args[0]

    module = Own(2, 3)
    module(torch.zeros(1))
    (found,) = seen
    assert found.owner is None and found.module is module
