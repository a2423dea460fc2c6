"""What can be reached from a model is found once; what runs beside it is left out."""

from __future__ import annotations

import logging
import queue
import threading
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnguard.probe.reachable import generators, mutables


def test_each_object_is_met_once_and_cycles_end() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert list(mutables(loop, loop)) == [loop]


def test_code_and_data_sets_are_left_out() -> None:
    data = torch.utils.data.TensorDataset(torch.ones(2))
    assert list(mutables([print, int, data, "text", 3])) == [[print, int, data, "text", 3]]


def test_files_and_logs_are_left_out(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        held = [file, logging.getLogger("rnnguard.test")]
        assert list(mutables(held)) == [held]


@pytest.mark.parametrize(
    "running", [queue.Queue(), threading.Event(), threading.Condition(), threading.Thread()]
)
def test_what_runs_beside_is_left_out(running: Any) -> None:
    assert list(mutables({"a": running})) == [{"a": running}]


def test_a_loader_gives_its_generators_only() -> None:
    order, draw = torch.Generator(), torch.Generator()
    data = torch.utils.data.TensorDataset(torch.ones(4))
    sampler = torch.utils.data.RandomSampler(data, generator=order)
    loader = torch.utils.data.DataLoader(data, 2, sampler=sampler, generator=draw)
    found = generators(loader)
    assert {id(g) for g in found} == {id(order), id(draw)}
    assert list(mutables(loader)) == found
    assert generators([1, 2]) == []


def test_through_wrapped_and_partial_functions() -> None:
    inner: list[int] = []

    def add(number: int, *, known: list[int] = inner) -> None:
        known.append(number)

    @wraps(add)
    def outer(number: int) -> None:
        add(number)

    assert any(held is inner for held in mutables(partial(outer, 1)))


def test_a_variable_without_a_value() -> None:
    def told() -> int:
        return later

    assert [type(held).__name__ for held in mutables(told)] == ["cell", "dict"]
    later = 1
    assert told() == 1
