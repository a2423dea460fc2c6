"""What is measured of recurrences that users spell out: oracles, and torch's own as a mirror."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rnnguard
from rnnguard.errors import RefusedError
from rnnguard.measurements import SiteReadings
from rnnguard.probe.exponents import FLOOR
from rnnguard.probe.readings import EXPONENTS
from rnnguard.probe.retention_curve import SILENCE

F, H = 3, 6
NARROW = 2  # fewer than the exponents that are measured


def readings(model: nn.Module, x: Tensor, **options: Any) -> SiteReadings:
    report = rnnguard.audit(model, inputs=x, **options)
    (site,) = report.sites
    assert site.form == "written"
    found: SiteReadings = report[site.path]
    return found


def values(found: SiteReadings) -> list[float]:
    return [exponent.value for exponent in found.exponents]


class Loop(nn.Module):
    """A step that a function spells out, over x (T, B, F); gives every state or the last one."""

    def __init__(
        self,
        step: Callable[[Loop, Tensor, Tensor], Tensor],
        weight: Tensor,
        *,
        every: bool = False,
        cut: int = 0,
        warm: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.w = nn.Parameter(weight)
        self.v = nn.Parameter(torch.randn(len(weight), F, generator=generator, dtype=weight.dtype))
        self.step, self.every, self.cut, self.warm = step, every, cut, warm

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x.new_zeros(x.shape[1], len(self.w)), []
        for position, now in enumerate(x):
            if self.cut and position and position % self.cut == 0:
                h = h.detach()
            with torch.set_grad_enabled(position >= self.warm):
                h = self.step(self, now, h)
            outputs.append(h)
        return torch.stack(outputs[self.warm :]) if self.every else h


def orthogonal(scale: float, size: int = H) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return scale * torch.linalg.qr(whole)[0]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=dtype)


def linear(m: Loop, x: Tensor, h: Tensor) -> Tensor:
    return x @ m.v.t() + h @ m.w.t()


def tanh(m: Loop, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(linear(m, x, h))


@pytest.mark.parametrize("gain", [0.5, 0.97, 1.1])
def test_o1_linear_orthogonal(gain: float) -> None:
    found = readings(Loop(linear, orthogonal(gain)), normal(20, 4, F))
    assert values(found) == pytest.approx([math.log(gain)] * EXPONENTS, abs=1e-12)
    assert list(found.retention) == pytest.approx(
        [k * math.log10(gain) for k in range(20)], abs=1e-12
    )
    assert found.growth == pytest.approx(max(1.0, gain**19), rel=1e-10)
    assert (found.batch, found.hidden_size, found.window) == (4, H, 20)


@pytest.mark.parametrize("gain", [0.8, 0.95])
def test_o4_tanh_without_input(gain: float) -> None:
    found = readings(Loop(tanh, orthogonal(gain)), torch.zeros(30, 2, F, dtype=torch.float64))
    assert values(found) == pytest.approx([math.log(gain)] * EXPONENTS, abs=1e-12)


class Gated(nn.Module):
    """An LSTM or a GRU by hand whose every weight is 0 and whose keep gate stands at `keep`."""

    def __init__(self, gates: int, keep: float) -> None:
        super().__init__()
        self.gates = gates
        self.wx = nn.Parameter(torch.zeros(gates * NARROW, F, dtype=torch.float64))
        self.wh = nn.Parameter(torch.zeros(gates * NARROW, NARROW, dtype=torch.float64))
        bias = torch.zeros(gates, NARROW, dtype=torch.float64)
        bias[1] = math.log(keep / (1 - keep))
        self.bias = nn.Parameter(bias.flatten())

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], NARROW)
        for now in x:
            a = now @ self.wx.t() + h @ self.wh.t() + self.bias
            if self.gates == 4:
                i, f, g, o = a.chunk(4, -1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            else:
                r, z, n = a.chunk(3, -1)
                h = (1 - torch.sigmoid(z)) * torch.tanh(n * torch.sigmoid(r)) + torch.sigmoid(z) * h
        return h


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_o7_lstm_of_its_forget_bias(keep: float) -> None:
    found = readings(Gated(4, keep), normal(60, 3, F))
    assert found.hidden_size == 2 * NARROW
    assert values(found)[:NARROW] == pytest.approx([math.log(keep)] * NARROW, abs=1e-12)
    assert values(found)[NARROW:] == [FLOOR] * NARROW
    slopes = [b - a for a, b in zip(found.retention[1:], found.retention[2:], strict=False)]
    assert slopes == pytest.approx([math.log10(keep)] * len(slopes), abs=1e-10)


@pytest.mark.parametrize("keep", [0.3, 0.95])
def test_o8_gru_of_its_keep_bias(keep: float) -> None:
    found = readings(Gated(3, keep), normal(30, 3, F))
    assert values(found) == pytest.approx([math.log(keep)] * NARROW, abs=1e-12)
    assert found.retention[10] == pytest.approx(10 * math.log10(keep), abs=1e-12)


def indrnn(m: Loop, x: Tensor, h: Tensor) -> Tensor:
    return torch.relu(m.w * h + 1 + 0 * (x @ m.v.t()))


def test_o11_indrnn_that_is_always_active() -> None:
    scales = torch.tensor([0.99, 0.5, 0.25, 0.12, 0.06, 0.03], dtype=torch.float64)
    found = readings(Loop(indrnn, scales), normal(100, 2, F))
    assert values(found) == pytest.approx([math.log(u) for u in scales.tolist()[:4]], abs=1e-12)


def test_o11_a_gain_of_two_over_all_lags() -> None:
    lags = 24
    scales = torch.full((H,), 2 ** (1 / lags), dtype=torch.float64)
    found = readings(Loop(indrnn, scales), normal(lags + 1, 2, F))
    assert found.growth == pytest.approx(2, abs=1e-12)
    assert values(found) == pytest.approx([math.log(2) / lags] * EXPONENTS, abs=1e-12)


# --- the mirror: torch's own recurrences, spelled out with the same weights


class Fused(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out[-1]


class SpelledOut(nn.Module):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.kind = type(rnn)
        self.ih, self.hh = rnn.weight_ih_l0, rnn.weight_hh_l0
        self.b_ih, self.b_hh = rnn.bias_ih_l0, rnn.bias_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], self.hh.shape[1])
        for now in x:
            a, b = now @ self.ih.t() + self.b_ih, h @ self.hh.t() + self.b_hh
            if self.kind is nn.RNN:
                h = torch.tanh(a + b)
            elif self.kind is nn.LSTM:
                i, f, g, o = (a + b).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
                z = torch.sigmoid(az + bz)
                h = (1 - z) * torch.tanh(an + torch.sigmoid(ar + br) * bn) + z * h
        return h


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_the_readings_are_those_of_torchs_own(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(4)
    rnn, x = kind(F, 12).double(), normal(40, 24, F)
    report = rnnguard.audit(Fused(rnn), inputs=x)
    native: SiteReadings = report["rnn"]
    written = readings(SpelledOut(rnn), x)
    assert torch.allclose(Fused(rnn)(x), SpelledOut(rnn)(x), rtol=0, atol=1e-12)
    for one, other in zip(native.exponents[:3], written.exponents[:3], strict=True):
        spread = math.hypot(one.stderr, other.stderr)
        # Both are finite-time, of one product and of its transpose.
        assert abs(one.value - other.value) <= 4 * spread + 0.02
    assert len(native.retention) - len(written.retention) in (0, 1)
    pairs = list(zip(native.retention, written.retention, strict=False))[:25]
    errors = list(zip(native.retention_stderr, written.retention_stderr, strict=False))[:25]
    for (one_log, other_log), (one_error, other_error) in zip(pairs, errors, strict=True):
        assert abs(one_log - other_log) <= 4 * math.hypot(one_error, other_error) + 1e-9
    assert abs(native.effective_length - written.effective_length) <= 1
    assert native.level == written.level


# --- windows


def test_a_loss_at_every_step_passes_the_longest_piece() -> None:
    found = readings(Loop(tanh, orthogonal(0.9), every=True, cut=5), normal(23, 4, F))
    assert (found.readout, found.steps, found.window) == ("all_steps", 23, 5)
    assert len(found.retention) == 5


def test_a_loss_at_the_end_passes_the_last_piece() -> None:
    found = readings(Loop(tanh, orthogonal(0.9), cut=5), normal(23, 4, F))
    assert (found.steps, found.window, len(found.retention)) == (23, 3, 3)


@pytest.mark.parametrize("every", [False, True])
def test_memory_beyond_the_window_is_truncated_and_not_vanishing(every: bool) -> None:
    model = Loop(linear, orthogonal(0.99), every=every, cut=5)
    assert readings(model, normal(23, 4, F), memory=10).level == "truncated"
    assert readings(model, normal(23, 4, F), memory=2).level == "healthy"


def test_a_burn_in_without_gradient_shortens_the_window() -> None:
    found = readings(Loop(tanh, orthogonal(0.9), warm=6), normal(20, 4, F))
    assert (found.steps, found.window) == (20, 14)
    assert min(found.retention) > SILENCE


@pytest.mark.parametrize(
    ("gain", "level"), [(0.3, "vanishing"), (0.99, "healthy"), (1.4, "exploding")]
)
def test_levels_are_judged_as_of_torchs_own(gain: float, level: str) -> None:
    found = readings(Loop(linear, orthogonal(gain)), normal(24, 4, F), memory=20)
    assert found.level == level
    assert found.memory_source == "declared"


# --- numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_precision_is_measured(dtype: torch.dtype) -> None:
    exact = readings(Loop(tanh, orthogonal(0.9)), normal(20, 4, F))
    model, x = Loop(tanh, orthogonal(0.9)).to(dtype), normal(20, 4, F).to(dtype)
    found = readings(model, x)
    reach = {torch.bfloat16: 0.1, torch.float32: 1e-4, torch.float64: 0.0}[dtype]
    assert values(found)[0] == pytest.approx(values(exact)[0], abs=reach)
    assert found.retention[5] == pytest.approx(exact.retention[5], abs=reach)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_two_audits_say_the_same() -> None:
    model, x = Loop(tanh, orthogonal(0.9)), normal(20, 4, F)
    assert readings(model, x) == readings(model, x)


def test_fewer_than_three_lags_are_no_crash() -> None:
    found = readings(Loop(tanh, orthogonal(0.9)), normal(3, 4, F))
    assert found.steps == 3
    assert 1 <= len(found.retention) <= 3


class Reentrant(Loop):
    def forward(self, x: Tensor) -> Tensor:
        given = x @ self.v.t()
        h = given.new_zeros(given.shape[1:])
        for now in given:
            h = checkpoint(lambda a, b: torch.tanh(a + b @ self.w.t()), now, h, use_reentrant=True)
        return h


def test_steps_that_autograd_cannot_pass_alone_are_refused_with_the_cure() -> None:
    with pytest.raises(RefusedError, match="use_reentrant=False") as refused:
        readings(Reentrant(tanh, orthogonal(0.9)), normal(9, 4, F))
    assert refused.value.code == "RG912"
