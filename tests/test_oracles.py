"""The oracles: recurrences whose exponents or retention are known exactly, or from theory.

Each is measured by rnnguard's own routines: torch's cells through their trajectories, every other
recurrence through the products with its Jacobian that the test writes down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from factories import first_layer, zeroed
from scipy.special import digamma, expn, polygamma
from test_exponents import forced, gaussian, orthogonal, plain_rnn, silence
from torch import Tensor, nn

import rnnguard
from rnnguard.inspection.gates import GATES
from rnnguard.probe.exponents import exponents, exponents_of
from rnnguard.probe.retention_curve import log10_retention, log10_retention_of
from rnnguard.probe.steps import Trajectory
from rnnguard.remedies.chrono_bias import CHRONO_BIAS
from rnnguard.remedies.uniform_gate_bias import UNIFORM_GATE_BIAS
from rnnguard.rewrite.edit import Edit

FLOOR = -30.0  # nats; what is zero up to rounding lies below it


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum(trajectory: Trajectory, count: int, warmup: int) -> list[float]:
    found = exponents(trajectory, count=count, generator=seeded(), warmup=warmup)
    return [exponent.value for exponent in found]


def spectrum_of(
    push: Callable[[int, Tensor], Tensor], shape: tuple[int, int], steps: int, warmup: int
) -> list[float]:
    """All exponents of a recurrence of `shape` (sequences, size of the state)."""
    batch, size = shape
    options: dict[str, Any] = {"count": size, "generator": seeded(), "warmup": warmup}
    found = exponents_of(push, batch=batch, state_size=size, steps=steps, **options)
    return [exponent.value for exponent in found]


def curve(trajectory: Trajectory, vectors: int = 8) -> list[float]:
    return list(log10_retention(trajectory, vectors=vectors, generator=seeded()).log10)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mean(function: Callable[[Any], Any]) -> float:
    """E f(z) for z ~ N(0, 1) by the trapezoidal rule, here exact to 1e-14.

    The poles of tanh(sqrt(q) z) come near the axis with q: Gauss and Hermite's rule of 300
    nodes is off by one percent at q = 24.
    """
    z = np.linspace(-12, 12, 4801)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float((density * function(z)).sum() * (z[1] - z[0]))


@pytest.mark.parametrize("gain", [0.1, 0.9, 1.0, 3.0])
def test_o01_a_scaled_orthogonal_recurrence(gain: float) -> None:
    trajectory = first_layer(plain_rnn(gain * orthogonal(12)), silence(60, 2))
    assert spectrum(trajectory, 12, 0) == pytest.approx([math.log(gain)] * 12, abs=1e-12)
    expected = [lag * math.log10(gain) for lag in range(61)]
    assert curve(trajectory, vectors=1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_o02_any_linear_recurrence(seed: int) -> None:
    """From 8 random starts: what one makes of a pair that turns is off by up to 1/T."""
    torch.manual_seed(seed)
    matrix = gaussian(6, 0.9)
    found = spectrum(first_layer(plain_rnn(matrix), silence(3000, 8)), 6, 200)
    moduli = torch.linalg.eigvals(matrix).abs().sort(descending=True).values
    assert found == pytest.approx(moduli.log().tolist(), abs=3e-4)


def test_o03_independent_gaussian_jacobians() -> None:
    """Newman 1986. Each exponent's own spread follows from the variance of ln chi squared."""
    size, gain, steps = 64, 1.5, 3000

    def push(step: int, q: Tensor) -> Tensor:
        return gain / math.sqrt(size) * (normal(2, size, size) @ q)

    found = np.array(spectrum_of(push, (2, size), steps, 0))
    freedom = (size - np.arange(size)) / 2
    theory = math.log(gain) + (math.log(2 / size) + digamma(freedom)) / 2
    spread = np.sqrt(polygamma(1, freedom) / 4 / (2 * steps))
    assert abs(found - theory).max() < 0.045
    assert abs((found - theory) / spread).max() < 4
    assert abs((found - theory).mean()) < 3 * math.sqrt((spread**2).sum()) / size < 0.0012


