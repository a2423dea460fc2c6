"""Many matrices scaled down to a largest singular value, from where a power iteration stood."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, climb

_ROUNDS = 200
_SETTLED = 1e-6


def within_spectral_norm(
    matrices: Tensor, bound: float, vectors: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The matrices (..., n, m) within the bound, and where the iteration ended.

    Differentiable twice. Those within the bound stay bit for bit.
    vectors: (..., m, k) orthonormal columns to start from. Theirs is a fast rung: what must be
    followed through (vmap, exports, second derivatives) takes the norm from singular values, and
    then no vectors come back.
    """
    ended: list[Tensor] = []
    (scaled,) = climb(_RUNGS, _Call(matrices, bound, vectors, ended), matrices, (vectors,))
    return scaled, ended[0] if ended else None


class _Call(NamedTuple):
    x: Tensor
    bound: float
    vectors: Tensor | None
    ended: list[Tensor]
    """Takes the vectors of the end: no output, since they have no gradient."""


def exact(call: _Call) -> Tensors:
    """Rung 0."""
    return (call.x * _scales(torch.linalg.matrix_norm(call.x, 2), call.bound),)


def _scales(norms: Tensor, bound: float) -> Tensor:
    """What the matrices (..., n, m) of these norms (...) are multiplied by: (..., 1, 1)."""
    scale = bound / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return scale.clamp_max(1.0)[..., None, None]


def _forward(call: _Call) -> tuple[Tensors, Left]:
    assert call.vectors is not None
    vectors, images = _iterated(call.x, call.vectors)
    turn = torch.linalg.eigh(images.mT @ images)[1][..., -1:]
    left, right = images @ turn, vectors @ turn
    norms = torch.linalg.vector_norm(left, dim=(-2, -1))
    scale = _scales(norms, call.bound)
    call.ended.append(vectors)
    return (call.x * scale,), (left, right, norms, scale)


def _iterated(matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors, turned until the sizes of their images stand still, and the images."""
    images = matrices @ vectors
    sizes = _sizes(images)
    for _ in range(_ROUNDS):
        vectors = torch.linalg.qr(matrices.mT @ images)[0]
        images = matrices @ vectors
        before, sizes = sizes, _sizes(images)
        pairs = zip(sizes, before, strict=True)
        if all(abs(size - old) <= _SETTLED * size for size, old in pairs):
            break
    return vectors, images


def _sizes(images: Tensor) -> list[float]:
    """One of each matrix, over all its vectors.

    Their sum settles last, so that one value's standstill does not count. As numbers of Python:
    they are few, and to compare tensors takes longer.
    """
    sizes: list[float] = torch.linalg.vector_norm(images, dim=(-2, -1)).flatten().tolist()
    return sizes


def _backward(call: _Call, left: Left, cotangents: Tensors, wanted: _Call) -> _Call:
    """Above the bound the gradient along the matrix goes, by the norm's two singular vectors."""
    images, right, norms, scale = left
    assert images is not None and right is not None and norms is not None and scale is not None
    into = cotangents[0]
    along = (into * call.x).sum((-2, -1)) / norms.square().clamp_min(torch.finfo(norms.dtype).tiny)
    lost = along[..., None, None] * scale * (scale < 1)
    return _Call(into * scale - (lost * images) @ right.mT, 0.0, None, [])


_RUNGS = Rungs(exact, _forward, _backward)
