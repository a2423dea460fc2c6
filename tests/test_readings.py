"""What is read at a site beside exponents and retention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import only_site, zeroed
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnguard.inspection.gates import GATES
from rnnguard.measurements import SiteReadings
from rnnguard.probe.readings import (
    LONGEST,
    Memory,
    measure_site,
    memory_needed,
    spectral_radius,
)
from rnnguard.records import Cell

F, H, T, B = 3, 8, 12, 4


def read(model: nn.Module, x: Any, memory: Memory | None = None) -> SiteReadings:
    found = only_site(model, x)
    return measure_site(found, memory or Memory(T, "declared"), seed=0, trained=False)


def biased(module: nn.RNNBase, cell: Cell, **biases: float) -> nn.RNNBase:
    """All weights 0 and these gate biases, in bias_ih."""
    zeroed(module)
    with torch.no_grad():
        for name, value in biases.items():
            rows = GATES[cell].block(name, module.hidden_size)
            module.get_parameter("bias_ih_l0")[rows] = value
    return module


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_the_forget_gate_and_bias() -> None:
    site = read(biased(nn.LSTM(F, H), "lstm", f=logit(0.9)), torch.randn(T, B, F))
    assert site.forget_gate == pytest.approx(0.9)
    assert site.forget_bias == pytest.approx(logit(0.9))
    gru = read(biased(nn.GRU(F, H), "gru", z=logit(0.8)), torch.randn(T, B, F))
    assert gru.forget_gate == pytest.approx(0.8)
    assert gru.forget_bias == pytest.approx(logit(0.8))


def test_a_cell_without_gates_has_no_forget_gate() -> None:
    site = read(nn.RNN(F, H), torch.randn(T, B, F))
    assert (site.forget_gate, site.forget_bias, site.forget_bias_doubled) == (None, None, False)
    assert read(nn.LSTM(F, H, bias=False), torch.randn(T, B, F)).forget_bias is None


def test_of_several_layers_the_least_forget_bias_counts() -> None:
    module = nn.LSTM(F, H, num_layers=2)
    zeroed(module)
    with torch.no_grad():
        module.get_parameter("bias_ih_l0")[H : 2 * H] = 3.0
        module.get_parameter("bias_hh_l1")[H : 2 * H] = 1.0
    assert read(module, torch.randn(T, B, F)).forget_bias == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ih", "hh", "doubled"),
    [(1.0, 1.0, True), (1.0, 0.0, False), (0.0, 0.0, False), (-1, -1, False)],
)
def test_a_doubled_forget_bias(ih: float, hh: float, doubled: bool) -> None:
    module = nn.LSTM(F, H)
    with torch.no_grad():
        module.get_parameter("bias_ih_l0")[H : 2 * H] = ih
        module.get_parameter("bias_hh_l0")[H : 2 * H] = hh
    assert read(module, torch.randn(T, B, F)).forget_bias_doubled is doubled


@pytest.mark.parametrize(
    ("biases", "share"),
    [({}, 0.0), ({"i": 6.0}, 1 / 3), ({"i": 6.0, "f": -6.0}, 2 / 3), ({"g": 9.0}, 0.0)],
)
def test_saturation_of_gates(biases: dict[str, float], share: float) -> None:
    site = read(biased(nn.LSTM(F, H), "lstm", **biases), torch.randn(T, B, F))
    assert site.saturation == pytest.approx(share)


def test_saturation_of_a_tanh_state() -> None:
    module = biased(nn.RNN(F, 4), "rnn_tanh")
    with torch.no_grad():
        module.get_parameter("bias_ih_l0").copy_(torch.tensor([0.0, 1.0, 2.0, -3.0]))
    assert read(module, torch.randn(T, B, F)).saturation == pytest.approx(0.5)


def test_dead_units() -> None:
    module = biased(nn.RNN(F, 4, nonlinearity="relu"), "rnn_relu")
    with torch.no_grad():
        module.get_parameter("bias_ih_l0").copy_(torch.tensor([-1.0, -1.0, 1.0, -1.0]))
    site = read(module, torch.randn(T, B, F))
    assert (site.dead_units, site.saturation) == (pytest.approx(0.75), 0.0)
    assert read(nn.RNN(F, H), torch.randn(T, B, F)).dead_units is None


@pytest.mark.parametrize(("silent", "expected"), [(0, False), (1, False), (3, True), (T, True)])
def test_silent_input(silent: int, expected: bool) -> None:
    """More than a tenth of the steps are all zero; one feature of zeros is not silence."""
    x = torch.randn(T, B, F)
    x[..., 0] = 0.0
    x[:silent] = 0.0
    assert read(nn.GRU(F, H), x).silent_input is expected


def test_padding_is_not_silence() -> None:
    x, lengths = torch.randn(T, B, F), torch.tensor([T, 3, 2, 1])
    site = read(nn.GRU(F, H), pack_padded_sequence(x, lengths))
    assert not site.silent_input
    rows = torch.cat([x[:end, row] for row, end in enumerate(lengths.tolist())])
    assert site.input_rms == pytest.approx(float(rows.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_rms_and_drive_of_the_input(scale: float) -> None:
    module, x = nn.LSTM(F, H), scale * torch.randn(T, B, F)
    site = read(module, x)
    driven = x @ module.get_parameter("weight_ih_l0").detach().T
    assert site.input_rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
    assert site.input_drive == pytest.approx(float(driven.square().mean().sqrt()), rel=1e-5)


def test_rms_of_the_output_is_the_top_layers() -> None:
    module, x = nn.GRU(F, H, num_layers=2), torch.randn(T, B, F)
    with torch.no_grad():
        expected = float(module(x)[0].square().mean().sqrt())
    assert read(module, x).output_rms == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_whole_matrix_orthogonal() -> None:
    module = nn.LSTM(F, H)
    assert not read(module, torch.randn(T, B, F)).whole_matrix_orthogonal
    nn.init.orthogonal_(module.get_parameter("weight_hh_l0"))
    assert read(module, torch.randn(T, B, F)).whole_matrix_orthogonal
    for block in module.get_parameter("weight_hh_l0").chunk(4):
        nn.init.orthogonal_(block)
    assert not read(module, torch.randn(T, B, F)).whole_matrix_orthogonal


@torch.no_grad()
def test_the_spectral_radius_is_that_of_the_candidate() -> None:
    module = nn.GRU(F, H)
    module.get_parameter("weight_hh_l0").normal_()
    block = module.get_parameter("weight_hh_l0")[2 * H :]
    exact = float(torch.linalg.eigvals(block.double()).abs().max())
    assert read(module, torch.randn(T, B, F)).spectral_radius == pytest.approx(exact)


@pytest.mark.parametrize("size", [8, 256, 300])
@pytest.mark.parametrize(
    "build",
    [
        lambda n: torch.randn(n, n) / math.sqrt(n),
        lambda n: 0.7 * torch.linalg.qr(torch.randn(n, n))[0],
        lambda n: 1e-3 * (torch.rand(n, n) - 0.5),
        lambda n: torch.diag(torch.linspace(-2.0, 1.0, n)),
    ],
)
def test_spectral_radius(size: int, build: Callable[[int], Tensor]) -> None:
    """Exact up to 256; above by powers of the matrix, measured to be up to 5 percent high."""
    matrix = build(size).double()
    exact = float(torch.linalg.eigvals(matrix).abs().max())
    assert spectral_radius(matrix) == pytest.approx(exact, rel=1e-9 if size <= 256 else 0.06)


@pytest.mark.parametrize("size", [8, 300])
def test_the_spectral_radius_of_nothing(size: int) -> None:
    assert spectral_radius(torch.zeros(size, size)) == 0.0


def test_every_layer_and_direction_has_its_readings() -> None:
    site = read(nn.LSTM(F, H, num_layers=2, bidirectional=True), torch.randn(T, B, F))
    assert [(r.layer, r.direction) for r in site.layer_readings] == [
        (0, "forward"),
        (0, "reverse"),
        (1, "forward"),
        (1, "reverse"),
    ]
    assert all(len(r.retention) == T + 1 for r in site.layer_readings)
    assert site.growth == max(r.growth for r in site.layer_readings)


def test_an_expansive_layer_is_the_one_shown() -> None:
    module = nn.RNN(F, 64, num_layers=2, bias=False)
    with torch.no_grad():
        module.get_parameter("weight_hh_l0").normal_(0, 4 / math.sqrt(64))
    site = read(module, 0.01 * torch.randn(60, B, F), Memory(60, "declared"))
    calm, wild = site.layer_readings[1].exponents[0], site.layer_readings[0].exponents[0]
    assert wild.value > 0 > calm.value
    assert site.expansive
    assert site.decay_per_step == pytest.approx(math.exp(wild.value))
    assert site.growth_over_window == pytest.approx(60 * wild.value)


def test_a_sequence_cut_short_is_extrapolated() -> None:
    """Behind what was measured, the retention goes on along its slope."""
    keep = 0.999
    module = biased(nn.GRU(1, 2), "gru", z=logit(keep))
    steps = LONGEST + 500
    site = read(module, torch.zeros(steps, 1, 1), Memory(steps, "declared"))
    assert (site.steps, len(site.retention)) == (steps, LONGEST + 1)
    assert site.retention_at_memory == pytest.approx(steps * math.log10(keep), rel=1e-3)


def test_no_memory_no_retention_at_it() -> None:
    site = read(nn.LSTM(F, H), torch.randn(T, B, F), Memory(None, "unknown"))
    assert (site.memory_needed, site.memory_source, site.retention_at_memory) == (
        None,
        "unknown",
        None,
    )


class Reader(nn.Module):
    def __init__(self, every_step: bool) -> None:
        super().__init__()
        self.rnn, self.every_step = nn.GRU(F, H), every_step

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)[0]
        return out * 2 if self.every_step else out[-1] * 2


@pytest.mark.parametrize(
    ("declared", "every_step", "real", "expected"),
    [
        (7, False, True, Memory(7, "declared")),
        (7, True, False, Memory(7, "declared")),
        (None, False, True, Memory(T, "assumed")),
        (None, True, True, Memory(None, "unknown")),
        (None, False, False, Memory(None, "unknown")),
    ],
)
def test_the_memory_needed(
    declared: int | None, every_step: bool, real: bool, expected: Memory
) -> None:
    found = only_site(Reader(every_step), torch.randn(T, B, F))
    assert memory_needed(found.record, declared, None, real) == expected


def test_the_same_seed_reads_the_same() -> None:
    module, x = nn.LSTM(F, H), torch.randn(T, B, F)
    assert read(module, x) == read(module, x)


def test_every_estimate_has_its_error() -> None:
    site = read(nn.LSTM(F, H, num_layers=2), torch.randn(40, 6, F), Memory(10, "declared"))
    assert {exponent.freedom for exponent in site.exponents} == {5}
    assert all(exponent.stderr > 0 for exponent in site.exponents)
    for errors in (site.retention_stderr, *(r.retention_stderr for r in site.layer_readings)):
        assert len(errors) == 41 and errors[0] == 0.0 and all(e > 0 for e in errors[1:])
    assert site.effective_length_interval is not None
    low, high = site.effective_length_interval
    assert 0 < low <= site.effective_length <= high <= 40
    assert site.retention_at_memory_interval is not None and site.retention_at_memory is not None
    below, above = site.retention_at_memory_interval
    assert below < site.retention_at_memory < above
    # Student's t at 5 degrees of freedom.
    assert (above - below) / 2 == pytest.approx(2.5706 * site.retention_stderr[10], rel=1e-4)


def test_the_bounds_of_what_was_extrapolated_widen() -> None:
    x, module = torch.randn(40, 6, F), nn.GRU(F, H)
    inside = read(module, x, Memory(40, "declared")).retention_at_memory_interval
    beyond = read(module, x, Memory(400, "declared")).retention_at_memory_interval
    assert inside is not None and beyond is not None
    assert beyond[1] - beyond[0] > 2 * (inside[1] - inside[0])


def test_without_memory_needed_no_bounds_at_it() -> None:
    site = read(nn.LSTM(F, H), torch.randn(T, B, F), Memory(None, "unknown"))
    assert site.retention_at_memory_interval is None


def test_half_precision_around_an_audit_changes_no_reading() -> None:
    found = only_site(nn.GRU(F, H), torch.randn(T, B, F))
    expected = measure_site(found, Memory(T, "declared"), seed=0, trained=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measure_site(found, Memory(T, "declared"), seed=0, trained=False)
    assert (inside.exponents, inside.retention) == (expected.exponents, expected.retention)
