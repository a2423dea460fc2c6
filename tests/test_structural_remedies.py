"""What each remedy of the structure makes of torch's modules, how it is undone, and its dose."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from factories import run_readings, site_readings
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

import rnnguard
from rnnguard import nn as cells
from rnnguard.errors import RefusedError, RulesError
from rnnguard.inspection.gates import plain_class
from rnnguard.nn.recurrent_weights import recurrent_parameters
from rnnguard.probe.snapshot import fingerprint, same_bits
from rnnguard.records import Change, Plan
from rnnguard.replay import REMEDY
from rnnguard.rewrite.edit import Edit

# torch says so once per process about its own projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

IN, HIDDEN, STEPS, BATCH, T = 4, 6, 7, 3, 50
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "tanh": nn.RNN,
    "relu": lambda *sizes, **form: nn.RNN(*sizes, nonlinearity="relu", **form),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
FORMS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2, "dropout": 0.2},
    "both ways": {"num_layers": 2, "bidirectional": True},
    "without bias": {"num_layers": 2, "bias": False},
    "projected": {"num_layers": 2, "proj_size": 3},
}
AROUND = {
    "tanh": cells.FusedRNN,
    "relu": cells.FusedRNN,
    "lstm": cells.FusedLSTM,
    "gru": cells.FusedGRU,
}
NORMED: dict[str, Any] = {
    "lstm": cells.LayerNormLSTM,
    "gru": cells.LayerNormGRU,
    "tanh": cells.LayerNormRNN,
    "relu": cells.LayerNormRNN,
}
# What a module of each kind becomes, and the dose that the tests give.
BECOMES: dict[str, dict[str, Any]] = {
    "layer_norm_between": AROUND,
    "residual": AROUND,
    "variational_dropout": AROUND,
    "weight_drop": AROUND,
    "weight_norm": AROUND,
    "orthogonal_parametrization": AROUND,
    "spectral_bound": AROUND,
    "attention_readout": AROUND,
    "layer_norm_inside": NORMED,
    "zoneout": {"lstm": cells.ZoneoutLSTM, "gru": cells.ZoneoutGRU},
    "residual_rnn": dict.fromkeys(("tanh", "relu"), cells.ResidualRNN),
    "bounded_rnn": dict.fromkeys(("tanh", "relu"), cells.BoundedRNN),
    "indrnn": dict.fromkeys(("tanh", "relu"), cells.IndRNN),
    "gated_rnn": dict.fromkeys(("tanh", "relu"), cells.GatedRNN),
    "gate_last_gru": {"gru": cells.GateLastGRU},
}
DOSES: dict[str, dict[str, Any]] = {
    **{remedy: {} for remedy in BECOMES},
    "residual": {"shortcut": "highway", "gate_bias": -1.0},
    "variational_dropout": {"dropout": 0.3, "input_dropout": 0.2},
    "weight_drop": {"p": 0.4},
    "weight_norm": {"over": "gate"},
    "spectral_bound": {"bound": 0.3},
    "attention_readout": {"seed": 7, "width": 4, "heads": 2},
    "layer_norm_inside": {"memory": T, "gain": 0.5},
    "zoneout": {"hidden": 0.1, "cell": 0.3},
    "residual_rnn": {"memory": T},
    "bounded_rnn": {"activation": "elu", "bound": 0.5},
    "indrnn": {"activation": "relu", "memory": T, "read_last": True, "seed": 7},
    "gated_rnn": {"memory": T, "seed": 7},
}
SEEDED = ("attention_readout", "indrnn", "gated_rnn")
BETWEEN = ("layer_norm_between", "residual")
CASES = [
    (remedy, kind, form)
    for remedy, classes in BECOMES.items()
    for kind in classes
    for form in FORMS
    if not (form == "projected" and kind != "lstm")
    and not (form == "one layer" and remedy in BETWEEN)
    and not (kind == "relu" and form != "both ways")
    and not (kind == "gru" and form == "one layer")
]

every_case = pytest.mark.parametrize(("remedy", "kind", "form"), CASES)
hardest = pytest.mark.parametrize(
    ("remedy", "kind", "form"),
    [
        (remedy, kind, form)
        for remedy, kind, form in CASES
        if form == ("projected" if kind == "lstm" else "both ways") and kind != "relu"
    ],
)
every_remedy = pytest.mark.parametrize("remedy", BECOMES)


class Reader(nn.Module):
    """A recurrence under a path of two names, and a head over its outputs."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": rnn})
        self.head = nn.Linear((rnn.proj_size or HIDDEN) * (2 if rnn.bidirectional else 1), 1)

    @property
    def rnn(self) -> Any:
        return self.encoder["rnn"]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0])
        return output


