"""Traps 1 to 20, 29 and 30: which module is changed, and what else hangs on it.

Every test runs a second time against a plausible first implementation, and fails there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from naive import FAILED, fooled_by
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import rnn as packing
from torch.optim import SGD, Adam, Optimizer

import rnnguard
from rnnguard.errors import RefusedError, RewriteError
from rnnguard.inspection import recording
from rnnguard.nn import OutputNormGRU, OutputNormLSTM
from rnnguard.nn.output_norm import OUTPUT_NORMS, output_norm, output_width
from rnnguard.probe.snapshot import fingerprint, same_bits
from rnnguard.remedies.chrono_bias import CHRONO_BIAS
from rnnguard.remedies.layer_norm import LAYER_NORM
from rnnguard.remedies.remedy import Remedy
from rnnguard.report.report import Report
from rnnguard.rewrite.edit import Edit

IN, HIDDEN, STEPS, BATCH = 4, 8, 12, 6


class Net(nn.Module):
    """A recurrence whose last step a head reads."""

    def __init__(self, rnn: Any, width: int = HIDDEN) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def lstm(**options: Any) -> nn.LSTM:
    return nn.LSTM(IN, HIDDEN, **{"batch_first": True} | options)


def faint(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Input so small that every tier has work: the bias, the input weights and the output."""
    generator = torch.Generator().manual_seed(1)
    return 1e-3 * torch.randn(sizes or (BATCH, STEPS, IN), generator=generator).to(dtype)


def mend(model: nn.Module, optimizer: Optimizer | None = None, **options: Any) -> Report:
    given = {"inputs": faint(), "memory": STEPS} | options
    return rnnguard.stabilize(model, optimizer or Adam(model.parameters()), **given)


def done(report: Report, path: str | None = "rnn") -> list[str]:
    changes = [change for change in report.changes if change.path == path]
    assert {change.outcome for change in changes} <= {"applied"}
    return [change.remedy for change in changes]


def planned(*changes: tuple[str, str, dict[str, float]]) -> dict[str, Any]:
    """A plan as it comes from a file: remedy, path and dose of each change."""
    rest = {"tier": "values", "scenario": "a test", "why": ""}
    rows = [{"remedy": r, "path": p, "dose": dose, **rest} for r, p, dose in changes]
    return {"schema_version": 1, "changes": rows}


def row(folder: Path, *remedies: str) -> str:
    """A rule folder that gives every LSTM these remedies."""
    text = (
        'schema = 1\n[[scenario]]\nid = "own"\nwhy = "A test."\nrefs = ["a test"]\n'
        f'when = {{ cell = "lstm" }}\napply = {list(remedies)}\n'
        'dose = { chrono_bias = { t_max = "memory_needed" } }\n'
    )
    (folder / "scenarios.toml").write_text(text, encoding="utf-8")
    return str(folder)


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    state = model.state_dict()
    return {name for name, value in before.items() if not same_bits(state[name], value)}


