"""The largest singular value of each of many matrices, from where a power iteration stood."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, climb

_ROUNDS = 200
_SETTLED = 1e-6


def spectral_norms(matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    """Norms (...) of matrices (..., n, m), differentiable twice, and where the iteration ended.

    vectors: (..., m, k) orthonormal columns to start from. Theirs is a fast rung: what must be
    followed through (vmap, exports, second derivatives) takes the norm from singular values, and
    then no vectors come back.
    """
    ended: list[Tensor] = []
    (norms,) = climb(_RUNGS, _Call(matrices, vectors, ended), matrices, (vectors,))
    return norms, ended[0] if ended else None


class _Call(NamedTuple):
    x: Tensor
    vectors: Tensor | None
    ended: list[Tensor]
    """Takes the vectors of the end: no output, since they have no gradient."""


def exact(call: _Call) -> Tensors:
    """Rung 0."""
    return (torch.linalg.matrix_norm(call.x, 2),)


def _forward(call: _Call) -> tuple[Tensors, Left]:
    matrices, vectors = call.x, call.vectors
    assert vectors is not None
    before = matrices.new_zeros(matrices.shape[:-2])
    for _ in range(_ROUNDS):
        vectors = torch.linalg.qr(matrices.mT @ (matrices @ vectors))[0]
        images = matrices @ vectors
        # Of all vectors together: it settles last, so that one value's standstill does not count.
        size = torch.linalg.matrix_norm(images)
        if bool(((size - before).abs() <= _SETTLED * size).all()):
            break
        before = size
    turn = torch.linalg.eigh(images.mT @ images)[1][..., -1:]
    left, right = images @ turn, vectors @ turn
    norms = torch.linalg.vector_norm(left, dim=(-2, -1))
    call.ended.append(vectors)
    return (norms,), (left, right, norms)


def _backward(call: _Call, left: Left, cotangents: Tensors, wanted: _Call) -> _Call:
    """The norm's gradient is the outer product of its two singular vectors."""
    images, right, norms = left
    assert images is not None and right is not None and norms is not None
    share = cotangents[0] / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return _Call((share[..., None, None] * images) @ right.mT, None, [])


_RUNGS = Rungs(exact, _forward, _backward)
