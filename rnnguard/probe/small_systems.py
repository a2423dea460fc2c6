"""Linear algebra in small pieces, without what only pays off in large ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from rnnguard.probe.history import Array


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, numpy and scipy compute in one thread.

    Waking others for a matrix of a few hundred rows takes longer than the matrix does, and
    where they must share the processors with anything else, a hundred times as long.
    """
    import scipy.linalg  # noqa: F401 - with a library of its own, that must be there to be told
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def solved(matrices: Array, right: Array) -> Array:
    """X (..., n, m) with matrices @ X = right, of positive definite matrices (..., n, n)."""
    from scipy.linalg.lapack import dposv

    found = np.empty(right.shape)
    stacks = (part.reshape(-1, *part.shape[-2:]) for part in (matrices, right, found))
    for matrix, wanted, place in zip(*stacks, strict=True):
        # LAPACK's own, since of many small systems checks would take most of the time; a
        # symmetric matrix is its transpose, which need not be turned round.
        place[:] = dposv(matrix.T, wanted)[1]
    return found
