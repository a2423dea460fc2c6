"""Gradient flossing: the exponents' gradient, what the updates reach, and that plans replay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import run_readings, site_readings
from torch import Tensor, nn
from torch.optim import SGD

import rnnguard
from rnnguard import nn as cells
from rnnguard.errors import RefusedError
from rnnguard.inspection.gates import Weights, cell_of, recurrences, weights_of
from rnnguard.probe import lyapunov_exponents
from rnnguard.probe.exponent_gradients import leading_exponents, state_size, stretch
from rnnguard.probe.snapshot import fingerprint, same_bits
from rnnguard.records import Change, Plan
from rnnguard.remedies.gradient_flossing import GRADIENT_FLOSSING, gentler
from rnnguard.rewrite.edit import Edit

# torch says so once per process about its own projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

IN, HIDDEN = 3, 8
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "tanh": nn.RNN,
    "relu": lambda *sizes, **form: nn.RNN(*sizes, nonlinearity="relu", **form),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
SHORT: dict[str, Any] = {"steps": 18, "exponents": 3, "updates": 5, "rate": 0.3, "seed": 3}
every_kind = pytest.mark.parametrize("kind", KINDS)


def built(kind: str, seed: int = 0, **form: Any) -> nn.RNNBase:
    torch.default_generator.manual_seed(seed)
    module = KINDS[kind](IN, HIDDEN, **{"dtype": torch.float64, **form})
    if kind == "relu":
        # Of 8 units at rest so many are off at times that few directions last.
        module.get_parameter("bias_ih_l0").detach().add_(1.0)
    return module


def floss(module: nn.Module, **dose: Any) -> Edit:
    edit = Edit(module, None)
    GRADIENT_FLOSSING.apply(edit, module, {**SHORT, "input_rms": 1.0, **dose})
    return edit


def noise(steps: int = 40, batch: int = 4, features: int = IN, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, batch, features, generator=generator, dtype=torch.float64)


def kept(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, value in module.state_dict().items() if not same_bits(value, before[n])}


def leading(module: nn.RNNBase, count: int = 3) -> dict[tuple[int, str], list[float]]:
    """The exponents of every layer and direction, by the public instrument on inputs of its own."""
    places = len(recurrences(module))
    found = lyapunov_exponents(module, noise(), k=places * 2 * HIDDEN)
    apart = {
        place: [e.value for e in found.entries if (e.layer, e.direction) == place][:count]
        for place in recurrences(module)
    }
    assert all(len(own) == count for own in apart.values())
    return apart  # type: ignore[return-value]


def distance(exponents: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in exponents) / len(exponents))


# --- the exponents and their gradient -----------------------------------------------------


@every_kind
def test_the_exponents_are_those_of_the_public_instrument(kind: str) -> None:
    module, x = built(kind), noise(40)
    weights, cell = weights_of(module, 0, "forward"), cell_of(module)
    assert cell is not None
    own = torch.Generator().manual_seed(5)
    along = stretch(x, state_size(cell, weights), count=3, warmup=15, generator=own)
    mine = leading_exponents(cell, weights, along).detach()
    theirs = lyapunov_exponents(module, x, k=3, warmup=15, seed=5)
    expected = torch.tensor([entry.value for entry in theirs.entries], dtype=torch.float64)
    torch.testing.assert_close(mine.sort(descending=True).values, expected, rtol=1e-10, atol=1e-12)


@every_kind
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    torch.default_generator.manual_seed(0)
    module = KINDS[kind](2, 3, dtype=torch.float64)
    held, cell = weights_of(module, 0, "forward"), cell_of(module)
    assert cell is not None
    with torch.no_grad():
        # No unit of a ReLU may be near its kink, nor off.
        held.hh.mul_(2).add_(0.3 * (kind == "relu"))
        held.ih.mul_(0.1 if kind == "relu" else 1.0)
        assert held.bias_ih is not None
        held.bias_ih.add_(kind == "relu")
    own = torch.Generator().manual_seed(5)
    x = noise(9, 2, 2)
    along = stretch(x, state_size(cell, held), count=3, warmup=2, generator=own)

    def objective(hh: Tensor, bias: Tensor) -> Tensor:
        weights = Weights(held.ih.detach(), hh, bias, held.bias_hh, None)
        return leading_exponents(cell, weights, along).square().mean()

    leaves = [held.hh.detach().clone(), held.bias_ih.detach().clone()]
    assert float(objective(*leaves).detach()) > 1e-4
    assert torch.autograd.gradcheck(objective, [leaf.requires_grad_() for leaf in leaves])


# --- what it reaches ----------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "target"), [(0.5, 0.0), (1.6, 0.0), (0.5, -0.3)])
def test_a_recurrence_at_rest_comes_to_the_spectral_radius_asked_for(
    gain: float, target: float
) -> None:
    """Hardly driven, a tanh RNN is linear, and its exponents are the logs of the eigenvalues."""
    module = built("tanh", bias=False)
    weight = module.get_parameter("weight_hh_l0").detach()
    weight.copy_(gain * torch.linalg.qr(torch.randn(HIDDEN, HIDDEN).double())[0])
    floss(module, input_rms=1e-12, updates=12, exponents=2, target=target)
    radius = float(torch.linalg.eigvals(weight).abs().max())
    assert abs(math.log(radius) - target) < 0.2 * abs(math.log(gain) - target)


@every_kind
def test_the_exponents_come_nearer_to_zero_on_other_inputs(kind: str) -> None:
    module = built(kind)
    (before,) = leading(module, 2).values()
    floss(module, updates=12, exponents=2, rate=0.1 if kind == "relu" else 0.3)
    (after,) = leading(module, 2).values()
    assert distance(after) < 0.5 * distance(before)


def test_every_layer_and_direction_is_flossed_on_what_it_is_fed() -> None:
    module = built("gru", num_layers=2, bidirectional=True)
    before, start = kept(module), leading(module)
    floss(module)
    end = leading(module)
    assert all(distance(end[place]) < 0.5 * distance(start[place]) for place in start)
    assert changed(module, before) == {n for n in before if n.startswith(("weight_hh", "bias_ih"))}


def test_without_biases_the_matrix_alone_is_written() -> None:
    module = built("lstm", bias=False)
    before = kept(module)
    floss(module)
    assert changed(module, before) == {"weight_hh_l0"}


def test_a_cell_is_flossed_like_the_module_of_one_layer() -> None:
    module, cell = built("gru"), nn.GRUCell(IN, HIDDEN, dtype=torch.float64)
    cell.load_state_dict({n.removesuffix("_l0"): v for n, v in module.state_dict().items()})
    floss(module)
    floss(cell)
    assert all(map(same_bits, cell.state_dict().values(), module.state_dict().values()))


@pytest.mark.parametrize(("rate", "off"), [(1e3, 0.0), (0.3, -99.0)], ids=["wild", "all units off"])
def test_what_gets_no_better_stays_bit_for_bit(rate: float, off: float) -> None:
    module = built("relu")
    with torch.no_grad():
        module.get_parameter("bias_ih_l0").add_(off)
    before = kept(module)
    assert floss(module, rate=rate).mark() == 0
    assert changed(module, before) == set()


def test_where_most_units_are_off_the_directions_that_are_left_count() -> None:
    module = built("relu")
    with torch.no_grad():
        module.get_parameter("bias_ih_l0")[2:] -= 99
        module.get_parameter("bias_ih_l0")[:2] += 3
        module.get_parameter("weight_hh_l0")[:2, :2] = torch.eye(2).double() * 0.5
    floss(module, updates=20)
    block = module.get_parameter("weight_hh_l0").detach()[:2, :2]
    assert float(torch.linalg.eigvals(block).abs().max()) > 0.6


# --- how it writes ------------------------------------------------------------------------


def test_the_doses_seed_decides_and_nothing_else() -> None:
    plain = built("tanh", num_layers=2)
    found = []
    for seed in (1, 1, 2):
        module, before = copy.deepcopy(plain), torch.get_rng_state()
        floss(module, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        found.append(module.state_dict())
    first, second, other = found
    assert all(same_bits(first[name], second[name]) for name in first)
    assert not same_bits(first["weight_hh_l0"], other["weight_hh_l0"])


def test_neither_grad_mode_nor_device_nor_autocast_matter() -> None:
    modules = [built("lstm") for _ in range(4)]
    floss(modules[0])
    with torch.no_grad():
        floss(modules[1])
    with torch.device("meta"):
        floss(modules[2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        floss(modules[3])
    first = kept(modules[0])
    assert all(changed(module, first) == set() for module in modules)
    assert all(parameter.grad is None for parameter in modules[0].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_rounded_once_to_the_parameters_own_dtype(dtype: torch.dtype) -> None:
    module = built("gru", dtype=dtype)
    exact = copy.deepcopy(module).double()
    floss(module)
    floss(exact)
    assert changed(module, kept(exact.to(dtype))) == set()


@every_kind
def test_undo_gives_every_bit_back(kind: str) -> None:
    module = built(kind, bidirectional=True)
    before = fingerprint(module)
    edit = floss(module)
    assert fingerprint(module) != before
    edit.undo_()
    assert fingerprint(module) == before


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(IN, HIDDEN, proj_size=4),
        cells.IndRNN(IN, HIDDEN),
        cells.GatedRNN(IN, HIDDEN),
        cells.FusedRNN(IN, HIDDEN, recurrent=cells.SpectralBound),
        nn.GRU(IN, HIDDEN, device="meta"),
    ],
    ids=lambda module: f"{type(module).__name__} {module.weight_hh_l0.device}",
)
def test_what_it_is_not_made_for_is_left_alone(module: nn.Module) -> None:
    assert floss(module).mark() == 0


# --- doses and plans ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "site", "expected"),
    [
        ({}, {"input_rms": 0.123456}, {"input_rms": 0.1235}),
        ({}, {"input_rms": None}, {"input_rms": 1.0}),
        ({"updates": 10, "steps": 30.0}, {}, {"updates": 10, "steps": 30}),
        ({"target": -0.01, "input_rms": 0.0}, {}, {"target": -0.01, "input_rms": 0.0}),
        ({}, {"trained": True}, None),
        ({}, {"cell": "custom"}, None),
        ({}, {"proj_size": 4}, None),
        ({}, {"remade": True}, None),
    ],
)
def test_the_dose_says_all_that_a_replay_needs(
    wanted: dict[str, Any], site: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    usual = {"steps": 55, "exponents": 8, "updates": 40, "rate": 0.1, "target": 0.0, "seed": 5}
    found = GRADIENT_FLOSSING.prescribe(wanted, site_readings(**site), run_readings(seed=5))
    assert found == (None if expected is None else usual | {"input_rms": 1.0} | expected)
    assert found is None or set(found) == set(GRADIENT_FLOSSING.doses)


def test_without_a_site_there_is_no_dose() -> None:
    assert GRADIENT_FLOSSING.prescribe({}, None, run_readings()) is None


def test_a_gentler_dose_stops_half_way() -> None:
    assert gentler(SHORT) == {**SHORT, "updates": 2}
    assert gentler({"updates": 1})["updates"] == 1


def plan(**dose: Any) -> Plan:
    given = {**SHORT, "input_rms": 0.7, **dose}
    change = Change(remedy="gradient_flossing", path="0", tier="values", dose=given)
    return Plan.from_json(Plan(changes=(change,)).to_json())


def test_a_plan_gives_the_same_weights_elsewhere() -> None:
    expected = built("lstm", dtype=torch.float32)
    model = nn.Sequential(copy.deepcopy(expected))
    before = kept(expected)
    floss(expected, input_rms=0.7)
    assert changed(expected, before)
    torch.rand(3)
    report = rnnguard.apply(model, SGD(model.parameters(), 0.1), plan())
    assert [change.outcome for change in report.changes] == ["applied"]
    assert changed(model[0], kept(expected)) == set()
    report.undo()
    assert changed(model[0], before) == set()


def test_trained_weights_stay() -> None:
    model = nn.Sequential(built("gru", dtype=torch.float32))
    optimizer = SGD(model.parameters(), 0.1)
    model(torch.randn(5, 2, IN))[0].sum().backward()
    optimizer.step()
    before = fingerprint(model)
    with pytest.raises(RefusedError, match="RG902"):
        rnnguard.apply(model, optimizer, plan())
    assert fingerprint(model) == before


def test_a_second_time_is_refused_as_for_trained_weights() -> None:
    model = nn.Sequential(built("gru", dtype=torch.float32))
    rnnguard.apply(model, SGD(model.parameters(), 0.1), plan())
    before = fingerprint(model)
    with pytest.raises(RefusedError, match="RG902"):
        rnnguard.apply(model, SGD(model.parameters(), 0.1), plan())
    assert fingerprint(model) == before


def test_a_dose_that_it_does_not_have_is_refused() -> None:
    model = nn.Sequential(built("tanh", dtype=torch.float32))
    with pytest.raises(RefusedError, match="has no dose 'strength'"):
        rnnguard.apply(model, SGD(model.parameters(), 0.1), plan(strength=1))