def held(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


# --- first implementations that fall into the traps --------------------------------------


class Places(Protocol):
    """Gives the parents that hold a module, each with the name that it holds it under."""

    def __call__(self, model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]: ...


def of_named_children(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every parent, but only one name in each, since `named_children` hides the others."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is module:
                yield parent, name


def replaces(monkeypatch: pytest.MonkeyPatch, places: Places = of_named_children) -> None:
    """A new module with the old weights is set into its parents in place of the old one."""

    def morph_(self: Any, module: Any, cls: Any, **children: nn.Module) -> None:
        for parent, name in places(self._model, module):
            options = {key: getattr(module, key) for key in ("batch_first", "bidirectional")}
            fresh = cls(module.input_size, module.hidden_size, **options)
            for key, value in module.named_parameters(recurse=False):
                setattr(fresh, key, value)
            for key, child in children.items():
                fresh.add_module(key, child)
            setattr(parent, name, fresh)

    monkeypatch.setattr(Edit, "morph_", morph_)


def sets_new_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are written by a new Parameter in the first place that holds the old one."""

    right = Edit.write_

    def write_(self: Any, param: Tensor, value: Tensor) -> None:
        right(self, param, value)
        for module in self._model.modules():
            for name, own in list(module.named_parameters(recurse=False)):
                if own is param:
                    setattr(module, name, nn.Parameter(value.detach().to(param).clone()))
                    return

    monkeypatch.setattr(Edit, "write_", write_)


def after_morph(
    change: Callable[[nn.Module], object],
) -> Callable[[pytest.MonkeyPatch], None]:
    """The children of a morph are as torch makes them, without what `change` gives back."""

    def naive(monkeypatch: pytest.MonkeyPatch) -> None:
        right = Edit.morph_

        def morph_(self: Edit, module: nn.Module, cls: Any, **children: nn.Module) -> None:
            right(self, module, cls, **children)
            for child in children.values():
                change(child)

        monkeypatch.setattr(Edit, "morph_", morph_)

    return naive


def instead(remedy: Remedy, **parts: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """The remedy with other parts."""

    def naive(monkeypatch: pytest.MonkeyPatch) -> None:
        for name, part in parts.items():
            monkeypatch.setitem(vars(remedy), name, part)

    return naive


def chrono(
    *,
    suffixes: Callable[[Any], list[str]] = lambda module: [
        f"_l{layer}{way}"
        for layer in range(module.num_layers)
        for way in ("", "_reverse")[: 1 + module.bidirectional]
    ],
    hidden: Callable[[Any], int] = lambda module: int(module.hidden_size),
    keep: int = 1,
    sign: int = 1,
    halves: tuple[str, ...] = ("bias_ih",),
) -> Callable[[pytest.MonkeyPatch], None]:
    """A chrono bias that is right for an LSTM, but for what the arguments say."""

    def apply(edit: Edit, module: nn.Module, dose: Any) -> None:
        for suffix in suffixes(module):
            rows = hidden(module)
            keeps = torch.linspace(1, int(dose["t_max"]) - 1, rows).log()
            for half in ("bias_ih", "bias_hh"):
                param = getattr(module, half + suffix)
                fresh = torch.zeros_like(param)
                if half in halves:
                    fresh[keep * rows : (keep + 1) * rows] = sign * keeps
                    if keep:
                        fresh[:rows] = -sign * keeps
                edit.write_(param, fresh)

    return instead(CHRONO_BIAS, apply=apply)


# --- one module, many ways to it ---------------------------------------------------------


@fooled_by(replaces)
def test_trap_01_root_module_is_the_recurrence() -> None:
    model = lstm()
    optimizer, caller = Adam(model.parameters()), [model]
    report = mend(model, optimizer)
    assert done(report, "") == ["uniform_gate_bias", "layer_norm"]
    assert type(caller[0]) is OutputNormLSTM
    assert list(model.output_norm.parameters()) == held(optimizer)[4:]
    report.undo()
    assert type(caller[0]) is nn.LSTM and len(held(optimizer)) == 4


class TwoNames(nn.Module):
    """Encoder and decoder are one module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.decoder = lstm()
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        ends = self.encoder(x)[0][:, -1] + self.decoder(x.flip(1))[0][:, -1]
        logits: Tensor = self.head(ends)
        return logits


@fooled_by(replaces)
def test_trap_02_two_names_in_one_parent() -> None:
    model = TwoNames()
    shared = model.encoder
    report = mend(model)
    (site,) = report.sites
    assert (site.path, site.aliases) == ("encoder", ("decoder",))
    assert done(report, "encoder").count("layer_norm") == 1
    assert {change.path for change in report.changes} == {"encoder", None}
    assert model.encoder is model.decoder is shared
    assert type(shared) is OutputNormLSTM
    assert len(list(model.parameters())) == 4 + 2 + 2


class TwoParents(nn.Module):
    """Two branches hold one recurrence."""

    def __init__(self) -> None:
        super().__init__()
        shared = lstm()
        self.left, self.right = Net(shared), Net(shared)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.left(x) + self.right(x.flip(1))
        return total


@fooled_by(replaces)
def test_trap_03_two_parents() -> None:
    model = TwoParents()
    shared = model.left.rnn
    report = mend(model)
    (site,) = report.sites
    assert (site.path, site.aliases) == ("left.rnn", ("right.rnn",))
    assert done(report, "left.rnn").count("layer_norm") == 1
    assert model.left.rnn is model.right.rnn is shared
    assert type(shared) is OutputNormLSTM


@fooled_by(replaces)
def test_trap_04_also_in_a_list_a_dict_and_a_closure() -> None:
    model = Net(lstm())
    recurrence = model.rnn
    model.cells, model.by_name = [recurrence], {"rnn": recurrence}
    model.run = lambda x: recurrence(x)[0]
    assert "layer_norm" in done(mend(model))
    assert model.cells[0] is model.by_name["rnn"] is model.rnn
    x = torch.randn(2, STEPS, IN)
    normed = nn.functional.layer_norm(
        nn.LSTM.forward(recurrence, x)[0], (HIDDEN,), eps=recurrence.output_norm.eps
    )
    assert torch.equal(model.run(x), normed)
    assert torch.equal(model.cells[0](x)[0], model.by_name["rnn"](x)[0])


class Tied(nn.Module):
    """Two recurrences of one weight: 7 parameters under 8 keys, and the head's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.second = lstm(), lstm()
        setattr(self.second, name, getattr(self.first, name))
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        ends = self.first(x)[0][:, -1] + self.second(x.flip(1))[0][:, -1]
        logits: Tensor = self.head(ends)
        return logits


@fooled_by(sets_new_parameters)
@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
def test_trap_05_a_weight_tied_between_two_recurrences(name: str) -> None:
    model = Tied(name)
    tied, optimizer = getattr(model.first, name), Adam(model.parameters())
    before = fingerprint(model, optimizer)
    doses = {"orthogonal": {"gain": 1.0, "seed": 1}, "chrono_bias": {"t_max": 20, "seed": 1}}
    orders = [(r, p, doses[r]) for p in ("first", "second") for r in doses]
    report = rnnguard.apply(model, optimizer, planned(*orders))
    assert getattr(model.first, name) is getattr(model.second, name) is tied
    assert len(held(optimizer)) == len(list(model.parameters())) == 7 + 2
    assert len(model.state_dict()) == 8 + 2
    for recurrence in (model.first, model.second):
        names = recurrence._flat_weights_names
        assert all(
            weight is getattr(recurrence, each)
            for weight, each in zip(recurrence._flat_weights, names, strict=True)
        )
    report.undo()
    assert fingerprint(model, optimizer) == before


@fooled_by(replaces)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_trap_06_hooks_survive() -> None:
    model, heard = Net(lstm()), []
    model.rnn.register_forward_pre_hook(lambda *_: heard.append("before"))
    model.rnn.register_forward_hook(lambda *_: heard.append("forward"))
    model.rnn.register_full_backward_hook(lambda *_: heard.append("backward"))
    model.rnn.register_full_backward_pre_hook(lambda *_: heard.append("back"))
    assert "layer_norm" in done(mend(model))
    heard.clear()
    model(faint().requires_grad_()).sum().backward()
    assert heard == ["before", "forward", "back", "backward"]


@fooled_by(after_morph(nn.Module.train))
def test_trap_07_eval_mode_is_kept() -> None:
    model = Net(lstm()).eval()
    assert "layer_norm" in done(mend(model))
    assert [name for name, module in model.named_modules() if module.training] == []
    assert "rnn.output_norm" in dict(model.named_modules())


@fooled_by(after_morph(nn.Module.float), fails_with=(*FAILED, RewriteError))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_trap_08_dtype_is_kept(dtype: torch.dtype) -> None:
    model = Net(nn.LSTM(IN, 16, batch_first=True), width=16).to(dtype)
    report = mend(model, inputs=faint(dtype=dtype))
    assert "layer_norm" in done(report)
    assert {name: p.dtype for name, p in model.named_parameters() if p.dtype != dtype} == {}
    assert model(faint(dtype=dtype)).dtype == dtype


def adopts_whatever_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def adopt_(self: Any, params: Any, like: nn.Parameter) -> None:
        optimizer = self._optimizer
        present = {id(param) for param in held(optimizer)}
        missing = [param for param in self._model.parameters() if id(param) not in present]
        optimizer.add_param_group({"params": missing})

    monkeypatch.setattr(Edit, "adopt_", adopt_)


@fooled_by(adopts_whatever_is_missing)
def test_trap_09_frozen_parameters_stay_frozen() -> None:
    model = nn.ModuleDict({"frozen": Net(lstm()), "live": Net(lstm())})
    model.forward = lambda x: model["frozen"](x) + model["live"](x)
    model["frozen"].requires_grad_(False)
    before = kept(model["frozen"])
    optimizer = Adam(p for p in model.parameters() if p.requires_grad)
    report = mend(model, optimizer)
    assert "layer_norm" in done(report, "live.rnn") and done(report, "frozen.rnn") == []
    assert [(r.code, r.path) for r in report.refusals] == [("RG902", "frozen.rnn")]
    assert not any(p.requires_grad for p in model["frozen"].parameters())
    assert changed(model["frozen"], before) == set()
    assert set(held(optimizer)) == set(model["live"].parameters())


# --- weights that are not simply parameters ----------------------------------------------


def checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnnguard.inspection.preflight._parametrized", lambda *_: ())


class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


PARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "identity": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Same()),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "weight norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
}


def refused_as_parametrized(model: Net) -> None:
    """Refused in one sentence before any touch; leaving the site out is the cure."""
    optimizer = Adam(model.parameters())
    before = fingerprint(model, optimizer)
    with pytest.raises(RefusedError) as caught:
        mend(model, optimizer)
    assert {(r.code, r.path) for r in caught.value.reasons} == {("RG903", "rnn")}
    assert "weight_hh_l0" in str(caught.value) and 'skip=["rnn"]' in str(caught.value)
    assert fingerprint(model, optimizer) == before
    values = kept(model)
    assert done(mend(model, optimizer, skip=["rnn"])) == []
    assert changed(model, values) == set()


@fooled_by(checks_nothing)
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_trap_10_a_parametrized_weight_is_refused(kind: str) -> None:
    model = Net(lstm())
    PARAMETRIZED[kind](model.rnn)
    refused_as_parametrized(model)


def knows_parametrize_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusals(path: str, module: nn.Module) -> Iterator[rnnguard.errors.Refusal]:
        if parametrize.is_parametrized(module):
            yield rnnguard.errors.Refusal("RG903", path, "weight_hh_l0 is parametrized.", "")

    monkeypatch.setattr("rnnguard.inspection.preflight._parametrized", refusals)


@fooled_by(knows_parametrize_only)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_trap_11_norms_of_the_old_style_are_refused(wrap: Callable[..., object]) -> None:
    model = Net(lstm())
    wrap(model.rnn, "weight_hh_l0")
    refused_as_parametrized(model)


class Doubled(nn.LSTM):
    """A user's class with a forward of its own."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        output, state = super().forward(x, hx)
        return 2 * output, state


def morphs_by_isinstance(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(edit: Edit, module: nn.Module, dose: Any) -> None:
        cls = next(new for old, new in OUTPUT_NORMS.items() if isinstance(module, old))
        norm = output_norm(output_width(module))
        edit.morph_(module, cls, output_norm=norm)
        new = {f"rnn.output_norm.{name}": param for name, param in norm.named_parameters()}
        edit.adopt_(new, like=next(module.parameters()))

    monkeypatch.setattr("rnnguard.mending.is_plain", lambda module: True)
    instead(LAYER_NORM, apply=apply)(monkeypatch)


@fooled_by(morphs_by_isinstance)
def test_trap_12_a_users_subclass_is_not_morphed_and_this_is_said() -> None:
    model = Net(Doubled(IN, HIDDEN, batch_first=True))
    report = mend(model)
    assert type(model.rnn) is Doubled
    assert [(r.code, r.path) for r in report.refusals] == [("RG910", "rnn")]
    assert "Doubled" in str(report.refusals[0])
    assert done(report) == ["chrono_bias", "variance_scaling"]
    x = faint()
    assert torch.equal(model.rnn(x)[0], 2 * nn.LSTM.forward(model.rnn, x)[0])


# --- names, sizes and gates --------------------------------------------------------------


class Stepped(nn.Module):
    """A cell called step by step, with a head at the end."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.rnn, self.head = cell, nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.rnn(step, state)
        logits: Tensor = self.head(state[0] if isinstance(state, tuple) else state)
        return logits


@fooled_by(chrono(suffixes=lambda m: ["_l0"] if hasattr(m, "num_layers") else []))
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_trap_13_cells_have_names_of_their_own(cell: Callable[..., nn.Module]) -> None:
    model = Stepped(cell(IN, HIDDEN))
    names, before = list(model.state_dict()), kept(model)
    assert "chrono_bias" in done(mend(model, tiers=("values",)))
    assert {"rnn.bias_ih", "rnn.bias_hh"} <= changed(model, before)
    keep = model.rnn.bias_ih.detach()[HIDDEN : 2 * HIDDEN]
    assert float(keep.max()) > 1 and float(keep.min()) >= 0
    assert not model.rnn.bias_hh.any()
    assert list(model.state_dict()) == names


def keeps(bias: Tensor, hidden: int = HIDDEN) -> Tensor:
    """The second block: f of an LSTM's i, f, g, o and z of a GRU's r, z, n."""
    return bias.detach()[hidden : 2 * hidden]


def spread_up_to(memory: int, keep: Tensor) -> bool:
    """Whether the time scales exp(b) + 1 lie one in each equal part between 2 and the memory."""
    scales = keep.double().exp().sort().values
    edges = torch.linspace(1, memory - 1, len(scales) + 1, dtype=torch.float64)
    return bool((scales >= edges[:-1] - 1e-4).all() and (scales <= edges[1:] + 1e-4).all())


@fooled_by(chrono(suffixes=lambda module: [f"_l{n}" for n in range(module.num_layers)]))
def test_trap_14_both_directions_of_all_layers() -> None:
    model = Net(lstm(num_layers=2, bidirectional=True), width=2 * HIDDEN)
    before = kept(model)
    report = mend(model)
    assert done(report) == ["chrono_bias", "variance_scaling", "layer_norm"]
    written = changed(model, before)
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        assert f"rnn.weight_ih_{suffix}" in written
        assert spread_up_to(STEPS, keeps(getattr(model.rnn, f"bias_ih_{suffix}")))
        assert not getattr(model.rnn, f"bias_hh_{suffix}").any()
    assert model.rnn.output_norm.normalized_shape == (2 * HIDDEN,)


@fooled_by(chrono(hidden=lambda module: int(module.weight_hh_l0.shape[1])))
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_trap_15_a_projected_state_is_narrower_than_the_gates() -> None:
    model = Net(lstm(proj_size=3), width=3)
    before = kept(model)
    report = mend(model)
    assert done(report) == ["chrono_bias", "variance_scaling", "layer_norm"]
    assert spread_up_to(STEPS, keeps(model.rnn.bias_ih_l0))
    assert torch.equal(keeps(model.rnn.bias_ih_l0), -model.rnn.bias_ih_l0[:HIDDEN])
    assert not model.rnn.bias_ih_l0[2 * HIDDEN :].any()
    assert not {"rnn.weight_hr_l0", "rnn.weight_hh_l0"} & changed(model, before)
    assert model.rnn.output_norm.normalized_shape == (3,)


def unguarded_bias(edit: Edit, module: Any, dose: Any) -> None:
    edit.write_(module.bias_ih_l0, torch.ones(4 * HIDDEN))


@fooled_by(
    instead(CHRONO_BIAS, apply=unguarded_bias, prescription=lambda *_: {"t_max": STEPS, "seed": 0}),
    fails_with=RewriteError,
)
def test_trap_16_without_bias_there_is_no_forget_bias(tmp_path: Path) -> None:
    model = Net(lstm(bias=False))
    names = list(model.state_dict())
    report = mend(model, rules=row(tmp_path, "chrono_bias"), tiers=("values",))
    assert done(report) == [] and report["rnn"].forget_bias is None
    assert list(model.state_dict()) == names
    assert done(mend(model, tiers=("values",))) == ["orthogonal"]
    assert list(model.state_dict()) == names


@fooled_by(chrono(halves=("bias_ih", "bias_hh")))
def test_trap_17_two_biases_add_up() -> None:
    model = Net(lstm())
    assert "chrono_bias" in done(mend(model))
    assert spread_up_to(STEPS, keeps(model.rnn.bias_ih_l0) + keeps(model.rnn.bias_hh_l0))
    assert not model.rnn.bias_hh_l0.any()


def forget_gate_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for f, i, g, o, and for a GRU that keeps with 1 - z."""
    chrono(keep=0)(monkeypatch)


@fooled_by(forget_gate_first)
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_trap_18_the_order_of_gates(cell: Callable[..., nn.Module]) -> None:
    """The state is kept for as long as the time scale says, by torch's own kernel in float64."""
    model = Net(cell(IN, HIDDEN, batch_first=True)).double()
    assert "chrono_bias" in done(mend(model, inputs=faint(dtype=torch.float64)))
    twin = cell(IN, HIDDEN, batch_first=True).double()
    for weight in (twin.weight_ih_l0, twin.weight_hh_l0):
        nn.init.zeros_(weight)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        getattr(twin, name).data.copy_(getattr(model.rnn, name).detach())
    start = torch.full((1, 1, HIDDEN), 0.5, dtype=torch.float64)
    state = (start, start) if cell is nn.LSTM else start
    silence = torch.zeros(1, 3, IN, dtype=torch.float64)
    end = twin(silence, state)[1]
    left = (end[1] if cell is nn.LSTM else end).detach().flatten() / 0.5
    scale = model.rnn.bias_ih_l0.detach()[HIDDEN : 2 * HIDDEN].exp() + 1
    torch.testing.assert_close(left, (1 - 1 / scale) ** 3)
    assert float(scale.max()) > STEPS / 2


# --- forms of input ----------------------------------------------------------------------


def forgets_the_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Any, hx: Any = None) -> Any:
        output, state = nn.LSTM.forward(self, x, hx)
        if isinstance(output, packing.PackedSequence):
            data = self.output_norm(output.data)
            return packing.PackedSequence(data, output.batch_sizes), state
        return self.output_norm(output), state

    monkeypatch.setattr(OutputNormLSTM, "forward", forward)


class Packed(Net):
    """Packs its sequences, in whatever order they come."""

    lengths = torch.tensor([7, 12, 3, 12, 1, 9])

    def forward(self, x: Tensor) -> Tensor:
        packed = packing.pack_padded_sequence(x, self.lengths, True, enforce_sorted=False)
        output, _ = packing.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        last = output[torch.arange(len(x)), self.lengths - 1]
        logits: Tensor = self.head(last)
        return logits


@fooled_by(forgets_the_indices)
def test_trap_19_packed_sequences_in_and_out() -> None:
    model = Packed(lstm()).double()
    x = faint(dtype=torch.float64)
    report = mend(model, inputs=x)
    assert report.sites[0].packed and "layer_norm" in done(report)
    packed = packing.pack_padded_sequence(x, model.lengths, True, enforce_sorted=False)
    output, (h, c) = model.rnn(packed)
    assert isinstance(output, packing.PackedSequence)
    padded, lengths = packing.pad_packed_sequence(output, batch_first=True)
    assert torch.equal(lengths, model.lengths)
    for i, length in enumerate(model.lengths.tolist()):
        alone, (h_alone, c_alone) = model.rnn(x[i : i + 1, :length])
        torch.testing.assert_close(padded[i, :length], alone[0])
        torch.testing.assert_close((h[:, i], c[:, i]), (h_alone[:, 0], c_alone[:, 0]))


def time_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    right = recording.native_call
    monkeypatch.setattr(
        recording, "native_call", lambda *given: replace(right(*given), batch_first=False)
    )


LAYOUTS: dict[str, tuple[bool, tuple[int, ...], Callable[[Tensor], Tensor], int]] = {
    "batch first": (True, (BATCH, STEPS, IN), lambda y: y[:, -1], BATCH),
    "time first": (False, (STEPS, BATCH, IN), lambda y: y[-1], BATCH),
    "unbatched": (False, (STEPS, IN), lambda y: y[-1], 1),
    "unbatched, batch first": (True, (STEPS, IN), lambda y: y[-1], 1),
}


@fooled_by(time_comes_first, fails_with=(*FAILED, RuntimeError))
def test_trap_20_batch_first_and_unbatched_input() -> None:
    for name, (batch_first, sizes, last, batch) in LAYOUTS.items():
        model = Net(lstm(batch_first=batch_first))
        model.forward = lambda x, model=model, last=last: model.head(last(model.rnn(x)[0]))
        x = faint(*sizes)
        report = mend(model, inputs=x)
        assert (report.sites[0].steps, report.sites[0].batch) == (STEPS, batch), name
        assert done(report) == ["chrono_bias", "variance_scaling", "layer_norm"], name
        output, state = model.rnn(x)
        plain, same = nn.LSTM.forward(model.rnn, x)
        norm = model.rnn.output_norm
        expected = nn.functional.layer_norm(plain.double(), (HIDDEN,), eps=norm.eps)
        torch.testing.assert_close(output.double(), expected)
        torch.testing.assert_close(state, same, rtol=0, atol=0)


# --- nothing to do -----------------------------------------------------------------------


def says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnnguard.request._no_site", lambda look: [])
    monkeypatch.setattr("rnnguard.findings.audit_findings", lambda *_: [])


@fooled_by(says_nothing)
def test_trap_29_a_model_without_recurrence_is_told_loudly() -> None:
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 3))
    optimizer = SGD(model.parameters(), 0.1)
    before = fingerprint(model, optimizer)
    report = rnnguard.audit(model, optimizer, inputs=faint())
    assert [f.code for f in report.findings if f.severity != "info"] == ["RG003"]
    assert "0 sites" in str(report) and not report.ok
    for call in (rnnguard.stabilize, rnnguard.plan):
        with pytest.raises(RefusedError) as caught:
            call(model, optimizer, inputs=faint())
        assert caught.value.code == "RG003"
    assert fingerprint(model, optimizer) == before


