"""Small linear systems in one thread."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - so that its library can be asked for its threads
from threadpoolctl import (
    threadpool_info,
    threadpool_limits,
)

from rnnguard.probe.small_systems import one_thread, solved


@pytest.mark.parametrize("stack", [(), (3,), (2, 4)])
def test_stacks_are_solved_one_by_one(stack: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((*stack, 6, 9))
    matrices, right = rows @ rows.swapaxes(-1, -2), rng.standard_normal((*stack, 6, 2))
    kept = matrices.copy(), right.copy()
    found = solved(matrices, right)
    np.testing.assert_allclose(matrices @ found, right, atol=1e-10)
    np.testing.assert_array_equal(matrices, kept[0])
    np.testing.assert_array_equal(right, kept[1])


def threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def test_the_threads_of_before_come_back_whatever_happens() -> None:
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        assert before and set(before) == {2}
        with pytest.raises(ZeroDivisionError), one_thread():
            assert set(threads()) == {1}
            raise ZeroDivisionError
        assert threads() == before
