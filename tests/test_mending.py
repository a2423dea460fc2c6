"""Which remedies are tried where, on what they are planned, and what happens to the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

import rnnguard
from rnnguard.errors import RewriteError
from rnnguard.mending import REMEDY
from rnnguard.nn import OutputNormGRU, OutputNormLSTM
from rnnguard.probe.snapshot import fingerprint, same_bits
from rnnguard.records import Change
from rnnguard.remedies.remedy import Remedy
from rnnguard.report.report import Report
from rnnguard.rewrite.stepguard import guard_of

IN, HIDDEN, STEPS, BATCH = 5, 32, 60, 8
VALUES: dict[str, Any] = {"memory": STEPS, "tiers": ("values",)}


class Chain(nn.Module):
    """Recurrences one after the other; a head reads the last step of the last one."""

    def __init__(self, *parts: nn.RNNBase) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.head = nn.Linear(parts[-1].hidden_size, 4)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)[0]
        output: Tensor = self.head(x[:, -1])
        return output


def lstm(features: int = IN, hidden: int = HIDDEN) -> nn.LSTM:
    return nn.LSTM(features, hidden, batch_first=True)


def noise(scale: float = 1.0, steps: int = STEPS) -> Tensor:
    return scale * torch.randn(BATCH, steps, IN)


def mend(
    model: nn.Module, inputs: Any, optimizer: Optimizer | None = None, **options: Any
) -> Report:
    return rnnguard.stabilize(
        model,
        optimizer or Adam(model.parameters()),
        inputs=inputs,
        **{"memory": STEPS} | options,
    )


def at(report: Report, path: str | None) -> list[Change]:
    return [change for change in report.changes if change.path == path]


def tried(report: Report, path: str | None = "parts.0") -> list[str]:
    return [change.remedy for change in at(report, path)]


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    state = model.state_dict()
    return {name for name, value in before.items() if not same_bits(state[name], value)}


DOSES = {
    "chrono_bias": '{ t_max = "memory_needed" }',
    "orthogonal": "{ gain = 0.01 }",  # worse than any default
}


def own_row(cell: str, *remedies: str, scope: str = "recurrence") -> str:
    """A scenario that comes before the built-in ones of its scope."""
    doses = ", ".join(f"{name} = {DOSES[name]}" for name in remedies if name in DOSES)
    lines = (
        'schema = 1\n[[scenario]]\nid = "own"\nwhy = "A test."\nrefs = ["a test"]',
        f'scope = "{scope}"\nwhen = {{ cell = "{cell}" }}\napply = {list(remedies)}',
        f"dose = {{ {doses} }}\n",
    )
    return "\n".join(lines)


def folder_of(folder: Path, row: str) -> str:
    (folder / "scenarios.toml").write_text(row, encoding="utf-8")
    return str(folder)


# --- planned on what is there by then ----------------------------------------------------


def test_the_second_site_is_planned_on_what_the_first_one_then_gives() -> None:
    """An exploding ReLU recurrence drives the LSTM behind it into saturation, until mended."""
    relu = nn.RNN(IN, HIDDEN, nonlinearity="relu", batch_first=True)
    nn.init.normal_(relu.weight_hh_l0, 0, 1.6 / HIDDEN**0.5)
    model = Chain(relu, lstm(HIDDEN))
    report = mend(model, noise())
    assert report.before["parts.0"].level == "exploding"
    assert report.before["parts.1"].input_rms > 1e4
    assert report.before["parts.1"].input_drive > 1e4
    scaled = [change for change in at(report, "parts.1") if change.remedy == "variance_scaling"]
    assert len(scaled) == 1
    after = report["parts.1"].input_rms or 0.0
    assert float(scaled[0].dose["input_rms"] or 0) == pytest.approx(max(1.0, after))
    assert after < 10
    assert {change.scenario for change in scaled} == {"lstm-fading-chrono"}
    assert (report["parts.0"].level, report["parts.1"].level) == ("healthy", "healthy")


def test_sites_are_mended_in_the_order_of_their_calls_and_then_the_steps() -> None:
    model = Chain(nn.GRU(IN, HIDDEN, batch_first=True), lstm(HIDDEN))
    report = mend(model, noise())
    assert list(dict.fromkeys(change.path for change in report.changes)) == [
        "parts.0",
        "parts.1",
        None,
    ]
    assert [change.tier for change in report.plan] == sorted(
        (change.tier for change in report.plan), key=("step", "values", "structure").index
    )


def test_the_input_is_judged_after_the_recurrence() -> None:
    """The recurrence's own row has scaled the input weights, and leaves the input's row no work."""
    model = Chain(lstm())
    report = mend(model, noise(30))
    assert report.before["parts.0"].input_drive > 4
    assert report["parts.0"].input_drive < 1
    assert tried(report) == ["chrono_bias", "variance_scaling"]
    assert {change.scenario for change in at(report, "parts.0")} == {"lstm-fading-chrono"}


def test_an_overdriven_input_is_still_cured_where_the_recurrence_needs_nothing() -> None:
    report = mend(Chain(lstm()), noise(100, steps=10), memory=1)
    assert report.before["parts.0"].input_drive > 4
    assert [(change.remedy, change.scenario) for change in at(report, "parts.0")] == [
        ("variance_scaling", "overdriven-input")
    ]


def test_the_output_is_judged_after_the_recurrence() -> None:
    """The keep bias closes the write gate, so that the output becomes faint only then."""
    model = Chain(nn.GRU(IN, HIDDEN, batch_first=True))
    report = mend(model, noise(1e-3))
    assert report.before["parts.0"].output_rms > 0.003
    assert tried(report) == ["chrono_bias", "layer_norm"]
    assert at(report, "parts.0")[1].scenario == "faint-output"
    assert isinstance(model.parts[0], OutputNormGRU)


# --- tried, kept, taken back -------------------------------------------------------------


def test_health_reached_early_ends_the_search() -> None:
    """The row holds three corrections of the gain; two are enough."""
    report = mend(Chain(nn.RNN(IN, 64, nonlinearity="relu", batch_first=True)), noise())
    row = ["orthogonal", "critical_gain", "critical_gain", "critical_gain"]
    assert tried(report) == row[: len(tried(report))] != row
    assert all(change.outcome == "applied" for change in at(report, "parts.0"))
    assert report["parts.0"].level == "healthy"


def test_a_remedy_after_the_one_that_sufficed_is_not_tried(tmp_path: Path) -> None:
    row = own_row("gru", "chrono_bias", "orthogonal")
    model = Chain(nn.GRU(IN, HIDDEN, batch_first=True))
    before = kept(model)
    report = mend(model, noise(), rules=folder_of(tmp_path, row), tiers=("values",))
    assert tried(report) == ["chrono_bias"]
    assert changed(model, before) == {"parts.0.bias_ih_l0", "parts.0.bias_hh_l0"}


def test_what_makes_things_worse_is_taken_back_bit_by_bit(tmp_path: Path) -> None:
    row, model, x = own_row("lstm", "orthogonal"), Chain(lstm()), noise()
    optimizer = Adam(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = fingerprint(model, optimizer)
    report = mend(model, x, optimizer, rules=folder_of(tmp_path, row), tiers=("values",))
    (change,) = report.changes
    assert (change.remedy, change.outcome, change.path) == ("orthogonal", "taken back", "parts.0")
    assert f"log10 R({STEPS})" in change.result
    assert len(report.plan) == 0
    assert report["parts.0"].retention_at_memory == report.before["parts.0"].retention_at_memory
    assert fingerprint(model, optimizer) == before


def test_a_norm_is_taken_back_with_its_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm goes, and with it what the optimizer had taken up."""

    def spoiled(edit: Any, module: nn.Module, dose: Any) -> None:
        norm.apply(edit, module, dose)
        edit.write_(module.weight_hh_l0, 1e-3 * module.weight_hh_l0.detach())
        edit.write_(module.bias_ih_l0, module.bias_ih_l0.detach() - 5)

    norm = REMEDY["layer_norm"]
    remedy = Remedy("layer_norm", "structure", "", spoiled, aim="output")
    monkeypatch.setitem(REMEDY, "layer_norm", remedy)
    row = own_row("lstm", "layer_norm", scope="output")
    model, x = Chain(lstm()), noise()
    optimizer = Adam(model.named_parameters())
    before = fingerprint(model, optimizer)
    rules = folder_of(tmp_path, row)
    report = mend(model, x, optimizer, rules=rules, tiers=("structure",), memory=3)
    assert [(change.remedy, change.outcome) for change in report.changes] == [
        ("layer_norm", "taken back")
    ]
    assert fingerprint(model, optimizer) == before


