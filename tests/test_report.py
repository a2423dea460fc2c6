"""The report's verdict, its selection, its plain data; `made_up_report` serves the views too."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from rnnguard.decision.selection import Suppressed
from rnnguard.errors import Refusal, RNNGuardError, RulesError
from rnnguard.measurements import Exponent, Measurement, RunReadings, Site, SiteReadings
from rnnguard.records import Change, Finding, Level, Plan
from rnnguard.report import Report

STEPS = 100


def made_up_site(path: str = "encoder.lstm", **fields: Any) -> Site:
    known: dict[str, Any] = dict(
        module="torch.nn.modules.rnn.LSTM", cell="lstm", form="fused", input_size=5,
        hidden_size=32, layers=2, bidirectional=True, batch_first=True, proj_size=0, bias=True,
        dropout=0.0, steps=STEPS, batch=16, window=STEPS, calls=1, packed=False,
        readout="last_step", normalized=False, residual=False, location="model.py:18",
    )  # fmt: skip
    return Site(path=path, **known | fields)


def made_up_readings(
    path: str = "encoder.lstm", decay: float = 0.63, level: Level = "vanishing", **fields: Any
) -> SiteReadings:
    curve = tuple(k * math.log10(decay) for k in range(STEPS + 1))
    site = made_up_site(path)
    shared = SiteReadings.model_fields.keys() & Site.model_fields.keys()
    known: dict[str, Any] = {name: getattr(site, name) for name in shared}
    known |= dict(
        exponents=(Exponent(value=math.log(decay), stderr=0.001),), retention=curve,
        layer_readings=(), decay_per_step=decay, expansive=False, growth=1.0,
        growth_over_window=STEPS * math.log(decay),
        effective_length=min(STEPS, int(-2 / math.log10(decay))), memory_needed=STEPS,
        memory_source="declared", lag_concentration=None,
        retention_at_memory=curve[-1], spectral_radius=0.6,
        whole_matrix_orthogonal=False, forget_gate=0.5, forget_bias=0.0,
        forget_bias_doubled=False, saturation=0.02, dead_units=None, input_rms=1.0,
        input_drive=0.6, output_rms=0.2, silent_input=False, keep_gate=True, trained=False,
        level=level,
    )  # fmt: skip
    return SiteReadings(**known | fields)


def made_up_run(**fields: Any) -> RunReadings:
    known: dict[str, Any] = dict(
        basis="real data", batches=4, loss=2.303, grad_norm=1.9, grad_norm_spread=1.2,
        nonfinite=False, precision="fp32", device="cpu", optimizer="adam", learning_rate=1e-3,
        weight_decay=0.0, amsgrad=False, guarded=False, scheduled=False, parameters_missing=0,
        batches_per_epoch=90, total_steps=None, seed=0, seconds=1.84, torch="2.13.0",
    )  # fmt: skip
    return RunReadings(**known | fields)


def made_up_finding(code: str = "RG401", **fields: Any) -> Finding:
    known: dict[str, Any] = dict(
        name="vanishing-through-time", severity="error", path="encoder.lstm",
        location="model.py:18", message="the gradient shrinks by 0.63 per step; after 100 steps"
        " 9e-21 of it is left.", evidence={"retention_at_memory": "-20.07 (< -4)"},
        cure="rnnguard.stabilize(model, optimizer) sets the forget gate for the memory needed.",
        fix="values", refs=("https://arxiv.org/abs/1804.11188",),
    )  # fmt: skip
    return Finding(code=code, **known | fields)


BY_HAND = made_up_finding(
    "RG201", name="bidirectional-last-step", severity="warning", location="model.py:31",
    message="`out[:, -1]` reads a backward direction that has seen 1 of 100 steps.",
    evidence={}, cure="torch.cat([h_n[-2], h_n[-1]], dim=1)", fix="manual",
)  # fmt: skip
CHANGES = (
    Change(
        remedy="chrono_bias", path="encoder.lstm", tier="values", dose={"longest": 100},
        scenario="short-memory-lstm", why="Memory fades within 9 steps; the task needs 100.",
        outcome="applied", result="log10 R(100) from -20.1 to -1.3.",
    ),
    Change(
        remedy="layer_norm", path="encoder.lstm", tier="structure", dose={},
        scenario="layer-imbalance", why="Layer 1 gets 1e3 times the gradient of layer 0.",
        outcome="taken back", result="The imbalance stayed at 1e3.",
    ),
    Change(
        remedy="clip_gradient", path=None, tier="step", dose={"norm": 1.9512345},
        scenario="no-clipping", why="Gradient norms are not bounded.", outcome="applied",
    ),
)  # fmt: skip


def made_up_report(**fields: Any) -> Report:
    """An audit of one vanishing LSTM with two findings, unless the fields say otherwise."""
    known: dict[str, Any] = dict(
        sites=(made_up_site(),),
        before=Measurement(run=made_up_run(), sites=(made_up_readings(),)),
        after=None,
        findings=(made_up_finding(), BY_HAND),
        remaining=(made_up_finding(), BY_HAND),
        changes=(),
        plan=Plan(),
        notes=("Order of scenarios: first match wins.",),
    )
    return Report(**known | fields)


def stabilized_report(**fields: Any) -> Report:
    """The same model after three changes: the error is gone, the manual finding is not."""
    healthy = made_up_readings(decay=0.97, level="healthy")
    known: dict[str, Any] = dict(
        after=Measurement(run=made_up_run(grad_norm=1.1, loss=2.298), sites=(healthy,)),
        remaining=(BY_HAND,),
        changes=CHANGES,
        plan=Plan(changes=(CHANGES[0], CHANGES[2])),
        refusals=(
            Refusal("RG902", "decoder", "the weights are trained.", "Only step changes were made."),
        ),
    )
    return made_up_report(**known | fields)


@pytest.fixture
def rulebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rulebook of three rules, whatever the rule files hold."""
    pairs = [("RG101", "forget-bias-neutral"), ("RG201", "bidirectional-last-step")]
    rules = [types.SimpleNamespace(code=code, name=name) for code, name in pairs]
    team = types.SimpleNamespace(code="RG777", name="team-rule")
    module = types.ModuleType("rnnguard.decision.rulebook")
    module.load_rulebook = lambda extra=(): types.SimpleNamespace(  # type: ignore[attr-defined]
        rules=[*rules, *([team] if extra else [])]
    )
    monkeypatch.setitem(sys.modules, "rnnguard.decision.rulebook", module)


