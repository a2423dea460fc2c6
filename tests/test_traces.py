"""What one tensor shows of its initialisation."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from rnnguard.inspection.traces import (
    known_bounds,
    orthogonality_error,
    p_normal,
    p_uniform,
    trace_of,
)

BOUNDS = known_bounds([(16, 64), (16, 16)], [16])


@pytest.mark.parametrize(
    "start",
    [
        nn.init.xavier_uniform_,
        nn.init.kaiming_uniform_,
        lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
        lambda w: nn.init.xavier_uniform_(w, gain=nn.init.calculate_gain("tanh")),
        lambda w: nn.init.uniform_(w, -0.25, 0.25),
        lambda w: nn.init.uniform_(w, -0.1, 0.1),
        nn.init.orthogonal_,
        lambda w: nn.init.orthogonal_(w, gain=1.7),
        nn.init.zeros_,
        lambda w: [nn.init.orthogonal_(part) for part in w.chunk(4)],
        lambda w: [nn.init.eye_(part) for part in w.chunk(4)],
        lambda w: [nn.init.xavier_uniform_(part) for part in w.chunk(4)],
    ],
)
def test_exact_marks_and_their_loss(start: object) -> None:
    torch.manual_seed(0)
    weight = torch.empty(64, 16)
    start(weight)  # type: ignore[operator]
    trace = trace_of(weight, BOUNDS, (1, 4))
    assert trace.kind == "exact" and trace.bits > 100
    moved = trace_of(weight + 1e-4 * torch.randn(64, 16), BOUNDS, (1, 4))
    assert moved.kind != "exact"


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (lambda: torch.randn(64, 16), "alike"),
        (lambda: nn.Linear(16, 64).weight * 1.37, "exact"),
        (lambda: torch.rand(64, 16, dtype=torch.float64).sub(0.5).mul(0.7).float(), "alike"),
        (lambda: torch.randn(64, 16).exp(), "unlike"),
        (lambda: torch.randn(64), "unlike"),
    ],
)
def test_likeness(weight: object, kind: str) -> None:
    torch.manual_seed(0)
    trace = trace_of(weight(), BOUNDS, (1, 4))  # type: ignore[operator]
    assert trace.kind == kind and not trace.known


def test_a_single_column_is_not_orthogonal() -> None:
    """Else any input weight of a recurrence with one input would be."""
    torch.manual_seed(0)
    trace = trace_of(torch.randn(64, 1).exp(), BOUNDS, (1, 4))
    assert trace.kind != "exact" and not trace.known


def test_the_p_values_are_those_of_scipy() -> None:
    torch.manual_seed(0)
    for values in (torch.rand(40) * 2 - 1, torch.rand(3000) * 2 - 0.97):
        wanted = kstest(values.numpy(), "uniform", args=(-1, 2), method="exact").pvalue
        assert p_uniform(values) == pytest.approx(wanted, rel=0.05)
    values: Tensor = torch.randn(500)
    wanted = kstest(values.numpy(), "norm", args=(0, float(values.std()))).pvalue
    assert p_normal(values) == pytest.approx(wanted, rel=0.05)


def test_orthogonality_error() -> None:
    matrix = nn.init.orthogonal_(torch.empty(64, 64, dtype=torch.float64))
    assert orthogonality_error(3 * matrix) < 1e-14
    assert orthogonality_error(torch.zeros(4, 4)) == float("inf")
    shorter = matrix.clone()
    shorter[:, 0] *= 0.9
    # One of 32 squared column lengths is 0.81 of the others; the scale is their mean.
    mean = (31 + 0.81) / 32
    assert orthogonality_error(shorter) == pytest.approx(1 - 0.81 / mean)
