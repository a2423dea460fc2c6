"""Where the samples of a batch lie, and when nothing tells it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import only_site
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from rnnguard.inspection.batches import Batch
from rnnguard.probe.batch_axis import (
    Samples,
    batch_size_of,
    own_axis,
    rows_of,
    samples_of,
    shortened,
)

B, T, F = 6, 11, 5
BATCH_FIRST, TIME_FIRST, SINGLE = torch.zeros(B, T, F), torch.zeros(T, B, F), torch.zeros(T, 1, F)
LABELS = torch.zeros(B, dtype=torch.long)


def batch(x: Any, target: Any = None) -> Batch:
    return Batch((x,), {}, target, (x, target))


def found(
    x: Tensor, target: Any = None, output: Any = (), size: int | None = None, n: int = B
) -> Any:
    site = only_site(nn.GRU(F, 4), torch.zeros(T, n, F)).record
    samples = samples_of(batch(x, target), output, [site], size)
    return None if samples is None else (samples.axis, samples.firm)


@pytest.mark.parametrize("axis", [0, 1])
def test_each_source_tells_the_axis(axis: int) -> None:
    x = (BATCH_FIRST, TIME_FIRST)[axis]
    assert found(x, size=B) == (axis, True)
    assert found(x, LABELS) == (axis, True)
    assert found(x, torch.zeros(B, 3)) == (axis, True)
    assert found(x, output=(torch.zeros(B, 3),)) == (axis, False)


@pytest.mark.parametrize(
    ("x", "target", "size"),
    [
        (BATCH_FIRST, None, None),
        (BATCH_FIRST, torch.zeros(B * T), None),  # a flat target of every step
        (TIME_FIRST, torch.zeros(T, B), None),  # a figure for every step of every sample
        (TIME_FIRST, torch.zeros(T, 3, 2), None),
        (BATCH_FIRST, torch.zeros(B, 3, dtype=torch.long), None),
        (torch.zeros(B, B, F), LABELS, B),
        (BATCH_FIRST, None, 32),
        (torch.zeros(B), LABELS, B),
    ],
)
def test_without_a_sign_nothing_is_said(x: Tensor, target: Any, size: int | None) -> None:
    assert found(x, target, size=size) is None


def test_a_single_sequence_may_have_a_target_for_each_step() -> None:
    steps = torch.zeros(T, dtype=torch.long)
    assert found(torch.zeros(T, F), steps, n=1) is None
    assert found(SINGLE, steps, torch.zeros(T, 3), n=1) is None
    assert found(torch.zeros(T, F), size=T, n=1) == (0, True)


def test_the_batch_size_of_a_loader() -> None:
    data = TensorDataset(BATCH_FIRST)
    sampler = BatchSampler(SequentialSampler(data), 4, drop_last=False)
    assert batch_size_of(DataLoader(data, batch_size=3)) == 3
    assert batch_size_of(DataLoader(data, batch_sampler=sampler)) == 4
    assert batch_size_of(DataLoader(data, batch_size=None)) is None
    assert batch_size_of([BATCH_FIRST]) is None and batch_size_of(None) is None


def test_the_rows_of_a_sample() -> None:
    samples, numbers = Samples(0, B, T), torch.arange(float(B * T))
    (row,) = rows_of(numbers.view(T, B), samples)
    assert row(2).tolist() == numbers.view(T, B)[:, 2].tolist()
    first, second = rows_of(numbers, samples)
    assert first(1).tolist() == numbers.view(B, T)[1].tolist()
    assert second(1).tolist() == numbers.view(T, B)[:, 1].tolist()
    assert rows_of(torch.zeros(B, B), samples) == []
    assert rows_of(torch.zeros(5, 7), samples) == []


def test_the_axis_of_another_input() -> None:
    given, samples = batch(BATCH_FIRST), Samples(0, B, T)
    assert own_axis(torch.zeros(B, T, F), given, samples) == 0
    assert own_axis(torch.zeros(2, B, 4), given, samples) == 1
    assert own_axis(torch.zeros(B, B), given, samples) is None
    assert own_axis(torch.zeros(T, F), given, samples) is None


def test_the_first_steps_of_all_that_has_steps() -> None:
    x, lengths = torch.randn(6, 90, 5), torch.tensor([90, 80, 70, 30, 20, 10])
    mask, context = torch.ones(6, 90), torch.randn(6, 4)
    given = Batch((x, lengths), {"mask": mask, "context": context}, None, None)
    short = shortened(given, Samples(0, 6, 90))
    assert short is not None
    assert torch.equal(short.args[0], x[:, :24]) and short.args[1].tolist() == [24] * 4 + [20, 10]
    assert short.kwargs["mask"].shape == (6, 24) and short.kwargs["context"] is context
    assert shortened(given, Samples(0, 24, 90)) is None  # both axes would be as long
    assert shortened(given, Samples(0, 6, 40)) is None
