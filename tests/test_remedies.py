"""What each remedy writes, where, and how much of it the readings prescribe."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from factories import run_readings, site_readings
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pack_sequence
from torch.optim import SGD, Adam, AdamW

from rnnguard.errors import RefusedError, RulesError
from rnnguard.inspection.gates import is_plain
from rnnguard.nn import OutputNormGRU, OutputNormLSTM, OutputNormRNN
from rnnguard.probe.snapshot import fingerprint, same_bits
from rnnguard.remedies import REMEDIES
from rnnguard.remedies.clip_gradient import clip_settings
from rnnguard.remedies.remedy import Remedy
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.stepguard import GuardSettings, guard_of

# torch says so once per process about its own projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

REMEDY: dict[str, Remedy] = {remedy.name: remedy for remedy in REMEDIES}
IN, HIDDEN, T = 5, 16, 100
BLOCKS = {"tanh": "h", "relu": "h", "lstm": "ifgo", "gru": "rzn"}
KEEP, WRITE = {"lstm": "f", "gru": "z"}, {"lstm": "i"}
SEEDED = ("orthogonal", "chrono_bias", "uniform_gate_bias", "variance_scaling")
KEEP_BIASES = ("chrono_bias", "uniform_gate_bias")
DOSES: dict[str, dict[str, Any]] = {
    "orthogonal": {"gain": 1.0, "seed": 7},
    "chrono_bias": {"t_max": T, "seed": 7},
    "uniform_gate_bias": {"seed": 7},
    "recurrent_gain": {"target": 0.05},
    "critical_gain": {"factor": 1.25},
    "variance_scaling": {"input_rms": 2.0, "seed": 7},
    "layer_norm": {},
}
VALUES = tuple(name for name in DOSES if REMEDY[name].tier == "values")

FUSED: dict[str, Callable[..., nn.Module]] = {
    "tanh": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
CELLS: dict[str, Callable[..., nn.Module]] = {
    "tanh": nn.RNNCell,
    "relu": lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k),
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2},
    "both ways": {"bidirectional": True},
    "deep and both ways": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
}


@dataclass(frozen=True)
class Case:
    """One recurrence: its kind, and how it is built."""

    kind: str
    build: Callable[[], nn.Module]

    @property
    def blocks(self) -> int:
        return len(BLOCKS[self.kind])


def case(kind: str, builders: dict[str, Callable[..., nn.Module]], options: dict[str, Any]) -> Case:
    return Case(kind, lambda: builders[kind](IN, HIDDEN, **options))


CASES: dict[str, Case] = {
    **{f"{kind}, {form}": case(kind, FUSED, FORMS[form]) for kind in FUSED for form in FORMS},
    **{f"{kind} cell": case(kind, CELLS, {}) for kind in CELLS},
    **{f"{kind} cell, without bias": case(kind, CELLS, {"bias": False}) for kind in CELLS},
    "lstm, projected": case("lstm", FUSED, {"proj_size": 6}),
    "lstm, projected, deep and both ways": case(
        "lstm", FUSED, {"proj_size": 6, **FORMS["deep and both ways"]}
    ),
}
GATED = [name for name, case in CASES.items() if case.kind in KEEP and "without" not in name]

every_case = pytest.mark.parametrize("name", CASES)
every_gated = pytest.mark.parametrize("name", GATED)
every_kind = pytest.mark.parametrize("kind", FUSED)


def apply(remedy: str, module: nn.Module, model: nn.Module | None = None, **dose: Any) -> Edit:
    """The remedy at the module of the model, at its usual dose with these changes."""
    edit = Edit(model or module, None)
    REMEDY[remedy].apply(edit, module, {**DOSES[remedy], **dose})
    return edit


def suffixes(module: nn.Module) -> list[str]:
    """What torch's parameter names end with, for every layer and direction."""
    names = [n for n, _ in module.named_parameters() if n.startswith("weight_hh")]
    return [name.removeprefix("weight_hh") for name in names]


def each(module: nn.Module, kind: str) -> Iterator[Tensor]:
    """The parameters of one kind, such as bias_ih, of every layer and direction."""
    for suffix in suffixes(module):
        yield getattr(module, f"{kind}{suffix}").detach()


def gates_of(tensor: Tensor, kind: str) -> dict[str, Tensor]:
    return dict(zip(BLOCKS[kind], tensor.chunk(len(BLOCKS[kind])), strict=True))


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, value in module.state_dict().items() if not same_bits(value, before[n])}


def kept(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def radius(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix.double()).abs().max())


# --- what is touched ---------------------------------------------------------------------


