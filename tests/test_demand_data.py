"""What counts as data, and what is said of everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from rnnguard.errors import RefusedError
from rnnguard.probe.demand_data import COLUMNS, IGNORED, MOST, parts_of, sequences_of

X = torch.randn(6, 5, 2)
CLASSES = torch.tensor([0, 1, 2, 0, 1, 0])
REALS = torch.randn(6)
LENGTHS = torch.tensor([5, 3, 5, 1, 2, 4])
IDS = torch.tensor([[0, 1, 2], [0, 0, 1]])


def sequences(data: Any, batch_first: bool = True) -> Any:
    found = sequences_of(parts_of(data, batch_first))
    assert found is not None
    return found


def test_a_target_per_sequence_stands_at_its_last_step() -> None:
    found = sequences(((X, LENGTHS), REALS))
    assert found.rows.tolist() == list(range(6))
    assert (found.times + 1).tolist() == LENGTHS.tolist()
    assert (found.classes, found.per_step, found.longest) == (0, False, 5)
    np.testing.assert_allclose(found.values[2], X[2])
    assert not found.values[3, 1:].any()
    expected = (REALS.double() - REALS.double().mean()) / REALS.double().std(correction=0)
    np.testing.assert_allclose(found.target[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [torch.long, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_and_flags_are_classes(kind: torch.dtype) -> None:
    found = sequences((X, CLASSES.to(kind)))
    assert found.classes == (2 if kind is torch.bool else 3)
    np.testing.assert_array_equal(found.target.sum(1), 1)
    assert found.target.sum(0).tolist() == sorted(found.target.sum(0), reverse=True)


def test_targets_per_step_stop_with_their_sequence() -> None:
    target = torch.arange(30.0).reshape(6, 5)
    found = sequences(((X, LENGTHS), target))
    assert found.per_step and len(found.rows) == int(LENGTHS.sum())
    given = target[found.rows, found.times].double().numpy()
    np.testing.assert_allclose(np.corrcoef(given, found.target[:, 0])[0, 1], 1)
    wide = sequences(((X, LENGTHS), target[:, :, None].expand(-1, -1, 3)))
    assert wide.target.shape == (len(found.rows), 3)


def test_the_class_that_losses_ignore_is_no_target() -> None:
    target = torch.randint(3, (6, 5))
    target[:, :2] = IGNORED
    found = sequences((X, target))
    assert set(found.times.tolist()) == {2, 3, 4}
    assert sequences_of(parts_of((X, torch.full((6, 5), IGNORED)), True)) is None


def test_token_ids_become_one_hot_and_padding_nothing() -> None:
    found = sequences(((IDS, torch.tensor([3, 1])), REALS[:2]))
    assert found.values.shape == (2, 3, 3)
    np.testing.assert_array_equal(found.values[0].argmax(1), [0, 1, 2])
    assert found.values[1].sum() == 1


def test_one_channel_may_go_without_an_axis() -> None:
    np.testing.assert_array_equal(
        sequences((X[:, :, 0], REALS)).values, sequences((X[:, :, :1], REALS)).values
    )


FORMS = {
    "a pair": (((X, LENGTHS), REALS), True),
    "a list as a pair": ([[X, LENGTHS.tolist()], REALS], True),
    "batches": ([((X[:2], LENGTHS[:2]), REALS[:2]), ((X[2:], LENGTHS[2:]), REALS[2:])], True),
    "two batches as a tuple": (
        (((X[:2], LENGTHS[:2]), REALS[:2]), ((X[2:], LENGTHS[2:]), REALS[2:])),
        True,
    ),
    "packed": (
        (pack_padded_sequence(X, LENGTHS, batch_first=True, enforce_sorted=False), REALS),
        True,
    ),
    "steps first": (((X.transpose(0, 1), LENGTHS), REALS), False),
}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_mean_the_same(name: str) -> None:
    data, batch_first = FORMS[name]
    found, plain = sequences(data, batch_first), sequences(((X, LENGTHS), REALS))
    np.testing.assert_array_equal(found.values, plain.values)
    np.testing.assert_array_equal(found.times, plain.times)
    np.testing.assert_allclose(found.target, plain.target)


def test_batches_of_other_lengths_are_padded() -> None:
    found = sequences([(X, REALS), (X[:, :3], REALS)])
    assert found.values.shape == (12, 5, 2)
    assert found.times.tolist() == [4] * 6 + [2] * 6


def test_an_endless_stream_is_read_as_far_as_needed() -> None:
    read = 0

    def stream() -> Any:
        nonlocal read
        while True:
            read += 1
            yield X, REALS

    assert len(sequences(stream()).rows) == read * 6
    assert MOST <= read * 6 < MOST + 6


REFUSED: dict[str, tuple[Any, str]] = {
    "no batch": ([], "no batch"),
    "a tensor": (X, "a Tensor"),
    "a number": (3, "a int"),
    "a batch without target": ([X], "a batch is a Tensor"),
    "three parts": ([(X, REALS, REALS)], "a batch is a tuple"),
    "a target that is no tensor": ([(X, [1.0] * 6)], "a batch is a tuple"),
    "inputs that are a dict": ([({"x": X}, REALS)], "inputs are a dict"),
    "too many axes": ((X[:, :, :, None], REALS), "inputs have shape (6, 5, 2, 1)"),
    "one axis": ((X[:, 0, 0], REALS), "inputs have shape (6,)"),
    "no sequences": ((X[:0], REALS[:0]), "inputs have shape (0, 5, 2)"),
    "complex inputs": ((X + 0j, REALS), "torch.complex64"),
    "other batch sizes": ((X, REALS[:5]), "6 sequences and 5 targets"),
    "one target for all": ((X, torch.tensor(1.0)), "6 sequences and no targets"),
    "too few lengths": (((X, LENGTHS[:5]), REALS), "5 lengths for 6 sequences"),
    "a length of nothing": (((X, LENGTHS - 1), REALS), "lengths lie outside 1 to 5"),
    "a length too long": (((X, LENGTHS + 1), REALS), "lengths lie outside 1 to 5"),
    "targets of other steps": ((X, torch.randn(6, 4)), "a target has shape (6, 4)"),
    "targets too wide": ((X, torch.randn(6, 5, COLUMNS + 1)), f"(6, 5, {COLUMNS + 1})"),
    "complex targets": ((X, REALS + 0j), "torch.complex64"),
    "batches of other inputs": ([(X, REALS), (X[:, :, :1], REALS)], "inputs' form"),
    "ids beside values": ([(X, REALS), (torch.ones(6, 5).long(), REALS)], "inputs' form"),
    "batches of other targets": ([(X, REALS), (X, CLASSES)], "targets' form"),
    "targets at ends and steps": ([(X, REALS), (X, torch.randn(6, 5))], "targets' form"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_data_are_refused_in_one_sentence(name: str) -> None:
    data, said = REFUSED[name]
    with pytest.raises(RefusedError) as caught:
        sequences(data)
    assert (caught.value.code, caught.value.path, len(caught.value.reasons)) == ("RG912", "data", 1)
    assert said in caught.value.fact
    assert caught.value.cure.endswith(".")