def reader(kind: str, form: str) -> Reader:
    torch.default_generator.manual_seed(0)
    return Reader(KINDS[kind](IN, HIDDEN, **FORMS[form])).double()


def any_of(remedy: str, form: str = "two layers") -> Reader:
    """A model with the first kind of module that the remedy is made for."""
    return reader(next(iter(BECOMES[remedy])), form)


def apply(
    remedy: str, module: nn.Module, model: nn.Module | None = None, *, to: Any = None, **dose: Any
) -> Edit:
    edit = Edit(model or module, to)
    REMEDY[remedy].apply(edit, module, {**DOSES[remedy], **dose})
    return edit


def kept(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def inputs(**options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, IN, generator=generator, dtype=torch.float64, **options)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether both give the same bits, in training under the same masks."""
    found = []
    for module in (one, other):
        torch.default_generator.manual_seed(5)
        found.append(flat(module(inputs())))
    return all(map(same_bits, *found))


# --- what is touched ---------------------------------------------------------------------


@every_case
def test_morphs_in_place(remedy: str, kind: str, form: str) -> None:
    training = form != "both ways"
    model = reader(kind, form).train(training)
    module, before, objects = model.rnn, kept(model), dict(model.named_parameters())
    shapes = [part.shape for part in flat(module(inputs()))]
    groups: list[dict[str, Any]] = [{"params": model.head.named_parameters()}]
    optimizer = Adam([*groups, {"params": named(module)}])
    random = torch.get_rng_state()
    apply(remedy, module, model, to=optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.rnn is module and type(module) is BECOMES[remedy][kind]
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in objects.items())
    state = model.state_dict()
    assert before.keys() <= state.keys()
    changed = {name for name in before if not same_bits(before[name], state[name])}
    assert changed == {name for name in before if written(remedy, kind) in name}
    assert {value.dtype for value in state.values()} == {torch.float64}
    assert {part.training for part in model.modules()} == {training}
    found = flat(module(inputs()))
    assert [part.shape for part in found] == shapes
    assert all(bool(part.isfinite().all()) for part in found)
    first, second = optimizer.param_groups
    assert first["param_names"] == ["weight", "bias"]
    own = {name: p for name, p in after.items() if name.startswith("encoder")}
    held = dict(zip(second["param_names"], second["params"], strict=True))
    assert held == own and len(second["params"]) == len(own)
    child = REMEDY[remedy].adds
    assert child is None or isinstance(getattr(module, child), nn.Module)


def written(remedy: str, kind: str) -> str:
    """What stands in the names of the parameters whose values the remedy changes."""
    if remedy == "layer_norm_inside" and kind in ("lstm", "gru"):
        return ".bias_"
    return "weight_hh" if remedy == "indrnn" else "no name"


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"encoder.rnn.{name}", parameter) for name, parameter in module.named_parameters()]


@every_case
def test_undo_gives_every_bit_back(remedy: str, kind: str, form: str) -> None:
    model = reader(kind, form)
    optimizer = Adam(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = fingerprint(model, optimizer)
    edit = apply(remedy, model.rnn, model, to=optimizer)
    edit.check_commit()
    changed = fingerprint(model, optimizer)
    assert apply(remedy, model.rnn, model, to=optimizer).mark() == 0
    assert fingerprint(model, optimizer) == changed != before
    edit.undo_()
    assert fingerprint(model, optimizer) == before


@hardest
def test_a_plan_of_it_gives_the_same_function_elsewhere(remedy: str, kind: str, form: str) -> None:
    """Through JSON and the public door, on a model whose own start is the same."""
    text = Plan(changes=(change(remedy),)).to_json()
    models = [reader(kind, form) for _ in range(2)]
    apply(remedy, models[0].rnn, models[0])
    torch.manual_seed(99)
    report = rnnguard.apply(models[1], SGD(models[1].parameters(), 0.1), Plan.from_json(text))
    assert [(each.remedy, each.outcome) for each in report.changes] == [(remedy, "applied")]
    assert equal(models[1].state_dict(), models[0].state_dict())
    assert same(models[1], models[0])
    assert same(models[1].eval(), models[0].eval())


def change(remedy: str, **dose: Any) -> Change:
    given = {**DOSES[remedy], **dose}
    why = {"scenario": "test", "why": "A test."}
    return Change(remedy=remedy, path="encoder.rnn", tier="structure", dose=given, **why)


@every_remedy
def test_a_dose_that_it_does_not_have_is_refused(remedy: str) -> None:
    model = any_of(remedy)
    optimizer, before = Adam(model.parameters()), kept(model)
    with pytest.raises(RefusedError, match="has no dose 'strength'"):
        rnnguard.apply(model, optimizer, Plan(changes=(change(remedy, strength=1),)))
    assert equal(kept(model), before)


@every_remedy
@pytest.mark.parametrize("held", [False, True])
def test_a_frozen_recurrence_stays_frozen(remedy: str, held: bool) -> None:
    model = any_of(remedy)
    module = model.rnn.requires_grad_(False)
    optimizer = SGD((model if held else model.head).parameters(), 0.1)
    apply(remedy, module, model, to=optimizer).check_commit()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    before = kept(module)
    model(inputs()).square().sum().backward()
    optimizer.step()
    assert {n for n, v in kept(module).items() if not same_bits(v, before[n])} <= {
        "recurrent.vectors"
    }


@every_remedy
def test_a_half_frozen_recurrence_trains_what_is_new(remedy: str) -> None:
    model = any_of(remedy)
    model.rnn.get_parameter("weight_ih_l0").requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    apply(remedy, model.rnn, model, to=optimizer).check_commit()
    new = [p for name, p in model.rnn.named_parameters() if "." in name]
    assert all(p.requires_grad for p in new)
    model(inputs()).square().sum().backward()
    assert all(p.grad is not None for p in new)


@every_remedy
def test_other_modules_are_left_alone(remedy: str) -> None:
    others: list[nn.Module] = [nn.LSTMCell(IN, HIDDEN), nn.GRUCell(IN, HIDDEN)]
    others += [nn.RNNCell(IN, HIDDEN), nn.Linear(IN, HIDDEN), cells.OutputNormRNN(IN, HIDDEN)]
    others += [type("Own", (KINDS[kind](1, 1).__class__,), {})(IN, HIDDEN) for kind in AROUND]
    others += [KINDS[kind](IN, HIDDEN) for kind in AROUND if kind not in BECOMES[remedy]]
    others += [cell(IN, HIDDEN) for classes in BECOMES.values() for cell in set(classes.values())
               if classes is not AROUND]  # fmt: skip
    if remedy in BETWEEN:
        others += [KINDS[kind](IN, HIDDEN) for kind in AROUND]
    for module in others:
        before, cls = kept(module), type(module)
        assert apply(remedy, module).mark() == 0, cls
        assert type(module) is cls and equal(kept(module), before)


def test_the_children_of_the_root_have_no_prefix() -> None:
    module = nn.LSTM(IN, HIDDEN)
    optimizer = Adam(module.named_parameters())
    apply("layer_norm_inside", module, to=optimizer)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in module.named_parameters()]


@pytest.mark.parametrize("remedy", ["weight_drop", "bounded_rnn", "weight_norm", "gated_rnn"])
def test_an_lbfgs_at_work_takes_what_has_no_parameters(remedy: str) -> None:
    model = any_of(remedy)
    optimizer: Optimizer = LBFGS(model.parameters())

    def closure() -> Any:
        loss = model(inputs()).square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    new = [name for name, _ in after(remedy).named_parameters() if "." in name]
    if new:
        with pytest.raises(RefusedError, match="RG906"):
            apply(remedy, model.rnn, model, to=optimizer)
    else:
        assert apply(remedy, model.rnn, model, to=optimizer).mark() > 0


def after(remedy: str, **dose: Any) -> Any:
    """A module of two layers that the remedy has been applied to."""
    model = any_of(remedy)
    apply(remedy, model.rnn, model, **dose)
    return model.rnn


@pytest.mark.parametrize("remedy", SEEDED)
def test_the_doses_seed_decides_and_no_global_one(remedy: str) -> None:
    models = [any_of(remedy) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(int(torch.randint(9, ())))
        apply(remedy, model.rnn, model, seed=seed)
    first, second, other = (model.state_dict() for model in models)
    assert equal(first, second)
    assert not equal(first, other)


def test_draws_are_the_cpus_whatever_the_default_device_is() -> None:
    for remedy in SEEDED:
        model, usual = any_of(remedy), any_of(remedy)
        apply(remedy, usual.rnn)
        with torch.device("meta"):
            apply(remedy, model.rnn)
        assert equal(model.state_dict(), usual.state_dict())


# --- the function ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["one layer", "both ways"])
@pytest.mark.parametrize(
    ("remedy", "dose"),
    [("attention_readout", {}), ("weight_norm", {}), ("spectral_bound", {"bound": 9.0})],
)
def test_at_the_start_the_function_is_the_plain_ones(
    remedy: str, dose: dict[str, Any], kind: str, form: str
) -> None:
    model = reader(kind, form)
    plain = copy.deepcopy(model.rnn)
    apply(remedy, model.rnn, **dose)
    tolerance = 1e-14 if remedy == "weight_norm" else 0.0
    for mine, theirs in zip(flat(model.rnn(inputs())), flat(plain(inputs())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


ELSEWHERE = [name for name in BECOMES if name not in ("attention_readout", "weight_norm")]


@pytest.mark.parametrize("remedy", ELSEWHERE)
def test_elsewhere_it_is_another(remedy: str) -> None:
    model = any_of(remedy)
    plain = copy.deepcopy(model.rnn)
    apply(remedy, model.rnn)
    assert not same(model.rnn, plain)


@pytest.mark.parametrize(
    ("remedy", "dose", "place", "expected"),
    [
        ("residual", {"gate_bias": -3.0}, "between.gates.1.first_bias", -3.0),
        ("residual", {"gate_bias": 0.0}, "between.gates.1.first_bias", 0.0),
        ("residual", {"shortcut": "residual"}, "between.shortcut", "residual"),
        ("layer_norm_between", {}, "between.norms.0.eps", 1e-3),
        ("variational_dropout", {}, "between.dropout", 0.3),
        ("variational_dropout", {}, "between.input_dropout", 0.2),
        ("weight_drop", {"p": None}, "recurrent.p", 0.5),
        ("weight_norm", {"over": None}, "recurrent.over", "row"),
        ("spectral_bound", {"bound": None}, "recurrent.bound", 1.0),
        ("attention_readout", {}, "attention.heads", 2),
        ("zoneout", {}, "zoneout.cell", 0.3),
        ("zoneout", {"hidden": None}, "zoneout.hidden", 0.05),
        ("zoneout", {"hidden": 0.0}, "zoneout.hidden", 0.0),
        ("bounded_rnn", {}, "recurrence.activation", "elu"),
        ("bounded_rnn", {}, "recurrence.bound", 0.5),
        ("bounded_rnn", {"bound": None, "memory": 10}, "recurrence.bound", 2 ** (1 / 20)),
        ("bounded_rnn", {"activation": None}, "recurrence.activation", "tanh"),
        ("indrnn", {}, "recurrence.bound", 2 ** (1 / (2 * T))),
        ("indrnn", {"activation": None}, "recurrence.activation", "tanh"),
    ],
)
def test_the_dose_arrives(remedy: str, dose: dict[str, Any], place: str, expected: Any) -> None:
    found = after(remedy, **dose)
    for name in place.split("."):
        found = found[name] if isinstance(found, nn.ModuleDict) else getattr(found, name)
    assert found == expected


def test_the_memory_sets_the_time_scales() -> None:
    units = (torch.arange(HIDDEN).double() + 0.5) / HIDDEN
    chrono = (1 + (T - 2) * units).log()
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)
    rows = after("layer_norm_inside").norm_l1.shift.detach().chunk(4)
    close(rows[1], chrono)
    close(rows[0], -chrono)
    rows = after("layer_norm_inside", memory=None, forget=0.0).norm_l0.shift.detach().chunk(4)
    assert not bool(rows[0].any()) and not bool(rows[1].any())
    close(after("gated_rnn").gate_l1.bias.detach(), -chrono)
    assert after("gated_rnn", memory=None).gate_l0.bias.eq(-1).all()
    carry = after("residual_rnn").residual_l1.carry.detach()
    assert float(carry.max()) == pytest.approx(1 - 1 / T, abs=1e-7) and float(carry.min()) == 0


def test_an_indrnn_starts_as_its_paper_says() -> None:
    module, bound = after("indrnn"), 2 ** (1 / (2 * T))
    for name, low in (("weight_hh_l0", 0.0), ("weight_hh_l1", 2 ** (-1 / T))):
        weight = module.get_parameter(name).detach()
        units = weight.diagonal()
        assert torch.equal(weight, torch.diag(units))
        assert low - 1e-6 <= float(units.min()) and float(units.max()) <= bound + 1e-6
        assert len(set(units.tolist())) == HIDDEN
    assert float(after("indrnn", read_last=False).weight_hh_l1.detach().diagonal().min()) < 0.9


def test_a_residual_round_one_layer_needs_its_width() -> None:
    module = nn.GRU(HIDDEN, HIDDEN)
    apply("residual", module)
    assert type(module) is cells.FusedGRU
    both = nn.GRU(2 * HIDDEN, HIDDEN, bidirectional=True)
    assert apply("residual", both).mark() > 0


@pytest.mark.parametrize(
    ("dose", "layers", "acts"),
    [
        ({"dropout": 0.3, "input_dropout": 0.0}, 1, False),
        ({"dropout": 0.0, "input_dropout": 0.3}, 1, True),
        ({"dropout": 0.3, "input_dropout": 0.0}, 2, True),
        ({"dropout": 0.0, "input_dropout": 0.0}, 2, False),
    ],
)
def test_a_dropout_that_would_act_nowhere_adds_nothing(
    dose: dict[str, Any], layers: int, acts: bool
) -> None:
    edit = apply("variational_dropout", nn.RNN(IN, HIDDEN, num_layers=layers), **dose)
    assert (edit.mark() > 0) == acts


# --- several at one module ---------------------------------------------------------------


def test_remedies_around_the_kernel_join() -> None:
    model = reader("lstm", "two layers")
    optimizer, names = Adam(model.named_parameters()), set[str]()
    edit, marks, prints = Edit(model, optimizer), [], []
    for remedy in ("layer_norm_between", "weight_norm", "attention_readout"):
        marks.append(edit.mark())
        prints.append(fingerprint(model, optimizer))
        REMEDY[remedy].apply(edit, model.rnn, DOSES[remedy])
        names.add(str(REMEDY[remedy].adds))
        assert {name for name, _ in model.rnn.named_children()} == names
        assert type(model.rnn) is cells.FusedLSTM
    edit.check_commit()
    full = fingerprint(model, optimizer)
    for taken in ("residual", "spectral_bound", "layer_norm", "zoneout"):
        dose = DOSES.get(taken, {})
        REMEDY[taken].apply(edit, model.rnn, dose)
        assert fingerprint(model, optimizer) == full
    for mark, before in zip(marks[::-1], prints[::-1], strict=True):
        edit.rollback_(mark)
        assert fingerprint(model, optimizer) == before
    assert type(model.rnn) is nn.LSTM


def test_a_plan_of_several_is_replayed() -> None:
    several = ("residual", "weight_drop", "attention_readout")
    plan = Plan(changes=tuple(change(remedy) for remedy in several))
    models = [reader("gru", "two layers") for _ in range(2)]
    report = rnnguard.apply(models[0], Adam(models[0].parameters()), plan)
    assert [each.remedy for each in report.changes] == list(several)
    for remedy in several:
        apply(remedy, models[1].rnn, models[1])
    assert same(*models)
    report.undo()
    assert type(models[0].rnn) is nn.GRU


# --- remedies of the values, on what these leave behind ------------------------------------


def values(remedy: str, module: nn.Module, **dose: Any) -> Edit:
    edit = Edit(module, None)
    REMEDY[remedy].apply(edit, module, dose)
    return edit


@pytest.mark.parametrize("kind", NORMED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("remedy", "dose"), [("chrono_bias", {"t_max": T}), ("uniform_gate_bias", {})]
)
def test_a_keep_bias_lies_in_the_norms_shift(
    remedy: str, dose: dict[str, Any], kind: str, bias: bool
) -> None:
    module = NORMED[kind](IN, HIDDEN, num_layers=2, bidirectional=True, bias=bias)
    plain = plain_class(module)
    assert plain is not None
    twin: nn.Module = plain(IN, HIDDEN, num_layers=2, bidirectional=True)
    before, whole = kept(module), fingerprint(module)
    edit = values(remedy, module, **dose, seed=3)
    written = {n for n, v in kept(module).items() if not same_bits(v, before[n])}
    shifts = {name for name in before if name.endswith(".shift")}
    assert written == (shifts if kind in ("lstm", "gru") else set())
    values(remedy, twin, **dose, seed=3)
    for name in written:
        layer = name.split(".")[0].removeprefix("norm_")
        meant, was = twin.get_parameter(f"bias_ih_{layer}").detach(), before[name]
        keeps = meant != 0
        assert int(keeps.sum()) == HIDDEN * (2 if kind == "lstm" else 1)
        assert torch.equal(module.get_parameter(name), torch.where(keeps, meant, was))
    edit.undo_()
    assert fingerprint(module) == whole


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_keep_bias_from_before_leaves_the_normalised_sum(kind: str) -> None:
    """It would drown the input there; the rows of the other gates stay."""
    models, answers = [reader(kind, "one layer") for _ in range(2)], []
    values("chrono_bias", models[0].rnn, t_max=200, seed=3)
    for model in models:
        before = kept(model.rnn)
        apply("layer_norm_inside", model.rnn, memory=200)
        gates = slice(0, 2 * HIDDEN) if kind == "lstm" else slice(HIDDEN, 2 * HIDDEN)
        for name in ("bias_ih_l0", "bias_hh_l0"):
            before[name][gates] = 0.0
            assert torch.equal(model.rnn.get_parameter(name), before[name])
        one, other = (model.rnn(torch.randn(60, BATCH, IN).double())[0] for _ in range(2))
        answers.append(float((one - other).detach()[30:].square().mean().sqrt()))
    assert answers[0] > 0.5 * answers[1]
    silent = torch.zeros(200, BATCH, IN, dtype=torch.float64)
    models[0].rnn(silent)[0][-1].square().sum().backward()
    gradients = [float(p.grad.norm()) for p in models[0].rnn.parameters() if p.grad is not None]
    assert 0 < max(gradients) < 100


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_normed_cell_then_keeps_as_the_dose_says(kind: str) -> None:
    """With gains of 0 only the shift acts, and the state follows from it by hand."""
    module = NORMED[kind](IN, HIDDEN, dtype=torch.float64)
    values("chrono_bias", module, t_max=T, seed=3)
    with torch.no_grad():
        module.norm_l0.gain_ih.zero_()
        module.norm_l0.gain_hh.zero_()
    state = module(inputs())[1]
    rows = module.norm_l0.shift.detach().chunk(4 if kind == "lstm" else 3)
    if kind == "lstm":
        keep, written = rows[1].sigmoid(), rows[0].sigmoid() * rows[2].tanh()
    else:
        keep = rows[1].sigmoid()
        written = (1 - keep) * rows[2].tanh()
    wanted = written * (1 - keep**STEPS) / (1 - keep)
    found = state[1] if kind == "lstm" else state
    torch.testing.assert_close(found[0], wanted.expand(BATCH, -1), rtol=1e-10, atol=1e-12)


def test_without_its_norms_a_normed_cell_keeps_by_its_bias() -> None:
    module = NORMED["lstm"](IN, HIDDEN)
    module.norm_l0.active = False
    before = kept(module)
    values("chrono_bias", module, t_max=T, seed=3)
    written = {n for n, v in kept(module).items() if not same_bits(v, before[n])}
    assert written == {"bias_ih_l0", "bias_hh_l0"}


def independent(bound: float, *units: float) -> cells.IndRNN:
    module = cells.IndRNN(IN, len(units), bound=bound, activation="tanh", dtype=torch.float64)
    with torch.no_grad():
        module.get_parameter("weight_hh_l0").fill_(5.0).diagonal().copy_(torch.tensor(units))
    return module


def test_orthogonal_does_nothing_to_independent_units() -> None:
    module = independent(1.0, 0.9, 0.5)
    before = fingerprint(module)
    assert values("orthogonal", module, gain=1.0, seed=3).mark() == 0
    assert fingerprint(module) == before


@pytest.mark.parametrize(
    ("remedy", "dose", "units", "expected"),
    [
        ("recurrent_gain", {"target": 0.5}, (3.0, -0.4, 0.2), (0.5, -0.2, 0.1)),
        ("recurrent_gain", {"target": 1.0}, (3.0, -0.4, 0.2), (3.0, -0.4, 0.2)),
        ("critical_gain", {"factor": 0.5}, (3.0, -0.4, 0.2), (0.5, -0.2, 0.1)),
        ("critical_gain", {"factor": 2.0}, (0.8, -0.4, 0.2), (1.0, -0.8, 0.4)),
    ],
)
def test_gains_of_independent_units_are_those_of_the_bounded_diagonal(
    remedy: str, dose: dict[str, Any], units: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    module = independent(1.0, *units)
    values(remedy, module, **dose)
    wanted = torch.full((3, 3), 5.0, dtype=torch.float64).diagonal_scatter(
        torch.tensor(expected, dtype=torch.float64)
    )
    torch.testing.assert_close(
        module.get_parameter("weight_hh_l0").detach(), wanted, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("over", ["row", "gate"])
@pytest.mark.parametrize(
    ("remedy", "dose"),
    [
        ("orthogonal", {"gain": 1.0, "seed": 3}),
        ("critical_gain", {"factor": 0.5}),
        ("recurrent_gain", {"target": 0.1}),
    ],
)
def test_the_gains_of_a_weight_norm_follow(remedy: str, dose: dict[str, Any], over: str) -> None:
    model = reader("gru", "both ways")
    twin = copy.deepcopy(model.rnn)
    apply("weight_norm", model.rnn, over=over)
    before = fingerprint(model.rnn)
    edit = values(remedy, model.rnn, **dose)
    values(remedy, twin, **dose)
    made = model.rnn.recurrent(recurrent_parameters(model.rnn), False)
    torch.testing.assert_close(made, recurrent_parameters(twin), rtol=1e-12, atol=1e-14)
    edit.undo_()
    assert fingerprint(model.rnn) == before


# --- doses -------------------------------------------------------------------------------


def prescribed(remedy: str, wanted: dict[str, Any], site: Any = None) -> Any:
    return REMEDY[remedy].prescribe(wanted, site, run_readings(seed=5))


GATES = {"seed": 5}
PRESCRIPTIONS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any] | None]] = [
    ("layer_norm_between", {}, {"layers": 2}, {}),
    ("layer_norm_between", {}, {"layers": 1}, None),
    ("residual", {}, {"layers": 3}, {"shortcut": "residual"}),
    ("residual", {"by": "highway"}, {"layers": 3}, {"shortcut": "highway", "gate_bias": -2.0}),
    ("residual", {}, {"layers": 3, "residual": True}, None),
    ("residual", {}, {"layers": 1}, None),
    ("variational_dropout", {}, {"layers": 2}, {"dropout": 0.25, "input_dropout": 0.0}),
    ("variational_dropout", {}, {"layers": 1}, None),
    (
        "variational_dropout",
        {"input_dropout": 0.1},
        {"layers": 1},
        {"dropout": 0.0, "input_dropout": 0.1},
    ),
    ("weight_drop", {}, {}, {"p": 0.5}),
    ("weight_drop", {"p": 0.2}, {}, {"p": 0.2}),
    ("weight_norm", {}, {}, {"over": "row"}),
    ("weight_norm", {"by": "gate"}, {}, {"over": "gate"}),
    ("spectral_bound", {}, {}, {"bound": 1.0}),
    ("orthogonal_parametrization", {}, {}, {}),
    *((name, {}, {"remade": True}, None) for name in BECOMES if name.startswith("weight_")),
    ("spectral_bound", {}, {"remade": True}, None),
    ("orthogonal_parametrization", {}, {"remade": True}, None),
    ("attention_readout", {"width": 8}, {"readout": "last_step"}, {"width": 8, "seed": 5}),
    ("attention_readout", {}, {"readout": "final_state"}, None),
    ("attention_readout", {}, {"readout": "pooled", "bypass": True}, None),
    ("layer_norm_inside", {}, {}, {"memory": 100}),
    ("layer_norm_inside", {"memory": 30}, {}, {"memory": 30}),
    ("layer_norm_inside", {"gain": 0.1}, {"memory_needed": 2}, {"gain": 0.1, "forget": 1.0}),
    ("layer_norm_inside", {}, {"memory_needed": None}, {"forget": 1.0}),
    ("layer_norm_inside", {}, {"cell": "rnn_relu"}, {}),
    ("zoneout", {}, {}, {"hidden": 0.05, "cell": 0.5}),
    ("zoneout", {"hidden": 0.0}, {"cell": "gru"}, {"hidden": 0.0}),
    ("zoneout", {}, {"cell": "rnn_tanh"}, None),
    ("residual_rnn", {}, {"cell": "rnn_tanh"}, {"memory": 100}),
    ("residual_rnn", {}, {"cell": "rnn_tanh", "memory_needed": None}, None),
    ("bounded_rnn", {}, {"cell": "rnn_relu"}, {"memory": 100}),
    ("bounded_rnn", {}, {"cell": "rnn_relu", "memory_needed": None}, {}),
    ("bounded_rnn", {"bound": 1.0}, {"cell": "rnn_relu"}, {"bound": 1.0}),
    ("indrnn", {}, {"cell": "rnn_tanh"}, {"memory": 100, "read_last": True, "seed": 5}),
    (
        "indrnn",
        {"by": "relu"},
        {"cell": "rnn_tanh", "memory_needed": None, "readout": "pooled"},
        {"activation": "relu", "read_last": False, "seed": 5},
    ),
    ("gated_rnn", {}, {"cell": "rnn_relu"}, {"memory": 100, "seed": 5}),
    ("gated_rnn", {}, {"cell": "rnn_relu", "memory_needed": None}, {"bias": -1.0, "seed": 5}),
    ("gate_last_gru", {}, {"cell": "gru"}, {}),
    ("gate_last_gru", {}, {"cell": "lstm"}, None),
    *((name, {}, {"cell": "lstm"}, None) for name, k in BECOMES.items() if "lstm" not in k),
]


@pytest.mark.parametrize(("remedy", "wanted", "site", "expected"), PRESCRIPTIONS)
def test_the_readings_prescribe(
    remedy: str, wanted: dict[str, Any], site: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    asked = dict(wanted)
    dose = prescribed(remedy, wanted, site_readings(**site))
    assert dose == expected and wanted == asked
    if dose is not None:
        kind = {"rnn_tanh": "tanh", "rnn_relu": "relu"}.get(site.get("cell", ""), "")
        model = reader(kind or site.get("cell", "lstm"), "two layers")
        plan = Plan(changes=(change(remedy).model_copy(update={"dose": dose}),))
        assert rnnguard.apply(model, Adam(model.parameters()), plan).changes


@every_remedy
def test_a_site_that_is_hand_written_or_none_has_no_dose(remedy: str) -> None:
    assert prescribed(remedy, {}) is None
    assert prescribed(remedy, {}, site_readings(cell="custom", layers=2, readout="pooled")) is None


@pytest.mark.parametrize(
    ("remedy", "form", "near"),
    [
        ("residual", "hihgway", "highway"),
        ("weight_norm", "rows", "row"),
        ("indrnn", "leaky", "leaky_relu"),
        ("bounded_rnn", "tahn", "tanh"),
    ],
)
def test_a_form_that_does_not_exist_is_answered_with_the_nearest(
    remedy: str, form: str, near: str
) -> None:
    with pytest.raises(RulesError, match=rf"did you mean '{near}'\? \(RG914\)"):
        prescribed(remedy, {"by": form}, site_readings(layers=2))


@pytest.mark.parametrize(
    ("remedy", "dose"),
    [
        ("weight_drop", {"p": 1.5}),
        ("variational_dropout", {"dropout": -0.1}),
        ("zoneout", {"hidden": 2.0}),
        ("spectral_bound", {"bound": 0.0}),
        ("residual", {"shortcut": "dense"}),
        ("attention_readout", {"heads": 3}),
        ("layer_norm_inside", {"memory": 2}),
        ("indrnn", {"activation": "gelu"}),
    ],
)
def test_a_dose_that_cannot_be_is_refused_before_anything_is_touched(
    remedy: str, dose: dict[str, Any]
) -> None:
    model = any_of(remedy)
    optimizer = Adam(model.parameters())
    before = fingerprint(model, optimizer)
    with pytest.raises(RefusedError, match="RG915"):
        rnnguard.apply(model, optimizer, Plan(changes=(change(remedy, **dose),)))
    assert fingerprint(model, optimizer) == before