def touched(remedy: str, kind: str, names: set[str]) -> set[str]:
    """The parameters that a remedy of the values concerns."""
    starts = {
        "orthogonal": ("weight_hh",) if kind in KEEP else ("weight_hh", "bias"),
        "recurrent_gain": ("weight_hh",),
        "critical_gain": ("weight_hh",),
        "variance_scaling": ("weight_ih",),
    }.get(remedy, ("bias",) if kind in KEEP else ())
    return {name for name in names if name.startswith(starts)}


@every_case
@pytest.mark.parametrize("remedy", VALUES)
def test_writes_what_it_concerns_and_nothing_else(name: str, remedy: str) -> None:
    module = CASES[name].build()
    before, objects = kept(module), dict(module.named_parameters())
    edit = apply(remedy, module)
    expected = touched(remedy, CASES[name].kind, set(before))
    assert changed(module, before) == expected
    assert (edit.mark() > 0) == bool(expected)
    assert dict(module.named_parameters()).keys() == objects.keys()
    assert all(p is objects[n] for n, p in module.named_parameters())
    assert is_plain(module)


@pytest.mark.parametrize(
    "name", ["lstm, deep and both ways", "gru, deep", "tanh, plain", "gru cell"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("remedy", VALUES)
def test_writes_in_the_parameters_own_dtype(name: str, dtype: torch.dtype, remedy: str) -> None:
    exact = CASES[name].build().double()
    module = copy.deepcopy(exact).to(dtype)
    before = kept(module)
    apply(remedy, exact)
    apply(remedy, module)
    assert changed(module, before) == touched(remedy, CASES[name].kind, set(before))
    for (path, value), wanted in zip(
        module.state_dict().items(), exact.state_dict().values(), strict=True
    ):
        assert value.dtype == dtype
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-12
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance, msg=path)


@every_case
@pytest.mark.parametrize("remedy", DOSES)
def test_undo_gives_every_bit_back(name: str, remedy: str) -> None:
    module = CASES[name].build()
    optimizer = Adam(module.named_parameters())
    before = fingerprint(module, optimizer)
    edit = Edit(module, optimizer)
    REMEDY[remedy].apply(edit, module, DOSES[remedy])
    assert (fingerprint(module, optimizer) != before) == (edit.mark() > 0)
    edit.undo_()
    assert fingerprint(module, optimizer) == before


@every_kind
@pytest.mark.parametrize("remedy", SEEDED)
def test_the_doses_seed_decides_and_no_global_one(kind: str, remedy: str) -> None:
    def written(seed: int) -> dict[str, Tensor]:
        module = copy.deepcopy(plain)
        before = torch.get_rng_state()
        apply(remedy, module, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        return module.state_dict()

    plain = FUSED[kind](IN, HIDDEN, num_layers=2)
    first, second, other = written(1), written(1), written(2)
    assert all(same_bits(first[name], second[name]) for name in first)
    concerned = touched(remedy, kind, set(first)) - {n for n in first if not bool(first[n].any())}
    assert bool(concerned) == (kind in KEEP or remedy not in KEEP_BIASES)
    assert all(not torch.equal(first[name], other[name]) for name in concerned)


@pytest.mark.parametrize("remedy", SEEDED)
def test_every_layer_and_direction_has_draws_of_its_own(remedy: str) -> None:
    module = nn.LSTM(2 * HIDDEN, HIDDEN, num_layers=2, bidirectional=True)
    apply(remedy, module, input_rms=1.0)
    kind = next(k for k in ("weight_hh", "weight_ih", "bias_ih") if k in touched_kinds(remedy))
    drawn = list(each(module, kind))
    assert len(drawn) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def touched_kinds(remedy: str) -> set[str]:
    return touched(remedy, "lstm", {"weight_hh", "weight_ih", "bias_ih"})


# --- orthogonal --------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("gain", [1.0, 0.5, 3.0])
def test_every_gates_block_is_orthogonal(name: str, gain: float) -> None:
    module = CASES[name].build()
    apply("orthogonal", module, gain=gain)
    for matrix in each(module, "weight_hh"):
        blocks = matrix.double().chunk(CASES[name].blocks)
        for block in blocks:
            gram = block.T @ block / gain**2
            torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-6)
        assert all(not torch.equal(a, b) for i, a in enumerate(blocks) for b in blocks[:i])


@every_case
def test_orthogonal_silences_the_biases_of_a_plain_rnn_only(name: str) -> None:
    module, kind = CASES[name].build(), CASES[name].kind
    before = kept(module)
    apply("orthogonal", module)
    for path, value in module.state_dict().items():
        if path.startswith("bias"):
            wanted = before[path] if kind in KEEP else torch.zeros_like(value)
            assert torch.equal(value, wanted)


def test_orthogonal_in_half_precision_is_rounded_once() -> None:
    module = nn.GRU(IN, HIDDEN, dtype=torch.bfloat16)
    exact = nn.GRU(IN, HIDDEN, dtype=torch.float64)
    apply("orthogonal", module)
    apply("orthogonal", exact)
    assert torch.equal(module.weight_hh_l0, exact.weight_hh_l0.bfloat16())


# --- keep biases -------------------------------------------------------------------------


def keep_biases(module: nn.Module, kind: str) -> Iterator[Tensor]:
    for bias in each(module, "bias_ih"):
        yield gates_of(bias, kind)[KEEP[kind]].double()


def assert_one_in_each_part(shares: Tensor) -> None:
    """Of n values in 0..1 one lies in each n-th part, up to rounding."""
    middles = (torch.arange(len(shares)) + 0.5) / len(shares)
    assert float((shares.sort().values - middles).abs().max() * len(shares)) <= 0.5 + 1e-3


@every_gated
@pytest.mark.parametrize("remedy", KEEP_BIASES)
def test_the_whole_dose_lies_in_bias_ih(name: str, remedy: str) -> None:
    module, kind = CASES[name].build(), CASES[name].kind
    apply(remedy, module)
    for bias in each(module, "bias_hh"):
        assert not bool(bias.any())
    for bias in each(module, "bias_ih"):
        gates = gates_of(bias, kind)
        keep = gates.pop(KEEP[kind])
        assert bool((keep != 0).all())
        if kind in WRITE:
            assert torch.equal(gates.pop(WRITE[kind]), -keep)
        assert gates and all(not bool(gate.any()) for gate in gates.values())


@every_gated
@pytest.mark.parametrize("t_max", [3, 50, 1000])
def test_chrono_spreads_the_time_scales_up_to_the_memory(name: str, t_max: int) -> None:
    module = CASES[name].build()
    apply("chrono_bias", module, t_max=t_max)
    for keep in keep_biases(module, CASES[name].kind):
        assert float(keep.min()) >= 0
        assert float(keep.max()) <= math.log(t_max - 1) + 1e-6
        assert_one_in_each_part((keep.exp() - 1) / (t_max - 2))


@every_gated
def test_uniform_gates_lie_evenly_between_their_edges(name: str) -> None:
    module = CASES[name].build()
    apply("uniform_gate_bias", module)
    for keep in keep_biases(module, CASES[name].kind):
        open_ = keep.sigmoid()
        assert float(open_.min()) >= 1 / HIDDEN - 1e-6
        assert float(open_.max()) <= 1 - 1 / HIDDEN + 1e-6
        assert_one_in_each_part((open_ - 1 / HIDDEN) / (1 - 2 / HIDDEN))


@pytest.mark.parametrize("hidden", [1, 2, 3])
def test_uniform_gates_of_very_few_units_are_finite(hidden: int) -> None:
    module = nn.LSTM(IN, hidden)
    apply("uniform_gate_bias", module)
    keep = next(keep_biases(module, "lstm"))
    assert bool(keep.isfinite().all())
    assert bool((keep.sigmoid() > 0.3).all() and (keep.sigmoid() < 0.7).all())


def left_of(module: nn.Module, kind: str, steps: int) -> Tensor:
    """What a state of ones still changes after silent steps, unit by unit."""
    x, zero = torch.zeros(steps, 1, IN, dtype=torch.float64), torch.zeros(1, 1, HIDDEN).double()

    def last(state: Tensor) -> Tensor:
        found = module(x, (zero, state) if kind == "lstm" else state)[1]
        return (found[1] if kind == "lstm" else found)[0, 0].detach()

    return last(zero + 1) - last(zero)


@pytest.mark.parametrize("remedy", KEEP_BIASES)
@pytest.mark.parametrize("kind", KEEP)
def test_the_forward_keeps_as_much_as_the_bias_says(kind: str, remedy: str) -> None:
    """With no weights the candidate is 0, and the state falls by the keep gate alone."""
    module = FUSED[kind](IN, HIDDEN).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert left_of(module, kind, 20).tolist() == pytest.approx([0.5**20] * HIDDEN)
    apply(remedy, module)
    (keep,) = keep_biases(module, kind)
    torch.testing.assert_close(left_of(module, kind, 20), keep.sigmoid() ** 20)


@pytest.mark.parametrize("kind", KEEP)
def test_chrono_keeps_on_torchs_own_weights(kind: str) -> None:
    module = FUSED[kind](IN, HIDDEN).double()
    before = float(left_of(module, kind, 50).abs().mean())
    apply("chrono_bias", module)
    assert float(left_of(module, kind, 50).abs().mean()) > max(0.1, 5 * before)


# --- gains -------------------------------------------------------------------------------


def with_gains(module: nn.Module, blocks: int, *gains: float) -> nn.Module:
    """Recurrent blocks that are scaled one by one to these spectral radii, in turn."""
    for suffix in suffixes(module):
        hh, hr = getattr(module, f"weight_hh{suffix}"), getattr(module, f"weight_hr{suffix}", None)
        with torch.no_grad():
            for index, block in enumerate(hh.chunk(blocks)):
                block.normal_()
                square = block if hr is None else hr @ block
                block.mul_(gains[index % len(gains)] / radius(square))
    return module


@every_case
@pytest.mark.parametrize("target", [1.0, 0.577])
def test_recurrent_gain_bounds_the_radius_of_every_block(name: str, target: float) -> None:
    blocks = CASES[name].blocks
    module = with_gains(CASES[name].build(), blocks, 3.0, 0.3, 1.5)
    before = list(each(copy.deepcopy(module), "weight_hh"))
    apply("recurrent_gain", module, target=target)
    after = list(each(module, "weight_hh"))
    projections = list(each(module, "weight_hr")) if "projected" in name else [None] * len(after)
    for old, new, projection in zip(before, after, projections, strict=True):
        for index, (was, now) in enumerate(zip(old.chunk(blocks), new.chunk(blocks), strict=True)):
            if index % 3 == 1:
                assert same_bits(was, now)
                continue
            square = now if projection is None else projection @ now
            assert radius(square) == pytest.approx(target, rel=1e-5)
            torch.testing.assert_close(now, was * target / [3.0, 0.3, 1.5][index % 3])


def test_recurrent_gain_within_its_target_writes_nothing() -> None:
    module = with_gains(nn.LSTM(IN, HIDDEN, num_layers=2), 4, 0.9)
    assert apply("recurrent_gain", module, target=1.0).mark() == 0
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    assert apply("recurrent_gain", module, target=1.0).mark() == 0


def test_recurrent_gain_in_half_precision_is_within_rounding() -> None:
    module = with_gains(nn.GRU(IN, HIDDEN), 3, 4.0).to(torch.bfloat16)
    apply("recurrent_gain", module, target=1.0)
    for block in module.weight_hh_l0.detach().chunk(3):
        assert radius(block) == pytest.approx(1.0, rel=0.02)


@every_case
def test_critical_gain_scales_every_layer_alike(name: str) -> None:
    module = CASES[name].build()
    before = list(each(copy.deepcopy(module), "weight_hh"))
    apply("critical_gain", module, factor=1.25)
    for old, new in zip(before, each(module, "weight_hh"), strict=True):
        assert torch.equal(new, old * 1.25)


# --- input weights -----------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("rms", [1.0, 40.0])
def test_variance_scaling_fits_each_gate_and_the_first_layers_input(name: str, rms: float) -> None:
    module, kind = CASES[name].build(), CASES[name].kind
    apply("variance_scaling", module, input_rms=rms)
    for suffix, matrix in zip(suffixes(module), each(module, "weight_ih"), strict=True):
        fan_in = matrix.shape[1]
        bound = math.sqrt(6 / fan_in) if kind == "relu" else math.sqrt(6 / (fan_in + HIDDEN))
        bound /= 1.0 if suffix.startswith("_l1") else rms
        for gate in matrix.chunk(CASES[name].blocks):
            largest = float(gate.abs().max())
            assert 0.9 * bound < largest <= bound * (1 + 1e-6)
            uniform = bound / math.sqrt(3)
            assert float(gate.square().mean().sqrt()) == pytest.approx(uniform, rel=0.2)
            assert abs(float(gate.mean())) < 0.3 * bound


# --- layer norm --------------------------------------------------------------------------


class Reader(nn.Module):
    """A recurrence and a head that reads its last step; the loss of training needs no more."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": rnn})
        self.head = nn.Linear(int(rnn.hidden_size), 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.encoder["rnn"](x)[0][-1])
        return output


NORMS = {"tanh": OutputNormRNN, "relu": OutputNormRNN, "lstm": OutputNormLSTM, "gru": OutputNormGRU}
FUSED_CASES = [name for name in CASES if "cell" not in name]


def norm_is_of_this_output(module: nn.Module, plain: nn.Module, x: Any) -> None:
    output, state = module(x)
    wanted, plain_state = plain(x)
    values, rows = getattr(output, "data", output), getattr(wanted, "data", wanted)
    assert torch.equal(values, layer_norm(rows, rows.shape[-1:], eps=1e-3))
    states = state if isinstance(state, tuple) else (state,)
    others = plain_state if isinstance(plain_state, tuple) else (plain_state,)
    assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))


@pytest.mark.parametrize("name", FUSED_CASES)
def test_layer_norm_morphs_in_place(name: str) -> None:
    module = CASES[name].build()
    plain, objects = copy.deepcopy(module), dict(module.named_parameters())
    apply("layer_norm", module)
    assert type(module) is NORMS[CASES[name].kind]
    added = ["output_norm.weight", "output_norm.bias"]
    assert list(module.state_dict()) == [*plain.state_dict(), *added]
    assert all(module.get_parameter(n) is p for n, p in objects.items())
    sequences = [torch.randn(length, IN) for length in (3, 6, 2)]
    norm_is_of_this_output(module, plain, pack_sequence(sequences, enforce_sorted=False))
    norm_is_of_this_output(module, plain, torch.randn(6, 3, IN))
    norm_is_of_this_output(module, plain, sequences[1])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_norm_has_the_recurrences_dtype_and_mode(kind: str, dtype: torch.dtype) -> None:
    module = FUSED[kind](IN, HIDDEN).to(dtype).eval()
    plain = copy.deepcopy(module)
    apply("layer_norm", module)
    assert not module.output_norm.training
    assert {value.dtype for value in module.state_dict().values()} == {dtype}
    norm_is_of_this_output(module, plain, torch.randn(6, 3, IN, dtype=dtype))


@every_kind
def test_layer_norm_leaves_cells_and_classes_of_the_users_own_alone(kind: str) -> None:
    class Own(type(FUSED[kind](IN, HIDDEN))):  # type: ignore[misc]
        pass

    for module in (CELLS[kind](IN, HIDDEN), Own(IN, HIDDEN)):
        before = fingerprint(module)
        assert apply("layer_norm", module).mark() == 0
        assert fingerprint(module) == before


def test_layer_norm_twice_is_once() -> None:
    module = nn.LSTM(IN, HIDDEN)
    apply("layer_norm", module)
    before = fingerprint(module)
    assert apply("layer_norm", module).mark() == 0
    assert fingerprint(module) == before


@pytest.mark.parametrize("named", [False, True])
def test_the_norm_joins_the_group_of_its_recurrence(named: bool) -> None:
    model = Reader(nn.LSTM(IN, HIDDEN))
    head, rnn = (
        [(name, p) for name, p in model.named_parameters() if name.startswith(path)]
        for path in ("head", "encoder")
    )
    parts = [head, rnn] if named else [[p for _, p in part] for part in (head, rnn)]
    optimizer = SGD([{"params": parts[0], "lr": 0.5}, {"params": parts[1]}], 0.25)
    lists = [group["params"] for group in optimizer.param_groups]
    sizes = [len(params) for params in lists]
    module = model.encoder["rnn"]
    REMEDY["layer_norm"].apply(Edit(model, optimizer), module, {})
    assert [group["params"] for group in optimizer.param_groups] == lists
    assert [len(params) for params in lists] == [sizes[0], sizes[1] + 2]
    assert lists[1][-2] is module.output_norm.weight and lists[1][-1] is module.output_norm.bias
    if named:
        names = optimizer.param_groups[1]["param_names"]
        assert names[-2:] == ["encoder.rnn.output_norm.weight", "encoder.rnn.output_norm.bias"]
        assert names == [name for name, _ in model.named_parameters() if "head" not in name]
    before = kept(module.output_norm)
    model(torch.randn(6, 3, IN)).square().sum().backward()
    optimizer.step()
    assert changed(module.output_norm, before) == {"weight", "bias"}


def test_the_norm_of_the_root_has_no_prefix() -> None:
    model = nn.GRU(IN, HIDDEN)
    optimizer = Adam(model.named_parameters())
    REMEDY["layer_norm"].apply(Edit(model, optimizer), model, {})
    names = optimizer.param_groups[0]["param_names"]
    assert names == [name for name, _ in model.named_parameters()]
    assert names[-2:] == ["output_norm.weight", "output_norm.bias"]


@pytest.mark.parametrize("held", [False, True])
def test_the_norm_of_a_frozen_recurrence_is_frozen(held: bool) -> None:
    model = Reader(nn.GRU(IN, HIDDEN))
    module = model.encoder["rnn"].requires_grad_(False)
    optimizer = SGD((model if held else model.head).parameters(), 0.1)
    count = len(optimizer.param_groups[0]["params"])
    REMEDY["layer_norm"].apply(Edit(model, optimizer), module, {})
    assert not any(p.requires_grad for p in module.parameters())
    assert len(optimizer.param_groups[0]["params"]) == count + (2 if held else 0)
    before = kept(model)
    model(torch.randn(6, 3, IN)).square().sum().backward()
    optimizer.step()
    assert changed(model, before) == {"head.weight", "head.bias"}


def test_the_norm_of_a_half_frozen_recurrence_trains_with_the_other_half() -> None:
    module = nn.LSTM(IN, HIDDEN)
    module.weight_ih_l0.requires_grad_(False)
    optimizer = SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    REMEDY["layer_norm"].apply(Edit(module, optimizer), module, {})
    held = optimizer.param_groups[0]["params"]
    assert [p is q for p, q in zip(held[-2:], module.output_norm.parameters(), strict=True)] == [
        True,
        True,
    ]
    assert module.output_norm.weight.requires_grad


@every_kind
def test_a_normed_model_can_be_copied_and_saved(kind: str) -> None:
    model = Reader(FUSED[kind](IN, HIDDEN))
    apply("layer_norm", model.encoder["rnn"], model)
    x = torch.randn(6, 3, IN)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert type(other.encoder["rnn"]) is NORMS[kind]
        assert other.encoder["rnn"] is not model.encoder["rnn"]
        assert torch.equal(other(x), model(x))
        with torch.no_grad():
            other.encoder["rnn"].output_norm.weight.zero_()
        assert not torch.equal(other(x), model(x))


# --- the optimizer -----------------------------------------------------------------------


def test_amsgrad_is_switched_on_in_place() -> None:
    model = nn.GRU(IN, HIDDEN)
    optimizer = Adam(model.parameters())
    groups = list(map(id, optimizer.param_groups))
    edit = Edit(model, optimizer)
    REMEDY["amsgrad"].apply(edit, model, {})
    assert type(optimizer) is Adam and list(map(id, optimizer.param_groups)) == groups
    assert all(group["amsgrad"] for group in optimizer.param_groups)
    model(torch.randn(6, 3, IN))[0].sum().backward()
    optimizer.step()
    assert all("max_exp_avg_sq" in state for state in optimizer.state.values())


def test_amsgrad_has_nothing_to_say_to_sgd() -> None:
    model = nn.GRU(IN, HIDDEN)
    optimizer = SGD(model.parameters(), 0.1)
    before = fingerprint(model, optimizer)
    REMEDY["amsgrad"].apply(Edit(model, optimizer), model, {})
    assert fingerprint(model, optimizer) == before


def test_adamw_decays_apart_from_the_gradient_on_the_same_object() -> None:
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    optimizer = Adam(model.parameters(), 0.1, weight_decay=0.3)
    wanted = AdamW(twin.parameters(), 0.1, weight_decay=0.3)
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    identity, group = id(optimizer), optimizer.param_groups[0]
    REMEDY["adamw"].apply(Edit(model, optimizer), model, {})
    assert type(optimizer) is AdamW and id(optimizer) == identity
    assert optimizer.param_groups[0] is group
    changed_options = {k for k, v in group.items() if k != "params" and options.get(k) != v}
    assert changed_options == {"decoupled_weight_decay"}
    for net, opt in ((model, optimizer), (twin, wanted)):
        net(torch.ones(4, 3)).square().sum().backward()
        opt.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1), lambda p: Adam(p)])
def test_step_remedies_share_one_guard_and_write_no_value(make: Callable[..., Any]) -> None:
    model = nn.GRU(IN, HIDDEN)
    optimizer = make(model.parameters())
    before, kind = kept(model), type(optimizer)
    edit = Edit(model, optimizer)
    doses: dict[str, dict[str, Any]] = {
        "clip_gradient": {"max_norm": 3.0},
        "nonfinite_guard": {"on_nonfinite": "skip"},
        "warmup_cosine": {"warmup": 4, "total_steps": 40},
    }
    for name, dose in doses.items():
        REMEDY[name].apply(edit, model, dose)
    guard = guard_of(optimizer)
    assert guard is not None
    assert (guard.settings.max_norm, guard.settings.on_nonfinite) == (3.0, "skip")
    assert (guard.settings.warmup, guard.settings.total_steps) == (4, 40)
    assert changed(model, before) == set() and type(optimizer) is kind
    edit.undo_()
    assert guard_of(optimizer) is None


# --- doses -------------------------------------------------------------------------------


def prescribed(remedy: str, wanted: dict[str, Any], site: Any = None, **run: Any) -> Any:
    return REMEDY[remedy].prescribe(wanted, site, run_readings(**run))


@pytest.mark.parametrize(
    ("wanted", "run", "expected"),
    [
        ({"factor": 5.0, "least": 5.0}, {"grad_norm": 2.0}, 10.0),
        ({"factor": 5.0, "least": 5.0}, {"grad_norm": 0.4}, 5.0),
        ({"factor": 0.5}, {"grad_norm": 8.0}, 4.0),
        ({}, {"grad_norm": 3.14159}, 3.14),
        ({}, {"grad_norm": 0.0}, 1.0),
        ({"factor": 5.0, "least": 2.0}, {"grad_norm": 7.0, "nonfinite": True}, 2.0),
        ({"factor": 5.0, "least": 2.0}, {"grad_norm": math.inf}, 2.0),
        ({"factor": 5.0, "least": 2.0}, {"grad_norm": math.nan}, 2.0),
    ],
)
def test_the_clip_rests_on_the_measured_norm(
    wanted: dict[str, Any], run: dict[str, Any], expected: float
) -> None:
    assert prescribed("clip_gradient", wanted, **run) == {"max_norm": expected}


@pytest.mark.parametrize(
    ("wanted", "run", "expected"),
    [
        ({"by": "group", "factor": 5.0}, {}, {"by": "group", "max_norm": 10.0}),
        ({"by": "value", "max_value": 0.5, "factor": 5.0}, {}, {"by": "value", "max_value": 0.5}),
        ({"by": "percentile"}, {}, {"by": "percentile"}),
        (
            {"by": "percentile", "percentile": 90.0, "window": 200, "factor": 5.0},
            {},
            {"by": "percentile", "percentile": 90.0, "window": 200, "max_norm": 10.0},
        ),
        ({"by": "z_score", "factor": 5.0}, {"grad_norm": math.nan}, {"by": "z_score"}),
    ],
)
def test_the_row_chooses_the_form_of_the_clip(
    wanted: dict[str, Any], run: dict[str, Any], expected: dict[str, Any]
) -> None:
    dose = prescribed("clip_gradient", wanted, **run)
    assert dose == expected
    settings = clip_settings(dose)
    assert settings.clip == wanted["by"]
    assert {key: getattr(settings, key) for key in expected if key != "by"} == {
        key: value for key, value in expected.items() if key != "by"
    }


def test_a_form_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(RulesError, match=r"'percentil'; did you mean 'percentile'\? \(RG914\)"):
        prescribed("clip_gradient", {"by": "percentil"})
    with pytest.raises(RulesError, match="names no `max_value`"):
        prescribed("clip_gradient", {"by": "value"})
    with pytest.raises(RefusedError, match="RG914"):
        clip_settings({"by": "percentil"})
    with pytest.raises(RefusedError, match="Give max_norm"):
        clip_settings({})


def test_the_clip_of_an_older_plan_is_by_norm() -> None:
    assert clip_settings({"max_norm": 5.0}) == GuardSettings(max_norm=5.0)


def test_the_row_may_choose_the_budget_of_broken_steps() -> None:
    dose = prescribed("nonfinite_guard", {"budget": 3})
    assert dose == {"on_nonfinite": "skip", "budget": 3}
    model = nn.GRU(IN, HIDDEN)
    optimizer = SGD(model.parameters(), 0.1)
    REMEDY["nonfinite_guard"].apply(Edit(model, optimizer), model, dose)
    assert guard_of(optimizer).settings.budget == 3


BLIND = {"at_least": 20}
UNKNOWN = {"total_steps": None, "batches_per_epoch": None}


@pytest.mark.parametrize(
    ("wanted", "run", "expected"),
    [
        ({}, {"total_steps": 1000}, None),
        ({}, {"total_steps": None, "batches_per_epoch": 5000}, None),
        ({}, UNKNOWN, None),
        (BLIND, {"total_steps": 1000}, (100, 1000)),
        (BLIND, {"total_steps": 1_000_000}, (2000, 1_000_000)),
        (BLIND, {"total_steps": 10}, (20, 10)),
        (BLIND, {"total_steps": 1000, "scheduled": True}, (100, None)),
        (BLIND, {"total_steps": 1000, "batches_per_epoch": 50}, (100, 1000)),
        (BLIND, UNKNOWN, (20, None)),
        (BLIND, {**UNKNOWN, "scheduled": True}, (20, None)),
        (BLIND, {**UNKNOWN, "batches_per_epoch": 5000}, (500, None)),
        (BLIND, {**UNKNOWN, "batches_per_epoch": 50}, (20, None)),
        (BLIND, {**UNKNOWN, "batches_per_epoch": 50_000}, (2000, None)),
    ],
)
def test_a_warm_up_that_is_asked_for_is_a_tenth_of_what_is_known_of_the_run(
    wanted: dict[str, Any], run: dict[str, Any], expected: tuple[int, int | None] | None
) -> None:
    dose = expected and {"warmup": expected[0], "total_steps": expected[1]}
    assert prescribed("warmup_cosine", wanted, **run) == dose


@pytest.mark.parametrize(
    ("wanted", "run", "expected"),
    [
        ({"peak": 4.0}, {}, (10, 1000, 4.0)),
        ({"peak": 4.0}, {"total_steps": 30}, (10, 30, 4.0)),
        ({"peak": 25.5}, {"total_steps": 30}, (26, 30, 25.5)),
        ({"peak": 4.0}, UNKNOWN, (10, None, 4.0)),
        ({"peak": 4.0, "at_least": 20}, UNKNOWN, (20, None, 4.0)),
        ({"peak": 4.0}, {**UNKNOWN, "batches_per_epoch": 500}, (10, None, 4.0)),
        ({"peak": 0.3}, UNKNOWN, (0, None, 0.3)),
        ({"peak": 0.3}, {}, (0, 1000, 0.3)),
        ({"peak": 1.0}, {}, None),
        ({"peak": 1.0}, UNKNOWN, None),
        ({"peak": 4.0}, {"scheduled": True}, None),
        ({"peak": 4.0}, {**UNKNOWN, "scheduled": True}, None),
        ({"peak": 4.0, "at_least": 20}, {**UNKNOWN, "scheduled": True}, (20, None)),
    ],
)
def test_a_peak_is_warmed_up_to_unless_the_user_has_a_schedule(
    wanted: dict[str, Any], run: dict[str, Any], expected: tuple[Any, ...] | None
) -> None:
    names = ("warmup", "total_steps", "peak")
    dose = expected and dict(zip(names, expected, strict=False))
    assert prescribed("warmup_cosine", wanted, **run) == dose


@pytest.mark.parametrize(("extra", "peak"), [({}, 1.0), ({"peak": 4.0}, 4.0)])
def test_the_peak_reaches_the_guard_and_goes_with_it(extra: dict[str, Any], peak: float) -> None:
    model = nn.GRU(IN, HIDDEN)
    optimizer = Adam(model.parameters())
    before, edit = fingerprint(model, optimizer), Edit(model, optimizer)
    clip = GuardSettings(max_norm=1.0)
    edit.hook_(clip)
    mark = edit.mark()
    dose = {"warmup": 4, "total_steps": 40, **extra}
    REMEDY["warmup_cosine"].apply(edit, model, dose)
    guard = guard_of(optimizer)
    assert guard is not None
    assert guard.settings == GuardSettings(max_norm=1.0, warmup=4, total_steps=40, peak=peak)
    edit.rollback_(mark)
    assert guard.settings == clip
    edit.undo_()
    assert fingerprint(model, optimizer) == before


@pytest.mark.parametrize(
    ("device", "policy"), [("cpu", "skip"), ("cuda", "propagate"), ("mps", "propagate")]
)
def test_a_skip_would_make_a_gpu_wait(device: str, policy: str) -> None:
    assert prescribed("nonfinite_guard", {}, device=device) == {"on_nonfinite": policy}


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ({"decay_per_step": 0.5}, 1.625),
        ({"decay_per_step": 1.0}, 1.0),
        ({"decay_per_step": 0.01}, 2.0),
        ({"decay_per_step": 1.5}, 0.7529),
        ({"decay_per_step": 100.0}, 0.5),
        ({"decay_per_step": 0.0}, None),
        ({"decay_per_step": math.nan}, None),
    ],
)
def test_the_critical_gain_goes_most_of_the_way(
    site: dict[str, Any], expected: float | None
) -> None:
    dose = None if expected is None else {"factor": expected}
    assert prescribed("critical_gain", {}, site_readings(**site)) == dose


@pytest.mark.parametrize(
    ("wanted", "site", "expected"),
    [
        ({"t_max": 60}, {}, {"t_max": 60, "seed": 5}),
        ({"t_max": 60.9}, {}, {"t_max": 60, "seed": 5}),
        ({"t_max": 3}, {}, {"t_max": 3, "seed": 5}),
        ({"t_max": 2}, {}, None),
        ({"t_max": None}, {}, None),
        ({}, {}, None),
        ({"t_max": 60}, {"bias": False}, None),
    ],
)
def test_chrono_needs_a_bias_and_a_memory(
    wanted: dict[str, Any], site: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert prescribed("chrono_bias", wanted, site_readings(**site), seed=5) == expected


def test_without_a_bias_no_gate_is_spread() -> None:
    assert prescribed("uniform_gate_bias", {}, site_readings(bias=False)) is None
    assert prescribed("uniform_gate_bias", {}, site_readings(), seed=5) == {"seed": 5}


@pytest.mark.parametrize(("measured", "divisor"), [(0.01, 1.0), (1.0, 1.0), (30.0, 30.0)])
def test_faint_inputs_are_not_magnified(measured: float, divisor: float) -> None:
    site = site_readings(input_rms=measured)
    expected = {"input_rms": divisor, "seed": 5}
    assert prescribed("variance_scaling", {}, site, seed=5) == expected


def test_the_seed_joins_what_the_scenario_asks_for() -> None:
    wanted = {"gain": 0.9}
    assert prescribed("orthogonal", wanted, site_readings(), seed=5) == {"gain": 0.9, "seed": 5}
    assert wanted == {"gain": 0.9}


@pytest.mark.parametrize(
    "remedy", ["chrono_bias", "uniform_gate_bias", "critical_gain", "variance_scaling"]
)
def test_what_rests_on_a_site_has_no_dose_without_one(remedy: str) -> None:
    assert prescribed(remedy, {"t_max": 60}) is None
