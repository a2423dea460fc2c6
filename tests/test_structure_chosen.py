"""Structure is changed only where measuring shows that it helps beyond what values reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import run_readings, site_readings
from test_mending import BATCH, IN, Chain, at, folder_of, lstm, mend, noise, own_row
from torch import Tensor, nn
from torch.optim import Adam

import rnnguard
from rnnguard.decision.planning import matching
from rnnguard.decision.rulebook import load_rulebook
from rnnguard.nn import FusedLSTM, GatedRNN, LayerNormGRU
from rnnguard.probe.snapshot import fingerprint
from rnnguard.report.report import Report

LONG = 150


def structural(report: Report, outcome: str) -> list[str]:
    """The structural remedies that ended so, at the one recurrence."""
    changes = at(report, "parts.0")
    return [c.remedy for c in changes if c.outcome == outcome and c.tier == "structure"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rnn(**options: object) -> nn.RNN:
    return nn.RNN(IN, 32, batch_first=True, **options)  # type: ignore[arg-type]


def test_where_values_heal_no_structure_is_tried() -> None:
    for part in (lstm(), nn.GRU(IN, 32, batch_first=True)):
        report = mend(Chain(part), noise(steps=LONG), memory=LONG)
        assert report["parts.0"].level == "healthy"
        assert {c.tier for c in at(report, "parts.0")} == {"values"}
        assert type(part) in (nn.LSTM, nn.GRU)


def recall(batches: int = 8) -> list[tuple[Tensor, Tensor]]:
    """One of four symbols, then noise up to step LONG: all that tells lies at the longest lag."""
    found = []
    for _ in range(batches):
        label = torch.randint(4, (32,))
        x = torch.zeros(32, LONG, IN)
        x[torch.arange(32), 0, label] = 1
        x[:, 1:, 4] = torch.randn(32, LONG - 1)
        found.append((x, label))
    return found


def test_what_an_orthogonal_recurrence_cannot_carry_gets_a_gate() -> None:
    model, data = Chain(rnn()), recall()
    optimizer, before = Adam(model.parameters()), fingerprint(model)
    report = rnnguard.stabilize(model, optimizer, data, loss=nn.CrossEntropyLoss())
    values, structure = at(report, "parts.0")
    assert (values.remedy, values.outcome) == ("orthogonal", "applied")
    assert (structure.remedy, structure.scenario) == ("gated_rnn", "tanh-still-fading")
    assert structure.dose["memory"] == LONG
    assert report["parts.0"].level == "healthy" and type(model.parts[0]) is GatedRNN
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert model(data[0][0]).isfinite().all()
    report.undo()
    assert type(model.parts[0]) is nn.RNN and fingerprint(model) == before


@pytest.mark.parametrize("concentration", [None, 0.4])
def test_unless_the_data_tell_at_the_longest_lag_no_structure_is_tried(
    concentration: float | None,
) -> None:
    """On digits a gate costs a third of the accuracy of the orthogonal recurrence by itself."""
    for cell in ("rnn_tanh", "rnn_relu"):
        site = site_readings(cell=cell, level="vanishing", lag_concentration=concentration)
        assert matching(load_rulebook(), "structure", site, run_readings()) is None


def test_without_the_tier_the_structure_stays(tmp_path: Path) -> None:
    model = Chain(rnn())
    rules = folder_of(tmp_path, own_row("rnn_tanh", "gated_rnn", scope="structure"))
    report = mend(model, noise(steps=LONG), memory=LONG, rules=rules, tiers=("step", "values"))
    assert report["parts.0"].level != "healthy"
    assert structural(report, "applied") == structural(report, "taken back") == []
    assert type(model.parts[0]) is nn.RNN


@pytest.mark.parametrize(
    ("remedy", "cell", "kind"),
    [
        ("orthogonal_parametrization", "rnn_tanh", nn.RNN),
        ("bounded_rnn", "rnn_tanh", nn.RNN),
        ("layer_norm_inside", "rnn_tanh", nn.RNN),
        ("gate_last_gru", "gru", nn.GRU),
    ],
)
def test_structure_that_adds_nothing_over_values_is_taken_back(
    tmp_path: Path, remedy: str, cell: str, kind: type[nn.RNNBase]
) -> None:
    """Beside an orthogonal recurrence none of these keeps more of the gradient."""
    part = kind(IN, 32, batch_first=True, bias=False)
    model = Chain(part)
    parameters = dict(model.named_parameters())
    optimizer = Adam(model.parameters())
    rules = folder_of(tmp_path, own_row(cell, remedy, scope="structure"))
    report = mend(model, noise(steps=LONG), optimizer, memory=LONG, rules=rules)
    assert [c.remedy for c in at(report, "parts.0") if c.outcome == "applied"] == ["orthogonal"]
    assert structural(report, "taken back") == [remedy]
    assert report["parts.0"].level != "healthy" and type(part) is kind
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[name] is parameters[name] for name in now)
    assert len(optimizer.param_groups[0]["params"]) == len(now)


def test_gates_without_a_bias_get_their_offset_from_a_norm() -> None:
    model = Chain(nn.GRU(IN, 32, bias=False, batch_first=True))
    report = mend(model, noise(steps=LONG), memory=LONG)
    assert structural(report, "applied") == ["layer_norm_inside"]
    assert type(model.parts[0]) is LayerNormGRU and report["parts.0"].level == "healthy"


def test_a_silent_start_does_not_keep_the_norm_away() -> None:
    model, x = Chain(nn.GRU(IN, 32, bias=False, batch_first=True)), noise(steps=LONG)
    x[:, :30] = 0
    report = mend(model, x, memory=LONG)
    assert report.before["parts.0"].silent_input
    assert structural(report, "applied") == ["layer_norm_inside"]
    assert report["parts.0"].growth <= 100


def test_what_a_bound_can_tame_is_bounded() -> None:
    model = Chain(rnn(nonlinearity="relu"))
    nn.init.normal_(model.parts[0].weight_hh_l0, 0, 2 / 32**0.5)
    report = mend(model, noise(), tiers=("structure",))
    assert report.before["parts.0"].level == "exploding"
    assert structural(report, "applied") == ["bounded_rnn"]
    assert report["parts.0"].growth <= 2.1


def test_layers_far_apart_are_brought_together() -> None:
    deep = nn.LSTM(IN, 16, num_layers=8, batch_first=True)
    model = Chain(deep)
    report = mend(model, torch.randn(BATCH, 12, IN), memory=5, tiers=("structure",))
    assert (report.before["parts.0"].layer_ratio or 0) > 1e3
    assert structural(report, "applied") == ["residual"]
    assert type(deep) is FusedLSTM
    assert (report["parts.0"].layer_ratio or 0) < 50
    assert "RG404" in {finding.code for finding in report.findings}
    assert "RG404" not in {finding.code for finding in report.remaining}


def test_a_trained_stack_keeps_its_structure() -> None:
    model, x = Chain(rnn()), noise(steps=LONG)
    optimizer = Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    report = mend(model, x, optimizer, memory=LONG)
    assert structural(report, "applied") == structural(report, "taken back") == []
    assert report.before["parts.0"].trained


def test_a_remedy_that_no_probe_can_judge_is_done_where_a_rule_asks_for_it(tmp_path: Path) -> None:
    rules = folder_of(tmp_path, own_row("lstm", "zoneout", scope="structure"))
    model = Chain(lstm())
    report = mend(model, noise(), rules=rules)
    assert structural(report, "applied") == ["zoneout"]


def test_one_structure_does_not_stand_in_the_way_of_a_report(tmp_path: Path) -> None:
    """A second remedy finds a class of rnnguard's, which is no class of the user's."""
    rules = folder_of(tmp_path, own_row("lstm", "zoneout", "layer_norm_inside", scope="structure"))
    report = mend(Chain(nn.LSTM(IN, 32, bias=False, batch_first=True)), noise(), rules=rules)
    assert structural(report, "applied") == ["zoneout"]
    assert "RG910" not in {refusal.code for refusal in report.refusals}
