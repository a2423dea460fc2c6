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
    path, recurrent, location = inner.found
    assert (path, recurrent) == ("inner", None)
    assert location is not None and location.startswith(f"{__file__}:")


def test_a_recurrent_module_is_told() -> None:
    seen = []

    class Own(nn.GRU):
        def forward(self, *args: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(caller({}))
            return args[0]

    module = Own(2, 3)
    module(torch.zeros(1))
    ((path, recurrent, _),) = seen
    assert path is None and recurrent is module
