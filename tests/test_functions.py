"""The public measuring functions: every form of module and input, refusals, memory, no trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import first_layer, only_site, zeroed
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import rnnguard
from rnnguard import RefusedError
from rnnguard.probe import lyapunov_exponents, retention
from rnnguard.probe.exponents import exponents
from rnnguard.probe.readings import Memory, measure_site
from rnnguard.probe.results import Exponents, Retention
from rnnguard.probe.retention_curve import log10_retention
from rnnguard.probe.snapshot import fingerprint
from rnnguard.probe.trajectory import MemoryWarning

T, B, F, H = 40, 5, 3, 6
MODULES: dict[str, Callable[..., nn.Module]] = {
    "rnn": lambda **o: nn.RNN(F, H, **o),
    "relu": lambda **o: nn.RNN(F, H, nonlinearity="relu", **o),
    "gru": lambda **o: nn.GRU(F, H, **o),
    "lstm": lambda **o: nn.LSTM(F, H, **o),
    "projected": lambda **o: nn.LSTM(F, H, proj_size=2, **o),
}
CELLS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "rnn": (nn.RNNCell, nn.RNN),
    "gru": (nn.GRUCell, nn.GRU),
    "lstm": (nn.LSTMCell, nn.LSTM),
}
every_module = pytest.mark.parametrize("name", MODULES)
both = pytest.mark.parametrize("measure", [lyapunov_exponents, retention])


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def module_of(name: str, **options: Any) -> nn.Module:
    return MODULES[name](dtype=torch.float64, **options)


def figures(module: nn.Module, inputs: Any, **options: Any) -> list[float]:
    """All figures of both functions in one list, to compare."""
    found = lyapunov_exponents(module, inputs, warmup=5, **options)
    kept = retention(module, inputs, **options)
    return [*found.values, *(entry.stderr for entry in found), *kept.log10, *kept.stderr]


@every_module
def test_one_layer_is_its_trajectory(name: str) -> None:
    module, x = module_of(name), real(T, B, F)
    trajectory = first_layer(module, x)
    generator = torch.Generator().manual_seed(3)
    expected = exponents(trajectory, count=4, generator=generator, warmup=7)
    found = lyapunov_exponents(module, x, k=4, warmup=7, seed=3)
    assert found.values == pytest.approx([e.value for e in expected], abs=1e-12)
    assert [e.interval for e in found] == [e.interval for e in expected]
    assert found.leading == found[0] and len(found) == 4
    assert (found.steps, found.sequences, found.warmup, found.notes) == (T, B, 7, ())
    curve = log10_retention(trajectory, vectors=8, generator=generator.manual_seed(3))
    kept = retention(module, x, seed=3)
    assert (kept.log10, kept.stderr, kept.interval) == (curve.log10, curve.stderr, curve.interval)
    assert kept.lags == tuple(range(T + 1))


@every_module
def test_layers_and_directions_are_united(name: str) -> None:
    module, x = module_of(name, num_layers=2, bidirectional=True), real(T, B, F)
    found = lyapunov_exponents(module, x, k=100, warmup=5)
    size = 8 if name == "projected" else 2 * H if name == "lstm" else H
    assert len(found) == 4 * size
    assert list(found.values) == sorted(found.values, reverse=True)
    places = [(entry.layer, entry.direction) for entry in found]
    assert {place: places.count(place) for place in places} == dict.fromkeys(
        [(0, "forward"), (0, "reverse"), (1, "forward"), (1, "reverse")], size
    )
    first = lyapunov_exponents(module, x, k=3, warmup=5).values
    assert first == pytest.approx(found.values[:3], abs=1e-10)
    kept = retention(module, x)
    assert [(layer.layer, layer.direction) for layer in kept.layers] == [
        (0, "forward"), (0, "reverse"), (1, "forward"), (1, "reverse"),
    ]  # fmt: skip
    own = [layer.log10 for layer in kept.layers if layer.direction == kept.direction]
    assert kept.log10 == tuple(map(max, *own))


@every_module
def test_layouts_of_the_input(name: str) -> None:
    module, x = module_of(name), real(T, B, F)
    expected = figures(module, x)
    turned = module_of(name, batch_first=True)
    turned.load_state_dict(module.state_dict())
    assert figures(turned, x.transpose(0, 1)) == expected
    assert figures(module, x[:, 0]) == figures(module, x[:, :1])
    assert figures(turned, x[:, 0]) == figures(module, x[:, :1])


@every_module
def test_a_packed_sequence_is_its_padded_one(name: str) -> None:
    module, x = module_of(name, num_layers=2, bidirectional=True), real(T, B, F)
    lengths = [20, T, 31, T, 7]
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    expected = figures(module, x, lengths=lengths)
    assert figures(module, packed) == expected
    assert figures(module, x, lengths=torch.tensor(lengths)) == expected
    assert figures(module, x) != expected
    beyond = x.clone()
    beyond[20:, 0] = 1e6
    assert figures(module, beyond, lengths=lengths) == expected


@every_module
def test_the_state_is_torchs(name: str) -> None:
    """The first steps measured as a state, then the rest, against the whole."""
    module, x = module_of(name, num_layers=2), real(T, B, F)
    with torch.no_grad():
        _, state = module(x[:30])
    late = lyapunov_exponents(module, x[30:], state=state, k=2, warmup=0)
    whole = retention(module, x)
    assert retention(module, x[30:], state=state).log10 == pytest.approx(
        whole.log10[:11], abs=1e-12
    )
    assert late.values != lyapunov_exponents(module, x[30:], k=2, warmup=0).values
    alone = state[:, 0] if isinstance(state, Tensor) else tuple(part[:, 0] for part in state)
    pair = state[:, :1] if isinstance(state, Tensor) else tuple(part[:, :1] for part in state)
    assert figures(module, x[30:, 0], state=alone) == figures(module, x[30:, :1], state=pair)


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_stepped_over_the_inputs(name: str) -> None:
    cell_class, fused_class = CELLS[name]
    cell, fused = cell_class(F, H), fused_class(F, H)
    fused.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    x, h = torch.randn(T, B, F), torch.randn(B, H)
    state = (h, torch.randn(B, H)) if name == "lstm" else h
    stacked = tuple(s[None] for s in state) if isinstance(state, tuple) else state[None]
    assert figures(cell, x) == figures(fused, x)
    assert figures(cell, x[:, 0]) == figures(fused, x[:, :1])
    assert figures(cell, x, state=state) == figures(fused, x, state=stacked)
    alone = tuple(s[0] for s in state) if isinstance(state, tuple) else state[0]
    assert figures(cell, x[:, 0], state=alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(dtype: torch.dtype) -> None:
    """Half precision rounds weights and inputs; what is computed from them is not rounded."""
    module, x = nn.LSTM(F, H), torch.randn(T, B, F)
    module.to(dtype)
    twin = nn.LSTM(F, H, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    exact = figures(twin, x.to(dtype).double())
    assert figures(module, x.to(dtype)) == pytest.approx(exact, abs=1e-4)
    assert {p.dtype for p in module.parameters()} == {dtype}


def test_under_autocast_nothing_changes() -> None:
    module, x = nn.GRU(F, H), torch.randn(T, B, F)
    expected = figures(module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert figures(module, x) == expected
    with torch.inference_mode():
        assert figures(module, x) == expected
    x.requires_grad_()
    assert figures(module, x) == expected


def test_the_callers_default_device_is_none_of_its_business() -> None:
    """On the meta device a tensor made without naming a device would hold no values."""
    module = nn.LSTM(F, H, num_layers=2, bidirectional=True)
    expected = figures(module, X), figures(module, X, lengths=[T, T, 9, 30, T])
    with torch.device("meta"):
        assert (figures(module, X), figures(module, X, lengths=[T, T, 9, 30, T])) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measured_where_the_module_is_or_where_it_is_told() -> None:
    module = nn.LSTM(F, H, num_layers=2, bidirectional=True)
    expected = figures(module, X)
    assert figures(module, X, device="cuda") == pytest.approx(expected, abs=1e-3)
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    module.cuda()
    assert figures(module, X) == pytest.approx(expected, abs=1e-3)
    assert figures(module, X, device="cpu") == pytest.approx(expected, abs=1e-3)
    assert {parameter.device.type for parameter in module.parameters()} == {"cuda"}


@both
@every_module
def test_no_trace(name: str, measure: Callable[..., Any]) -> None:
    module = module_of(name, num_layers=2, bidirectional=True, dropout=0.5)
    x = real(T, B, F)
    module(x)[0].sum().backward()
    before = fingerprint(module)
    measure(module, x)
    assert fingerprint(module) == before


def test_a_parametrization_that_writes_when_read_is_given_back() -> None:
    module = parametrizations.spectral_norm(nn.RNN(F, H), "weight_hh_l0").train()
    before = fingerprint(module)
    assert len(figures(module, X)) > 0
    assert fingerprint(module) == before


def test_the_seed_decides() -> None:
    module, x = nn.GRU(F, H), torch.randn(T, B, F)
    assert figures(module, x, seed=1) == figures(module, x, seed=1)
    assert figures(module, x, seed=1) != figures(module, x, seed=2)


def test_lags_that_were_asked_for() -> None:
    module, x = nn.GRU(F, H), torch.randn(T, B, F)
    whole, some = retention(module, x), retention(module, x, lags=[20, 5, 5, 0])
    assert some.lags == (0, 5, 20)
    for name in ("log10", "stderr", "interval"):
        assert getattr(some, name) == tuple(getattr(whole, name)[lag] for lag in (0, 5, 20))
    # Whatever lags are told, T_eff rests on all of them.
    assert some.effective_length() == whole.effective_length() > 5
    low, high = some.effective_length_interval(0.05)
    assert low <= some.effective_length(0.05) <= high
    assert some.layers[0].lags == (0, 5, 20)


def test_figures_are_those_of_an_audit() -> None:
    model, x = nn.LSTM(F, H, num_layers=2, bidirectional=True), torch.randn(T, B, F)
    site = measure_site(only_site(model, x), Memory(20, "declared"), seed=0, trained=False)
    kept = retention(model, x)
    assert (kept.log10, kept.stderr) == (site.retention, site.retention_stderr)
    assert kept.effective_length() == site.effective_length
    assert kept.effective_length_interval() == site.effective_length_interval
    assert kept.interval[20] == site.retention_at_memory_interval


def test_a_forced_gate_end_to_end() -> None:
    """An LSTM that does nothing but keep 0.9: T_eff(1e-2) is 1 + ln(R(1) / 0.01) / -ln 0.9."""
    module = zeroed(nn.LSTM(F, H, dtype=torch.float64))
    with torch.no_grad():
        module.get_parameter("bias_ih_l0")[H : 2 * H] = math.log(9.0)
    x = real(100, B, F)
    assert lyapunov_exponents(module, x, k=H).values == pytest.approx([math.log(0.9)] * H)
    kept = retention(module, x)
    expected = int(1 + (kept.log10[1] + 2) / -math.log10(0.9))
    assert kept.effective_length() == expected
    assert abs(expected - 43) <= 2


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(F, H)


@both
@pytest.mark.parametrize(
    ("module", "words"),
    [(nn.Linear(2, 2), "Give an nn.RNN"), (Encoder(), "`model.encoder`"), ("lstm", "nn.LSTM")],
)
def test_no_recurrence(measure: Callable[..., Any], module: Any, words: str) -> None:
    with pytest.raises(RefusedError, match=words) as refusal:
        measure(module, torch.randn(T, B, F))
    assert refusal.value.code == "RG003"


X = torch.randn(T, B, F)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "features": ({"inputs": torch.randn(T, B, 4)}, "F = 3"),
    "axes": ({"inputs": torch.randn(2, T, B, F)}, r"float32\[2, 40, 5, 3\]"),
    "integers": ({"inputs": torch.ones(T, B, dtype=torch.long)}, "real numbers"),
    "nothing": ({"inputs": torch.randn(0, B, F)}, "at least one"),
    "list": ({"inputs": [1.0]}, "a list"),
    "nan": ({"inputs": X / 0}, "not finite"),
    "few lengths": ({"lengths": [3, 4]}, "5 integers"),
    "long lengths": ({"lengths": [T, T, T, T, T + 1]}, "1 to 40"),
    "no lengths": ({"lengths": [T, T, T, T, 0]}, "1 to 40"),
    "real lengths": ({"lengths": torch.full((B,), 2.0)}, "integer"),
    "packed lengths": ({"inputs": pack_sequence([X[:, 0]]), "lengths": [T]}, "packed"),
    "half a state": ({"state": torch.zeros(1, B, H)}, r"\[1, 5, 6\] and \[1, 5, 6\]"),
    "wide state": ({"state": (torch.zeros(1, B, H), torch.zeros(1, B, 7))}, r"\[1, 5, 7\]"),
    "nan state": ({"state": (torch.zeros(1, B, H), torch.full((1, B, H), math.nan))}, "finite"),
    "device": ({"device": "abacus"}, "`device`"),
    "no device": ({"device": "meta"}, "`device`"),
}  # fmt: skip


@both
@pytest.mark.parametrize("fault", WRONG)
def test_wrong_inputs_are_refused_in_one_sentence(fault: str, measure: Callable[..., Any]) -> None:
    given, words = WRONG[fault]
    options = {"inputs": X} | given
    with pytest.raises(RefusedError, match=words) as refusal:
        measure(nn.LSTM(F, H), options.pop("inputs"), **options)
    assert refusal.value.code == "RG912"
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("measure", "options", "words"),
    [
        (lyapunov_exponents, {"k": 0}, "1 or more"),
        (lyapunov_exponents, {"warmup": -1}, "0 or more"),
        (retention, {"vectors": 0}, "1 or more"),
        (retention, {"lags": [T + 1]}, "0 to 40"),
        (retention, {"lags": [-1]}, "0 to 40"),
        (retention, {"lags": []}, "0 to 40"),
    ],
)
def test_wrong_options(measure: Callable[..., Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError, match=words) as refusal:
        measure(nn.LSTM(F, H), X, **options)
    assert refusal.value.code == "RG912"


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(RefusedError, match="meta"):
        retention(nn.LSTM(F, H, device="meta"), X)


def hold_two(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Lets the trajectories of more than two sequences run out of memory."""
    from rnnguard.probe import trajectory

    def scarce(*arguments: Any, sequences: int, **options: Any) -> Any:
        if sequences > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return trajectory.trajectories(*arguments, sequences=sequences, **options)

    monkeypatch.setattr(f"rnnguard.probe.{module}.trajectories", scarce)


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.LSTM(F, H)
    fewer: list[Exponents | Retention] = [
        lyapunov_exponents(module, X[:, :2]), retention(module, X[:, :2]),
    ]  # fmt: skip
    hold_two(monkeypatch, "standalone")
    for measure, expected in zip((lyapunov_exponents, retention), fewer, strict=True):
        with pytest.warns(MemoryWarning, match="2 of 5 sequences") as told:
            found: Exponents | Retention = measure(module, X)
        assert [warning.filename for warning in told] == [__file__]
        assert found.notes == ("memory ran out: 2 of 5 sequences were measured",)
        assert found.model_copy(update={"notes": ()}) == expected
        assert found.sequences == 2


