"""Time scales over the units of a layer, and the bound that layers share."""

from __future__ import annotations

import math

import pytest
import torch

from rnnguard.nn.time_scales import chrono, octaves, share_of_gain


def test_chrono_biases_are_the_quantiles_of_the_papers_draw() -> None:
    tau = chrono(1000, 50).exp()
    assert 1 < tau.min() < 1.1 and 48.9 < tau.max() < 49
    assert float(tau.mean()) == pytest.approx(25, rel=1e-4)
    assert bool((tau.diff() > 0).all())


def test_octaves_are_even_over_the_logarithm() -> None:
    tau = octaves(5, 16)
    torch.testing.assert_close(tau, torch.tensor([1.0, 2, 4, 8, 16]))
    assert octaves(1, 16).tolist() == [1.0]


def test_all_layers_together_double_a_gradient() -> None:
    assert share_of_gain(100, 3) ** (100 * 3) == pytest.approx(2)
    assert share_of_gain(None, 3) == 1


@pytest.mark.parametrize(
    "wrong", [lambda: chrono(4, 2), lambda: octaves(4, 0.5), lambda: share_of_gain(0, 1)]
)
def test_too_short_a_memory_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="at least"):
        wrong()  # type: ignore[operator]
    assert math.isfinite(share_of_gain(1, 1))
