"""Features of each step, and the histories of targets."""

from __future__ import annotations

import numpy as np

from rnnguard.probe.history import (
    KINDS,
    PRODUCTS,
    SHARED,
    TOKENS,
    WIDEST,
    Sequences,
    families,
    histories,
    one_hot,
    scaled,
    standardised,
    token_channels,
)


def test_a_history_starts_at_the_target_and_is_empty_before_the_start() -> None:
    values = np.arange(1.0, 9.0).reshape(2, 4, 1)
    sequences = Sequences(values, np.array([0, 1, 1]), np.array([3, 1, 3]), np.zeros((3, 1)), 0)
    found = histories(values, sequences, 3)
    expected = np.array([[4.0, 3, 2], [6, 5, 0], [8, 7, 6]])[:, :, None]
    np.testing.assert_allclose(found, standardised(expected))


def test_columns_have_mean_0_and_spread_1_or_are_silent() -> None:
    rng = np.random.default_rng(0)
    columns = np.stack([rng.standard_normal(50) * 1e-5 + 3, np.full(50, 0.1)], axis=1)
    found = standardised(columns)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(found.std(0), [1, 0], atol=1e-9)


def test_channels_that_never_move_are_left_out_and_many_are_mixed() -> None:
    rng = np.random.default_rng(0)
    values = 1e3 * rng.standard_normal((20, 30, 3))
    values[:, :, 1] = 0.1
    found = scaled(values, 0)
    assert found.shape == (20, 30, 2)
    np.testing.assert_allclose(found.std((0, 1)), 1)
    many = scaled(rng.standard_normal((20, 30, WIDEST + 10)), 0)
    assert many.shape == (20, 30, WIDEST)
    assert 0.5 < many.std() < 2


def test_features_are_channels_then_products_then_all_of_degree_two() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 5, 3))
    first, products, both = families(values)
    np.testing.assert_array_equal(first, values)
    np.testing.assert_allclose(products[:, :, 1], values[:, :, 0] * values[:, :, 2])
    assert (products.shape[2], both.shape[2]) == (3, 9)
    assert [x.shape[2] for x in families(values[:, :, :1])] == [1, 2]
    assert len(list(families(rng.standard_normal((4, 5, PRODUCTS + 1))))) == 1


def test_products_of_one_hot_channels_are_spared_but_not_of_a_marked_value() -> None:
    rng = np.random.default_rng(0)
    hot = np.eye(4)[rng.integers(4, size=(10, 8))]
    assert len(list(families(hot))) == 1
    marked = np.zeros((10, 8, 2))
    marked[:, 0, 0], marked[:, 1:, 1] = 1, rng.standard_normal((10, 7))
    assert len(list(families(marked))) == 3


def test_rare_tokens_share_columns_and_rare_classes_one() -> None:
    ids = np.repeat(np.arange(300), np.arange(300, 0, -1))[None]
    found = token_channels(ids)
    assert found.shape == (1, ids.shape[1], TOKENS + SHARED + 1)
    np.testing.assert_array_equal(found[:, :, :-1].sum(2), 1)
    np.testing.assert_array_equal(found[:, :, -1], ids)
    assert token_channels(ids % TOKENS).shape[2] == TOKENS
    alone = found[0].sum(0)[:TOKENS]
    assert alone.tolist() == list(range(300, 300 - TOKENS, -1))
    hot, classes = one_hot(ids[0])
    assert classes == KINDS
    assert hot[:, : KINDS - 1].sum(0).tolist() == list(range(300, 300 - KINDS + 1, -1))
    np.testing.assert_array_equal(hot.sum(1), 1)


def test_a_draw_keeps_targets_with_their_places() -> None:
    rows, times = (index.ravel() for index in np.indices((20, 30)))
    target = (100.0 * rows + times)[:, None]
    whole = Sequences(np.zeros((20, 30, 1)), rows, times, target, 0)
    drawn = whole.drawn(50, seed=0)
    assert len(drawn.rows) == 50
    np.testing.assert_array_equal(drawn.target[:, 0], 100 * drawn.rows + drawn.times)
    assert whole.drawn(600, seed=0) is whole
