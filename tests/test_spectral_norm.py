"""The bound on singular values and its iteration, by themselves."""

from __future__ import annotations

import torch

from rnnguard.nn.spectral_norm import within_spectral_norm


def test_an_iteration_from_where_it_ended_stays_there() -> None:
    """One round finds that nothing moves, from vectors of the leading values."""
    matrices = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    start = torch.linalg.svd(matrices)[2].mT[..., :4]
    scaled, ended = within_spectral_norm(matrices, 0.5, start)
    assert ended is not None
    torch.testing.assert_close(ended @ ended.mT, start @ start.mT)
    norms = torch.linalg.matrix_norm(matrices, 2)[..., None, None]
    torch.testing.assert_close(scaled, 0.5 * matrices / norms)


def test_matrices_of_zeros_stay_and_have_their_gradient() -> None:
    matrices = torch.zeros(1, 2, 4, 4, requires_grad=True)
    vectors = torch.eye(4)[:, :2].expand(1, 2, 4, 2).contiguous()
    scaled, _ = within_spectral_norm(matrices, 1.0, vectors)
    into = torch.randn_like(matrices)
    assert not bool(scaled.any())
    assert torch.equal(torch.autograd.grad(scaled, matrices, into)[0], into)