def test_o04_a_contractive_tanh_recurrence() -> None:
    matrix = 0.9 * orthogonal(16) + 0.2 * gaussian(16, 1.0)
    radius = float(torch.linalg.eigvals(matrix).abs().max())
    assert radius < 1
    trajectory = first_layer(plain_rnn(matrix), silence(1500, 4), 0.1 * normal(4, 16))
    assert spectrum(trajectory, 1, 300) == pytest.approx([math.log(radius)], abs=1e-3)
    scaled = first_layer(plain_rnn(0.9 * orthogonal(16)), silence(1500), 0.1 * normal(1, 16))
    assert spectrum(scaled, 16, 500) == pytest.approx([math.log(0.9)] * 16, abs=1e-3)


@pytest.mark.parametrize(("gain", "limit", "finite"), [(2.0, 0.1547, 0.152), (3.0, 0.3102, 0.301)])
def test_o05_a_chaotic_tanh_recurrence(gain: float, limit: float, finite: float) -> None:
    """Sompolinsky et al. 1988: ln(chi) / 2 for infinitely many units; here there are 400."""
    trajectory = first_layer(plain_rnn(gaussian(400, gain)), silence(400, 2), normal(2, 400))
    (leading,) = spectrum(trajectory, 1, 100)
    assert leading == pytest.approx(limit, abs=0.02)
    assert leading == pytest.approx(finite, abs=0.02)


def driven(gain: float, variance: float, size: int, steps: int, batch: int) -> Trajectory:
    """A Gaussian tanh RNN, every unit of which has white input of its own."""
    x = math.sqrt(variance) * normal(steps, batch, size)
    eye = torch.eye(size, dtype=torch.float64)
    return first_layer(plain_rnn(gaussian(size, gain), eye), x, normal(batch, size))


def test_o06_a_driven_tanh_recurrence() -> None:
    trajectory = driven(1.0, 1.0, size=400, steps=300, batch=4)
    assert spectrum(trajectory, 1, 100) == pytest.approx([-0.4595], abs=0.01)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
def test_o07_an_lstm_with_nothing_but_a_forget_gate(keep: float) -> None:
    hidden = 4
    trajectory = first_layer(forced(nn.LSTM, "f", keep, hidden), silence(80))
    assert trajectory.state_size == 2 * hidden
    found = spectrum(trajectory, 2 * hidden, 20)
    assert found[:hidden] == pytest.approx([math.log(keep)] * hidden, abs=1e-12)
    assert max(found[hidden:]) < FLOOR
    assert all(math.isfinite(value) for value in found)
    # One step back the gradient lies in c alone; from there each lag costs the factor f.
    lost = np.diff(curve(trajectory)[1:])
    assert lost == pytest.approx([math.log10(keep)] * 79, abs=1e-12)


@pytest.mark.parametrize("keep", [0.3, 0.95])
def test_o08_a_gru_keeps_with_z(keep: float) -> None:
    trajectory = first_layer(forced(nn.GRU, "z", keep, 5), silence(60))
    assert spectrum(trajectory, 5, 0) == pytest.approx([math.log(keep)] * 5, abs=1e-12)
    expected = [lag * math.log10(keep) for lag in range(61)]
    assert curve(trajectory) == pytest.approx(expected, abs=1e-12)
    assert math.log(0.95) == pytest.approx(-0.0512933, abs=1e-7)


@pytest.mark.parametrize(
    ("build", "forget_bias", "expected", "within"),
    [
        (nn.RNN, 0.0, -0.549, 0.04),
        (nn.GRU, 0.0, -0.4395, 0.01),
        (nn.LSTM, 0.0, -0.4395, 0.01),
        (nn.LSTM, 1.0, -0.133, 0.01),
    ],
)
def test_o09_default_weights(
    build: Callable[..., nn.RNNBase], forget_bias: float, expected: float, within: float
) -> None:
    """One matrix of 512 rows may miss the limit of wide layers by 0.012; their mean does not."""
    hidden, found = 512, []
    for seed in range(2):
        torch.manual_seed(seed)
        module = build(4, hidden)
        if forget_bias:
            with torch.no_grad():
                module.get_parameter("bias_ih_l0")[hidden : 2 * hidden] += forget_bias
        trajectory = first_layer(module, 0.01 * torch.randn(200, 1, 4))
        found += spectrum(trajectory, 1, 60)
    assert sum(found) / len(found) == pytest.approx(expected, abs=within)


