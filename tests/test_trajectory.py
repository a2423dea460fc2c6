"""Trajectories on a device of one's own, and fewer sequences where memory runs out."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from rnnguard import RefusedError
from rnnguard.inspection.sites import SiteInput
from rnnguard.probe.trajectory import MemoryWarning, trajectories, within_memory


def hungry(fits: int, error: Exception, asked: list[int]) -> int:
    """A measurement that notes how many sequences it was asked for, and fits `fits`."""

    def measure(sequences: int) -> int:
        asked.append(sequences)
        if sequences > fits:
            raise error
        return 10 * sequences

    return within_memory(measure, 8)[0]


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
# The words of torch's allocator on the CPU.
OUT_ON_CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("error", [OUT, OUT_ON_CPU])
@pytest.mark.parametrize(("fits", "expected"), [(7, [8, 4]), (3, [8, 4, 2]), (1, [8, 4, 2, 1])])
def test_memory_halves_the_sequences(error: Exception, fits: int, expected: list[int]) -> None:
    asked: list[int] = []
    with pytest.warns(MemoryWarning, match=f"{expected[-1]} of 8 sequences"):
        assert hungry(fits, error, asked) == 10 * expected[-1]
    assert asked == expected


def test_what_fits_is_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert within_memory(lambda sequences: sequences, 8) == (8, "")


def test_not_even_one_sequence() -> None:
    with pytest.raises(RefusedError, match="single sequence") as refusal:
        hungry(0, OUT, [])
    assert refusal.value.code == "RG912"


def test_other_errors_pass() -> None:
    asked: list[int] = []
    with pytest.raises(RuntimeError, match="shapes"):
        hungry(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), asked)
    assert asked == [8]


def test_what_failed_holds_no_memory_while_the_next_try_runs() -> None:
    alive: list[int] = []

    class Block:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def measure(sequences: int) -> int:
        held = [Block()]
        if sequences > 2:
            raise torch.OutOfMemoryError("out of memory")
        return len(alive) * len(held)

    with pytest.warns(MemoryWarning):
        assert within_memory(measure, 8)[0] == 1


def given(dtype: torch.dtype) -> SiteInput:
    x = torch.randn(5, 3, 2, dtype=dtype)
    return SiteInput(x, torch.tensor([5, 4, 2]), torch.zeros(1, 3, 4, dtype=dtype), None)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32),
     (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)  # fmt: skip
def test_half_precision_is_measured_in_single(dtype: torch.dtype, expected: torch.dtype) -> None:
    (run,) = trajectories(nn.GRU(2, 4, dtype=dtype), given(dtype), sequences=3, longest=5)
    assert run.trajectory.outputs.dtype == expected


def test_weights_and_inputs_go_to_the_device_and_the_module_stays() -> None:
    """The meta device stands for any other one: what reaches it has no values left."""
    module = nn.GRU(2, 4)
    with pytest.raises(RuntimeError, match="meta"):
        trajectories(module, given(torch.float32), sequences=3, longest=5,
                     device=torch.device("meta"))  # fmt: skip
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    (run,) = trajectories(module, given(torch.float32), sequences=2, longest=9,
                          device=torch.device("cpu"))  # fmt: skip
    assert run.trajectory.lengths.tolist() == [5, 4]