def codes(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.code for finding in findings]


def test_an_audit_with_an_error_is_not_ok() -> None:
    report = made_up_report()
    assert not report.ok
    assert report.level == "vanishing"
    assert report["encoder.lstm"].decay_per_step == 0.63
    assert repr(report) == "<Report: vanishing; sites 1, findings 2>"


def test_the_newest_measurement_speaks() -> None:
    report = stabilized_report()
    assert report.ok
    assert report.level == "healthy"
    assert report["encoder.lstm"].decay_per_step == 0.97
    assert report.before["encoder.lstm"].decay_per_step == 0.63
    assert codes(report.mended) == ["RG401"]


def test_a_wrong_path_names_the_nearest() -> None:
    with pytest.raises(KeyError, match="did you mean"):
        made_up_report()["encoder.lstn"]


@pytest.mark.parametrize(
    ("fail_on", "expected"),
    [("error", ["RG401"]), ("warning", ["RG401", "RG201"]), ("info", ["RG401", "RG201"])],
)
def test_exceeds_counts_from_a_severity_upwards(fail_on: Any, expected: list[str]) -> None:
    assert codes(made_up_report().exceeds(fail_on)) == expected


def test_a_wrong_severity_is_named() -> None:
    with pytest.raises(RulesError) as caught:
        made_up_report().exceeds("eror")  # type: ignore[arg-type]
    assert str(caught.value) == "'eror' is not a severity; did you mean 'error'? (RG914)"


@pytest.mark.usefixtures("rulebook")
@pytest.mark.parametrize(
    ("select", "ignore", "expected"),
    [
        ((), ("RG401",), ["RG201"]),
        (("RG4",), (), ["RG401"]),
        ((), ("bidirectional-last-step",), ["RG401"]),
        (("ALL",), ("RG2",), ["RG401"]),
        (("RG101",), (), []),
    ],
)
def test_findings_are_selected_by_code_prefix_and_name(
    select: tuple[str, ...], ignore: tuple[str, ...], expected: list[str]
) -> None:
    report = made_up_report().only(select, ignore)
    assert codes(report.remaining) == codes(report.findings) == expected