def test_memory_that_runs_out_in_an_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.LSTM(F, H), torch.randn(T, 12, F)
    expected = rnnguard.audit(model, inputs=x[:, :2], memory=9, verbose=False)[""]
    hold_two(monkeypatch, "readings")
    with pytest.warns(MemoryWarning, match="2 of 8 sequences"):
        found = rnnguard.audit(model, inputs=x, memory=9, verbose=False)[""]
    assert found.exponents == expected.exponents
    assert found.retention == expected.retention


@torch.no_grad()
def test_a_state_that_overflows_ends_there() -> None:
    module = nn.RNN(F, H, nonlinearity="relu", bias=False)
    module.get_parameter("weight_hh_l0").copy_(1e3 * torch.eye(H))
    module.get_parameter("weight_ih_l0").fill_(1.0)
    x = torch.ones(T, B, F)
    found, kept = lyapunov_exponents(module, x, warmup=2), retention(module, x)
    assert found.values == pytest.approx([math.log(1e3)] * H, abs=1e-5)
    (note,) = found.notes
    assert note == "a state overflows after 13 steps; what follows was left out"
    assert kept.lags == tuple(range(14))
    assert kept.log10[13] == pytest.approx(39.0, abs=1e-4)


def test_what_a_warm_up_leaves_is_told() -> None:
    module = nn.GRU(F, H)
    few = lyapunov_exponents(module, X, lengths=[T, T, 20, 3, T])
    assert few.notes == ("2 of 5 sequences end within the warm-up",)
    assert few.leading.freedom == 2
    none = lyapunov_exponents(module, X[:10])
    assert none.notes == ("the sequences end before the warm-up; only step 10 was measured",)
    assert none.warmup == 9


def test_results_are_plain_records() -> None:
    found, kept = lyapunov_exponents(nn.GRU(F, H), X), retention(nn.GRU(F, H), X)
    assert Exponents.model_validate_json(found.model_dump_json()) == found
    assert Retention.model_validate_json(kept.model_dump_json()) == kept


def test_public_names_load_torch_only_when_used(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys, rnnguard, rnnguard.probe; light = 'torch' not in sys.modules;"
        "names = set(rnnguard.probe.__all__) <= set(dir(rnnguard.probe));"
        "print(light, names, rnnguard.probe.retention.__name__, 'torch' in sys.modules)"
    )
    assert fresh_python("-c", code).strip() == "True True retention True"


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="lyapunov"):
        rnnguard.probe.lyapunov  # noqa: B018


def test_sequences_that_are_measured_are_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures(nn.LSTM(F, H), X)