def chaotic_lstm() -> nn.LSTM:
    """Laurent and von Brecht, ICLR 2017; block order i, f, g, o."""
    rows = [[-10, -10], [10, 10], [-10, -10], [10, 10], [10, -80], [80, -10], [10, -10], [10, -10]]
    module = nn.LSTM(1, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.get_parameter("weight_hh_l0").copy_(torch.tensor(rows))
    return module


def test_o10_a_chaotic_lstm_of_two_units() -> None:
    """Over 128 orbits of 1000 steps each; U_o is singular, so that the last is minus infinity."""
    start = 0.1 * normal(128, 2), normal(128, 2)
    trajectory = first_layer(chaotic_lstm(), silence(1200, 128), *start)
    found = spectrum(trajectory, 4, 200)
    assert found[0] == pytest.approx(0.220, abs=0.005)
    assert found[1:3] == pytest.approx([-0.437, -3.11], abs=0.03)
    assert found[3] < FLOOR


@torch.no_grad()
def test_o10_two_orbits_of_the_lstm_part_as_fast() -> None:
    """Without any Jacobian: the distance of two states, taken back to 1e-7 after each step."""
    module, x, size = chaotic_lstm(), torch.zeros(1, 128, 1, dtype=torch.float64), 1e-7
    state = torch.cat([0.1 * normal(128, 2), normal(128, 2)], -1)
    shift, logs = normal(128, 4), []
    for _ in range(1200):
        shift = size * shift / shift.norm(dim=-1, keepdim=True)
        pairs = [torch.stack([state, state + shift]).split(2, -1)]
        h, c = (part.reshape(1, 256, 2).contiguous() for part in pairs[0])
        _, (h, c) = module(torch.cat([x, x], 1), (h, c))
        state, moved = torch.cat([h, c], -1).view(2, 128, 4)
        shift = moved - state
        logs.append((shift.norm(dim=-1) / size).log())
    assert float(torch.stack(logs[200:]).mean()) == pytest.approx(0.220, abs=0.005)


def test_o10b_a_chaotic_gru_of_two_units() -> None:
    """Theirs resets before the matrix: h' = (1 - z) h + z tanh(R (r h))."""
    to_z, to_r, to_n = (
        torch.tensor(rows, dtype=torch.float64)
        for rows in ([[0, 1], [1, 1]], [[0, 1], [1, 0]], [[-5, -8], [8, 5]])
    )
    h, eye = normal(48, 2), torch.eye(2, dtype=torch.float64)

    def push(step: int, q: Tensor) -> Tensor:
        nonlocal h
        z, r = (h @ to_z.T).sigmoid(), (h @ to_r.T).sigmoid()
        n = ((r * h) @ to_n.T).tanh()
        reset = r[..., None] * eye + (h * r * (1 - r))[..., None] * to_r
        jacobian = (
            (1 - z)[..., None] * eye
            + ((n - h) * z * (1 - z))[..., None] * to_z
            + (z * (1 - n * n))[..., None] * (to_n @ reset)
        )
        h = (1 - z) * h + z * n
        return jacobian @ q

    found = spectrum_of(push, (48, 2), 1200, 200)
    assert found == pytest.approx([0.222, -0.54], abs=0.005)


def test_o11_an_independent_relu_recurrence() -> None:
    """IndRNN, h' = relu(w x + u h + b), whose Jacobian is diag(u) while all units are active."""
    steps, u = 200, torch.tensor([2 ** (1 / 200), 0.9, 0.6, 0.3], dtype=torch.float64)
    h = uniform(3, 4)

    def moved(state: Tensor) -> Tensor:
        return (uniform(3, 1) + u * state + 0.1).clamp_min(0)

    def push(step: int, q: Tensor) -> Tensor:
        nonlocal h
        h = moved(h)
        return ((h > 0) * u)[..., None] * q

    found = spectrum_of(push, (3, 4), steps, 150)
    assert found == pytest.approx(u.log().tolist(), abs=1e-12)
    kept = log10_retention_of(
        lambda lag, g: g * u[0], batch=2, state_size=5, steps=steps, vectors=3, generator=seeded()
    )
    assert 10 ** kept.log10[steps] == pytest.approx(2.0, abs=1e-12)
    # The product is the derivative of the step itself.
    one = torch.autograd.functional.jacobian(lambda s: (u * s + 0.5).clamp_min(0), uniform(4))
    assert torch.equal(one, torch.diag(u))


def kept_by(remedy: Any, dose: dict[str, Any], hidden: int = 256) -> Tensor:
    """The forget gates that the remedy's biases force, over 24 seeds; all weights are 0."""
    gates = []
    for seed in range(24):
        module = zeroed(nn.LSTM(1, hidden))
        remedy.apply(Edit(module, None), module, dose | {"seed": seed})
        trajectory = first_layer(module, torch.zeros(2, 1, 1))
        rows = GATES["lstm"].block("f", hidden)
        bias = module.get_parameter("bias_ih_l0").detach()[rows].double().sigmoid()
        assert trajectory.factors["keep"][0, 0].double() == pytest.approx(bias, abs=1e-6)
        gates.append(bias)
    return torch.stack(gates)


@pytest.mark.parametrize(("memory", "expected"), [(50, 0.1505), (784, 0.1483)])
def test_o12_chrono_keeps_a_seventh(memory: int, expected: float) -> None:
    """E[f^T] for a bias log U(1, T - 1); its limit is E2(1) = 0.1485."""
    kept = float((kept_by(CHRONO_BIAS, {"t_max": memory}) ** memory).mean())
    assert kept == pytest.approx(expected, abs=0.005)
    times = np.linspace(1, memory - 1, 400001)
    exact = float(((times / (1 + times)) ** memory).mean())
    assert exact == pytest.approx(expected, abs=5e-4)
    assert exact == pytest.approx(float(expn(2, 1)), abs=0.005)
    assert float(expn(2, 1)) == pytest.approx(0.14850, abs=1e-5)


@pytest.mark.parametrize(("lag", "expected"), [(10, 0.0878), (50, 0.0162)])
def test_o13_uniform_gates_keep_one_in_k(lag: int, expected: float) -> None:
    edge = 1 / 256
    exact = ((1 - edge) ** (lag + 1) - edge ** (lag + 1)) / ((lag + 1) * (1 - 2 * edge))
    assert exact == pytest.approx(expected, abs=5e-5)
    powers = kept_by(UNIFORM_GATE_BIAS, {}) ** lag
    error = float(powers.mean(1).std()) / math.sqrt(len(powers))
    assert 0 < error < 0.003
    assert float(powers.mean()) == pytest.approx(exact, abs=3 * error)


def test_o14_an_antisymmetric_recurrence_at_zero() -> None:
    """h' = h + eps tanh((W - W' - gamma Id) h): a normal Jacobian with eigenvalues on a line."""
    size, eps, gamma = 7, 0.4, 0.3
    weight = normal(size, size)
    matrix = weight - weight.T - gamma * torch.eye(size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda h: h + eps * torch.tanh(matrix @ h), torch.zeros(size, dtype=torch.float64)
    )
    omega = torch.linalg.eigvals(weight - weight.T).imag
    theory = 0.5 * ((1 - eps * gamma) ** 2 + (eps * omega) ** 2).log()
    found = spectrum_of(lambda step, q: jacobian @ q, (1, size), 3000, 1500)
    assert found == pytest.approx(theory.sort(descending=True).values.tolist(), abs=4e-6)


def normed_chaos(scale: float, gamma: float) -> float:
    """The leading exponent of h' = tanh(gamma LN(W h)), W Gaussian of gain `scale`."""
    size = 400
    weight, h = gaussian(size, scale), normal(2, size)

    def push(step: int, q: Tensor) -> Tensor:
        nonlocal h
        a, moved = h @ weight.T, weight @ q
        sigma = a.std(-1, correction=0, keepdim=True)
        normed = (a - a.mean(-1, keepdim=True)) / sigma
        centred = moved - moved.mean(1, keepdim=True)
        along = (normed[..., None] * moved).mean(1, keepdim=True)
        h = (gamma * normed).tanh()
        slope = gamma * (1 - h * h) / sigma
        return slope[..., None] * (centred - normed[..., None] * along)

    options: dict[str, Any] = {"count": 1, "generator": seeded(), "warmup": 100}
    return exponents_of(push, batch=2, state_size=size, steps=400, **options)[0].value


def test_o15_layer_norm_takes_out_the_scale() -> None:
    found = []
    for scale in (0.1, 1.0, 10.0):
        torch.manual_seed(0)
        found.append(normed_chaos(scale, gamma=1.0))
    assert found == pytest.approx([0.070, 0.068, 0.066], abs=0.01)
    assert max(found) - min(found) < 1e-3


@pytest.mark.parametrize(
    ("gamma", "expected", "within"), [(1.0, 0.082, 5e-4), (0.5, 0.0165, 5e-5), (0.2, 9e-4, 5e-5)]
)
def test_o15_its_mean_field(gamma: float, expected: float, within: float) -> None:
    slope = gamma**2 * mean(lambda z: np.cosh(gamma * z) ** -4.0)
    chi = slope / mean(lambda z: np.tanh(gamma * z) ** 2)
    assert math.log(chi) / 2 == pytest.approx(expected, abs=within)


def test_o16_zoneout_on_a_forced_forget_gate() -> None:
    """c' = c with probability p, else f c: the gradient's mean factor is p + (1 - p) f."""
    p, f, steps, size = 0.5, 0.8, 30, 20000
    masks = uniform(steps, 1, size) < p
    factors = torch.where(masks, 1.0, f).double()
    gradient = factors.cumprod(0).mean(-1).flatten()
    assert gradient.log() / torch.arange(1, 31) == pytest.approx([math.log(0.9)] * 30, abs=0.003)
    kept = log10_retention_of(
        lambda lag, g: g * factors[steps - lag],
        batch=1, state_size=size, steps=steps, vectors=2, generator=seeded(),
    )  # fmt: skip
    square = math.log10(p + (1 - p) * f * f) / 2
    assert kept.log10 == pytest.approx([lag * square for lag in range(31)], abs=0.015)
    draws = torch.where(uniform(4000, 8, 1, 1) < p, 1.0, f).double()
    (found,) = spectrum_of(lambda step, q: draws[step] * q, (8, 1), 4000, 0)
    assert found == pytest.approx((1 - p) * math.log(f), abs=0.003)


# lambda_1 at input variance 0, 0.25 and 1, by adaptive quadrature (scipy.integrate.quad).
TABLE = {
    1 / math.sqrt(3): (-0.5493, -0.7456, -0.9582),
    0.9: (-0.1054, -0.3545, -0.5506),
    1.0: (0.0, -0.2725, -0.4595),
    1.5: (0.0652, -0.0167, -0.1418),
    2.0: (0.1547, 0.1204, 0.0460),
    3.0: (0.3102, 0.2989, 0.2685),
    5.0: (0.5324, 0.5291, 0.5196),
}


def mean_field(gain: float, variance: float) -> float:
    """lambda_1 = ln(chi) / 2 of a wide tanh RNN, q the variance of its pre-activations."""
    if variance == 0 and gain <= 1:
        return math.log(gain)
    q = gain**2 + variance
    for _ in range(400):
        q = gain**2 * mean(lambda z, q=q: np.tanh(math.sqrt(q) * z) ** 2) + variance
    return math.log(gain**2 * mean(lambda z: np.cosh(math.sqrt(q) * z) ** -4.0)) / 2


@pytest.mark.parametrize("gain", TABLE)
def test_the_mean_field_table(gain: float) -> None:
    found = [mean_field(gain, variance) for variance in (0.0, 0.25, 1.0)]
    assert found == pytest.approx(TABLE[gain], abs=6e-5)


@pytest.mark.parametrize(
    ("gain", "variance", "within"),
    [(0.5774, 1.0, 0.01), (1.0, 0.25, 0.01), (1.5, 0.0, 0.02), (2.0, 0.25, 0.015),
     (2.0, 1.0, 0.015), (5.0, 0.0, 0.03)],
)  # fmt: skip
def test_the_mean_field_table_by_simulation(gain: float, variance: float, within: float) -> None:
    trajectory = driven(gain, variance, size=300, steps=300, batch=4)
    (leading,) = spectrum(trajectory, 1, 100)
    assert leading == pytest.approx(mean_field(gain, variance), abs=within)


class Tagger(nn.Module):
    """An LSTM whose last step is read; it may go in pieces, or both ways."""

    def __init__(self, keep: float, cut: bool = False, both: bool = False) -> None:
        super().__init__()
        self.cut, width = cut, 32 if both else 16
        self.lstm = nn.LSTM(3, 16, batch_first=True, bidirectional=both)
        self.head = nn.Linear(width, 2)
        with torch.no_grad():
            for name, bias in self.lstm.named_parameters():
                if name.startswith("bias_ih"):
                    bias[16:32], bias[:16] = keep, -keep

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for piece in x.split(10, 1) if self.cut else [x]:
            self.seen, state = self.lstm(piece, state)
            if self.cut:
                state = state[0].detach(), state[1].detach()
        return self.head(self.seen[:, -1])


def audited(model: nn.Module, **options: Any) -> rnnguard.Report:
    batches = [(torch.randn(8, 30, 3), torch.randint(2, (8,))) for _ in range(2)]
    return rnnguard.audit(
        model, data=batches, loss=nn.CrossEntropyLoss(), memory=25, verbose=False, **options
    )


def test_o17_zeros_at_a_fused_output_are_no_verdict() -> None:
    model = Tagger(keep=3.0)
    out = model(torch.randn(8, 30, 3))
    (gradient,) = torch.autograd.grad(out.sum(), model.seen)
    assert float(gradient[:, :-1].abs().max()) == 0.0 < float(gradient[:, -1].abs().max())
    assert audited(model)["lstm"].level == "healthy"
    assert audited(Tagger(keep=-3.0))["lstm"].level == "vanishing"


def test_o17_a_detach_is_truncation_and_not_vanishing() -> None:
    x = torch.randn(8, 30, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(Tagger(keep=3.0, cut=True)(x).sum(), x)
    assert (
        float(gradient[:, :20].abs().max())
        == 0.0
        < float(gradient[:, 20:].abs().amin((0, 2)).min())
    )
    cut, whole = audited(Tagger(keep=3.0, cut=True)), audited(Tagger(keep=3.0))
    assert (cut["lstm"].window, cut["lstm"].level) == (10, "truncated")
    assert (whole["lstm"].window, whole["lstm"].level) == (30, "healthy")
    assert "RG305" in {finding.code for finding in cut.findings}
    assert "RG401" not in {finding.code for finding in cut.findings}


def test_o17_the_last_step_gives_the_reverse_direction_lag_one() -> None:
    """Its gradient ends there; its own memory, and so the level, is that of the module."""
    model, x = Tagger(keep=3.0, both=True), torch.randn(8, 30, 3, requires_grad=True)
    model(x)
    (gradient,) = torch.autograd.grad(model.seen[:, -1, 16:].sum(), x)
    assert float(gradient[:, :-1].abs().max()) == 0.0 < float(gradient[:, -1].abs().max())
    report = audited(model)
    assert report["lstm"].level == "healthy"
    forward, reverse = report["lstm"].layer_readings
    assert reverse.retention[25] == pytest.approx(forward.retention[25], abs=0.5)
    assert "RG201" in {finding.code for finding in report.findings}