@pytest.mark.usefixtures("rulebook")
def test_an_unknown_rule_is_named_with_the_nearest() -> None:
    with pytest.raises(RulesError) as caught:
        made_up_report().only(ignore=["forget-bias-neutrl"])
    assert str(caught.value) == (
        "'forget-bias-neutrl' is not a known rule; did you mean 'forget-bias-neutral'? (RG914)"
    )
    with pytest.raises(RulesError, match="`rnnguard rule` lists them all"):
        made_up_report().only(select=["zzz"])


@pytest.mark.usefixtures("rulebook")
def test_rules_of_an_extra_folder_are_known_when_it_is_given() -> None:
    with pytest.raises(RulesError):
        made_up_report().only(ignore=["team-rule"])
    assert made_up_report().only(ignore=["team-rule"], rules=["team"]).remaining


def test_what_comments_hide_is_kept_with_its_reason() -> None:
    hidden = Suppressed(finding=BY_HAND, reason="as agreed", comment="model.py:12")
    report = made_up_report(remaining=(), findings=(), suppressed=(hidden,))
    (row,) = json.loads(report.to_json())["suppressed"]
    assert (row["code"], row["path"]) == ("RG201", "encoder.lstm")
    assert (row["reason"], row["comment"]) == ("as agreed", "model.py:12")
    assert report.only(ignore=["RG401"]).suppressed == (hidden,)
    assert report.only(ignore=["RG2"]).suppressed == ()


@pytest.mark.usefixtures("rulebook")
def test_the_closest_word_decides() -> None:
    assert codes(made_up_report().only(["RG201"], ["RG2"]).remaining) == ["RG201"]


@pytest.mark.usefixtures("rulebook")
def test_assert_clean_says_the_whole_view() -> None:
    report = made_up_report()
    with pytest.raises(AssertionError) as caught:
        report.assert_clean()
    assert str(caught.value) == f"RG401 vanishing-through-time\n\n{report}"
    report.assert_clean(ignore=["RG401"])
    with pytest.raises(AssertionError, match="RG201"):
        report.assert_clean("warning", ignore=["RG401"])


def test_undo_happens_once_and_says_so() -> None:
    calls: list[str] = []
    report = stabilized_report(undo=lambda: calls.append("undone"))
    assert report.undo() == "2 changes taken back."
    assert report.undo() == "There is nothing to undo."
    assert calls == ["undone"]
    assert made_up_report().undo() == "There is nothing to undo."


@pytest.mark.usefixtures("rulebook")
def test_a_selection_of_a_report_can_still_be_undone() -> None:
    calls: list[str] = []
    stabilized_report(undo=lambda: calls.append("undone")).only(ignore=["RG2"]).undo()
    assert calls == ["undone"]


@pytest.mark.parametrize("make", [made_up_report, stabilized_report])
def test_json_is_plain_and_deterministic(make: Callable[[], Report]) -> None:
    assert make().to_json() == make().to_json()
    data = json.loads(make().to_json())
    assert data == make().to_dict()
    assert list(data) == [
        "schema", "rnnguard", "ok", "level", "sites", "before", "after", "findings",
        "remaining", "suppressed", "changes", "plan", "trial", "refusals", "notes",
    ]  # fmt: skip
    assert data["schema"] == 1


def test_json_holds_no_infinities() -> None:
    readings = made_up_readings(retention=(0.0, -math.inf, math.nan), growth=math.inf)
    report = made_up_report(before=Measurement(run=made_up_run(), sites=(readings,)))
    site = json.loads(report.to_json())["before"]["sites"][0]
    assert site["retention"] == [0.0, None, None]
    assert site["growth"] is None


def test_the_plan_in_the_json_can_be_read_back() -> None:
    data = json.loads(stabilized_report().to_json())
    assert Plan.model_validate(data["plan"]) == stabilized_report().plan


def test_every_error_is_of_the_one_family() -> None:
    with pytest.raises(RNNGuardError):
        made_up_report().exceeds("nothing")  # type: ignore[arg-type]