class Normed(Net):
    """The user's own norm stands between recurrence and head."""

    def __init__(self, rnn: Any) -> None:
        super().__init__(rnn)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.rnn(x)[0])[:, -1])
        return logits


def sees_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnnguard.inspection.sites.is_normalized", lambda call: False)
    monkeypatch.setitem(vars(LAYER_NORM), "apply", wraps_once_more)


def wraps_once_more(edit: Edit, module: nn.Module, dose: Any) -> None:
    """Another norm at every call, under whatever name is free."""
    if type(module) in OUTPUT_NORMS:
        edit.morph_(module, OUTPUT_NORMS[type(module)], output_norm=nn.LayerNorm(HIDDEN))


@fooled_by(sees_no_norm)
def test_trap_30_an_output_that_is_normalised_gets_no_second_norm() -> None:
    model = Normed(nn.GRU(IN, HIDDEN, batch_first=True))
    report = mend(model)
    assert report.before["rnn"].normalized
    assert done(report) == ["chrono_bias"]
    assert type(model.rnn) is nn.GRU
    plain = Net(nn.GRU(IN, HIDDEN, batch_first=True))
    optimizer = Adam(plain.parameters())
    assert "layer_norm" in done(mend(plain, optimizer))
    between = fingerprint(plain, optimizer)
    again = mend(plain, optimizer)
    assert again["rnn"].normalized and again.changes == ()
    assert type(plain.rnn) is OutputNormGRU
    assert fingerprint(plain, optimizer) == between
    assert type(copy.deepcopy(plain).rnn) is OutputNormGRU