def test_one_taken_back_does_not_stop_the_next(tmp_path: Path) -> None:
    row = own_row("lstm", "orthogonal", "chrono_bias")
    model = Chain(lstm())
    before = kept(model)
    report = mend(model, noise(), rules=folder_of(tmp_path, row), tiers=("values",))
    assert [(change.remedy, change.outcome) for change in at(report, "parts.0")] == [
        ("orthogonal", "taken back"),
        ("chrono_bias", "applied"),
    ]
    assert changed(model, before) == {"parts.0.bias_ih_l0", "parts.0.bias_hh_l0"}
    assert [change.remedy for change in report.plan] == ["chrono_bias"]


class Tied(nn.Module):
    """Two ReLU recurrences of one recurrent matrix; the first one's units are always on."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.partly = (
            nn.RNN(IN, HIDDEN, nonlinearity="relu", batch_first=True) for _ in range(2)
        )
        self.partly.weight_hh_l0 = self.always.weight_hh_l0
        self.head = nn.Linear(2 * HIDDEN, 4)
        with torch.no_grad():
            self.always.weight_hh_l0.copy_(0.95 * torch.eye(HIDDEN).roll(1, 0))
            self.always.bias_ih_l0.fill_(5.0)
            self.partly.bias_ih_l0.zero_()
            self.partly.bias_hh_l0.zero_()

    def forward(self, x: Tensor) -> Tensor:
        ends = [self.always(x)[0][:, -1], self.partly(x.flip(1))[0][:, -1]]
        output: Tensor = self.head(torch.cat(ends, 1))
        return output


def test_a_site_is_not_mended_at_the_cost_of_one_on_the_same_weights() -> None:
    """The gain that units which are off call for makes those that are on explode."""
    model = Tied()
    report = mend(model, noise(0.3, steps=40), memory=40, tiers=("values",))
    assert report.before["always"].level == "healthy" != report.before["partly"].level
    gains = [change for change in at(report, "partly") if change.remedy == "critical_gain"]
    assert any("worse on the same weights: always" in change.result for change in gains)
    assert report["always"].level == "healthy"
    assert model.always.weight_hh_l0 is model.partly.weight_hh_l0


class Choosing(nn.Module):
    """Which recurrence runs rests on a bias that the first remedy writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = lstm(), nn.GRU(IN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.first if bool(self.first.bias_hh_l0.any()) else self.other
        output: Tensor = self.head(chosen(x)[0][:, -1])
        return output


def test_a_remedy_that_turns_the_model_away_from_the_site_is_taken_back() -> None:
    model = Choosing()
    report = mend(model, noise())
    tries = {change.remedy: change for change in at(report, "first")}
    assert tries["chrono_bias"].outcome == "taken back"
    assert tries["chrono_bias"].result == "the model no longer runs first"
    assert bool(model.first.bias_hh_l0.any()) and [site.path for site in report.sites] == ["first"]


# --- steps that cannot be guarded --------------------------------------------------------


def test_lbfgs_keeps_its_steps_while_the_values_are_mended() -> None:
    model = Chain(lstm())
    optimizer = LBFGS(model.parameters())
    hooks = len(optimizer._optimizer_step_pre_hooks)
    report = mend(model, noise(), optimizer)
    assert [refusal.code for refusal in report.refusals] == ["RG906"]
    assert {change.tier for change in report.changes} == {"values"}
    assert report["parts.0"].level == "healthy"
    assert guard_of(optimizer) is None
    assert len(optimizer._optimizer_step_pre_hooks) == hooks
    assert "rnnguard_step" not in optimizer.param_groups[0]


class Embedded(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(7, IN, sparse=sparse)
        self.chain = Chain(lstm())

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.chain(self.table(ids))
        return output


@pytest.mark.parametrize("sparse", [True, False])
def test_a_sparse_table_is_guarded_like_a_dense_one(sparse: bool) -> None:
    model = Embedded(sparse)
    optimizer = SGD(model.parameters(), 0.1)
    report = mend(model, torch.randint(7, (BATCH, STEPS)), optimizer)
    assert report.refusals == ()
    assert guard_of(optimizer) is not None
    assert "chrono_bias" in tried(report, "chain.parts.0")
    assert {change.tier for change in report.changes} == {"values", "step"}


def test_refusals_of_the_steps_are_silent_where_they_may_not_act() -> None:
    model = Chain(lstm())
    assert mend(model, noise(), LBFGS(model.parameters()), tiers=("values",)).refusals == ()


# --- modules that are not just torch's ---------------------------------------------------


class Own(nn.LSTM):
    """A class of the user's own."""


def test_a_subclass_keeps_its_class_and_gets_values() -> None:
    model = Chain(Own(IN, HIDDEN, batch_first=True))
    optimizer = Adam(model.parameters())
    report = mend(model, noise(1e-3), optimizer)
    assert [(refusal.code, refusal.path) for refusal in report.refusals] == [("RG910", "parts.0")]
    assert "Own" in report.refusals[0].fact
    assert type(model.parts[0]) is Own
    assert tried(report) == ["chrono_bias", "variance_scaling"]
    assert [name for name, _ in model.named_parameters() if "norm" in name] == []
    twin = Chain(lstm())
    assert "layer_norm" in tried(mend(twin, noise(1e-3)))


class Normed(Chain):
    """The output is normalised already."""

    def __init__(self, *parts: nn.RNNBase) -> None:
        super().__init__(*parts)
        self.norm = nn.LayerNorm(parts[-1].hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.parts[0](x)[0])[:, -1])
        return output


def test_no_second_norm_behind_one_of_the_users() -> None:
    model = Normed(lstm())
    report = mend(model, noise(1e-3))
    assert report.before["parts.0"].normalized
    assert "chrono_bias" in tried(report) and "layer_norm" not in tried(report)
    assert type(model.parts[0]) is nn.LSTM


def test_no_second_norm_behind_our_own() -> None:
    model, x = Chain(lstm()), noise(1e-3)
    optimizer = Adam(model.parameters())
    assert "layer_norm" in tried(mend(model, x, optimizer))
    assert type(model.parts[0]) is OutputNormLSTM
    before = fingerprint(model, optimizer)
    again = mend(model, x, optimizer)
    assert again["parts.0"].normalized
    assert again.changes == ()
    assert fingerprint(model, optimizer) == before


class Shared(nn.Module):
    """One recurrence under three paths, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = lstm()
        self.decoder = self.encoder
        self.kept = nn.ModuleList([self.encoder])
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.encoder(x)[0], self.decoder(x.flip(1))[0]
        output: Tensor = self.head(first[:, -1] + second[:, -1])
        return output


def test_aliases_are_changed_once() -> None:
    model = Shared()
    report = mend(model, noise(1e-3))
    assert [site.path for site in report.sites] == ["encoder"]
    assert report.sites[0].aliases == ("decoder", "kept.0")
    assert tried(report, "encoder") == ["chrono_bias", "variance_scaling", "layer_norm"]
    assert {change.path for change in report.changes} == {"encoder", None}
    assert model.encoder is model.decoder is model.kept[0]
    assert [n for n, _ in model.named_parameters() if "output_norm" in n] == [
        "encoder.output_norm.weight",
        "encoder.output_norm.bias",
    ]


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "bias_ih_l0", ""])
@pytest.mark.parametrize("held", [True, False])
def test_a_recurrence_frozen_in_part_is_left_as_it_is(frozen: str, held: bool) -> None:
    model = Chain(lstm())
    for name, parameter in model.parts[0].named_parameters():
        parameter.requires_grad_(frozen not in name)
    before, flags = kept(model), [p.requires_grad for p in model.parameters()]
    optimizer = Adam((model if held else model.head).parameters())
    report = mend(model, noise(1e-3), optimizer)
    assert [(refusal.code, refusal.path) for refusal in report.refusals] == [("RG902", "parts.0")]
    assert {change.tier for change in report.changes} == {"step"}
    assert changed(model, before) == set() and len(model.state_dict()) == len(before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert type(model.parts[0]) is nn.LSTM


def test_one_frozen_recurrence_does_not_keep_the_next_from_being_mended() -> None:
    model = Chain(lstm(), lstm(HIDDEN))
    model.parts[0].requires_grad_(False)
    report = mend(model, noise())
    assert [(refusal.code, refusal.path) for refusal in report.refusals] == [("RG902", "parts.0")]
    assert tried(report, "parts.0") == []
    assert "chrono_bias" in tried(report, "parts.1")


# --- whatever goes wrong -----------------------------------------------------------------


def test_an_output_of_another_shape_is_an_error_and_all_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = OutputNormLSTM.forward

    def narrower(self: Any, x: Any, state: Any = None) -> Any:
        output, last = forward(self, x, state)
        return output[..., 1:], last

    model, x = nn.Sequential(lstm(), Last()), noise(1e-3)
    optimizer = Adam(model.named_parameters())
    before = fingerprint(model, optimizer)
    monkeypatch.setattr(OutputNormLSTM, "forward", narrower)
    with pytest.raises(RewriteError) as caught:
        mend(model, x, optimizer)
    assert str(caught.value) == (
        "the outputs changed their form or dtype. The model and optimizer were restored. (RG916)"
    )
    assert fingerprint(model, optimizer) == before


class Last(nn.Module):
    def forward(self, pair: tuple[Tensor, Any]) -> Tensor:
        return pair[0][:, -1]


def test_a_model_that_no_longer_runs_is_an_error_and_all_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Any, x: Any, state: Any = None) -> Any:
        raise RuntimeError("no output today")

    model, x = Chain(lstm()), noise(1e-3)
    optimizer = Adam(model.named_parameters())
    before = fingerprint(model, optimizer)
    monkeypatch.setattr(OutputNormLSTM, "forward", broken)
    with pytest.raises(
        RewriteError, match="RuntimeError while rewriting: no output today"
    ) as caught:
        mend(model, x, optimizer)
    assert caught.value.code == "RG916"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert fingerprint(model, optimizer) == before


@pytest.mark.parametrize("memory", [STEPS, 200])
def test_mending_draws_nothing_from_the_global_generators(memory: int) -> None:
    model, x = Chain(lstm()), noise(steps=200)
    before = torch.get_rng_state()
    assert mend(model, x, memory=memory).changes
    assert torch.equal(torch.get_rng_state(), before)


BUILDS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lstm,
    "gru": lambda: nn.GRU(IN, HIDDEN, batch_first=True),
    "tanh": lambda: nn.RNN(IN, HIDDEN, batch_first=True),
}


@pytest.mark.parametrize("kind", BUILDS)
def test_the_same_seed_mends_alike_and_another_one_otherwise(kind: str) -> None:
    def mended(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Chain(BUILDS[kind]())
        assert mend(model, noise(), seed=seed, **{"tiers": ("values",)}).changes
        return model.state_dict()

    first, second, other = mended(1), mended(1), mended(2)
    assert all(same_bits(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
