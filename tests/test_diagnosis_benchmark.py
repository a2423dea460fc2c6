"""The diagnosis benchmark: its labels, its figures, its peers and its mutants, on small cases."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def part() -> Any:
    """Imports a module of the benchmark by its name."""
    sys.path.insert(0, str(ROOT))
    yield lambda name: importlib.import_module(f"benchmarks.diagnosis.{name}")
    sys.path.remove(str(ROOT))


def outcome(task: str, mutation: str, seed: int, learnt: float) -> dict[str, str]:
    converged = str(learnt >= 1)
    return {"task": task, "mutation": mutation, "seed": str(seed), "learnt": str(learnt),
            "converged": converged}  # fmt: skip


def labels(part: Any, clean: list[float], mutant: list[float]) -> dict[str, str]:
    rows = [outcome("t", "clean", s, v) for s, v in enumerate(clean)]
    rows += [outcome("t", "m", s, v) for s, v in enumerate(mutant)]
    return {cell.mutation: cell.label for cell in part("labels").cells(rows, 5)}


@pytest.mark.parametrize(
    ("harms", "p"),
    [
        ([1, 2, 3, 4, 5], 1 / 32),
        ([-1, -2, -3, -4, -5], 1),
        ([0, 0, 0], 1),
        # Only the signs of the small one may flip without lowering the sum: 2 of 32.
        ([1, 1, 1, 1, 0], 2 / 32),
    ],
)
def test_the_sign_flip_test_is_exact(part: Any, harms: list[float], p: float) -> None:
    assert part("labels").sign_flip_p(harms) == p


def test_a_mutant_is_a_fault_only_when_every_seed_suffers(part: Any) -> None:
    fine = [1.1, 1.0, 1.2, 1.1, 1.0]
    assert labels(part, fine, [0.1, 0.0, 0.3, 0.2, 0.5])["m"] == "fault"
    assert labels(part, fine, [0.1, 0.0, 0.3, 0.2, 1.0])["m"] == "grey"
    assert labels(part, fine, [1.05, 0.95, 1.15, 1.05, 0.95])["m"] == "healthy"
    # Significant harm below the minimal effect is no fault.
    assert labels(part, fine, [1.0, 0.9, 1.1, 1.0, 0.9])["m"] == "healthy"
    assert labels(part, fine, [1.1, 1.0, 1.2, 0.2, -0.3])["m"] == "grey"


def test_a_clean_twin_is_healthy_and_has_to_learn(part: Any) -> None:
    assert labels(part, [1.1] * 5, [0.0] * 5)["clean"] == "healthy"
    assert set(labels(part, [1.1, 1.1, 1.1, 0.2, 0.2], [0.0] * 5).values()) == {"task not learnt"}


def test_a_cell_without_all_its_seeds_is_not_labelled(part: Any) -> None:
    rows = [outcome("t", "clean", s, 1.0) for s in range(4)]
    assert part("labels").cells(rows, 5) == []


def test_the_figures_agree_with_scikit_learn(part: Any) -> None:
    from sklearn.metrics import precision_score, recall_score, roc_auc_score

    generator = np.random.default_rng(1)
    fault = generator.random(200) < 0.4
    # Rounded, so that ties are among them.
    score = np.round(generator.normal(size=200) + fault, 1)
    found = part("scoring").measures(fault, score)
    assert found["precision"] == pytest.approx(precision_score(fault, score > 0))
    assert found["recall"] == pytest.approx(recall_score(fault, score > 0))
    assert found["false_alarms"] == pytest.approx(1 - recall_score(~fault, score <= 0))
    assert found["auroc"] == pytest.approx(roc_auc_score(fault, score))
    assert found["verdict_auroc"] == pytest.approx(roc_auc_score(fault, score > 0))


def test_intervals_are_those_of_tasks_and_not_of_runs(part: Any) -> None:
    scoring = part("scoring")

    def runs(copies: int) -> list[Any]:
        # One task in four is judged wrongly throughout, however often it was run.
        return [
            scoring.Judged(f"t{t}", "m", s, fault, 1.0 if fault == (t != 0) else -1.0)
            for t in range(4)
            for s in range(copies)
            for fault in (True, False)
        ]

    few, many = scoring.intervals(runs(1), 300), scoring.intervals(runs(50), 300)
    assert few == many
    low, high = many["recall"]
    assert low <= 0.5 and high == 1.0


def test_losing_cases_name_the_error(part: Any) -> None:
    scoring = part("scoring")
    judged = [scoring.Judged("t", "a", s, True, 1.0 - s) for s in range(3)]
    judged += [scoring.Judged("t", "b", s, False, -1.0) for s in range(3)]
    assert scoring.losing_cases(judged) == [
        {"task": "t", "mutation": "a", "error": "missed", "seeds_wrong": "2 of 3"}
    ]


def test_every_task_has_its_mutants_and_both_halves_have_tasks(part: Any) -> None:
    tasks, mutants = part("tasks").all_tasks(), part("mutations").mutants
    assert len({task.name for task in tasks}) == len(tasks) >= 12
    assert 0.3 < sum(task.held_out for task in tasks) / len(tasks) < 0.6
    operators = {name for task in tasks for name in mutants(task.setting)}
    assert len(operators) >= 12 + 1
    for task in tasks:
        settings = mutants(task.setting)
        assert settings["clean"] == task.setting
        # A fixed length cannot be doubled, so "no clip" stands alone there.
        assert task.setting.resizable or all(s.length == 1 for s in settings.values())


def model_of(part: Any, **changes: Any) -> Any:
    setting = part("models").Setting("lstm", 3, 2, 20, hidden=6)
    torch.manual_seed(0)
    return part("models").SequenceModel(replace(setting, **changes))


def keep_bias(model: Any, block: int) -> torch.Tensor:
    hidden = model.setting.hidden
    gate = slice(block * hidden, (block + 1) * hidden)
    return (model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0)[gate].detach()


def test_mutated_starts_hold_what_their_names_say(part: Any) -> None:
    twin, wild = model_of(part), model_of(part, gain=3.0)
    assert torch.equal(wild.rnn.weight_hh_l0, 3 * twin.rnn.weight_hh_l0)
    assert keep_bias(model_of(part, keep_bias=-2.0), 1).tolist() == [-2.0] * 6
    assert keep_bias(model_of(part, doubled_bias=1.0), 1).tolist() == [2.0] * 6
    chrono = model_of(part, start="chrono")
    kept, entered = keep_bias(chrono, 1), keep_bias(chrono, 0)
    assert torch.equal(kept, -entered) and kept.min() >= 0 and kept.max() <= math.log(19)
    wrong = keep_bias(model_of(part, cell="gru", start="chrono", wrong_sign=True), 1)
    assert wrong.max() <= 0
    weight = model_of(part, start="orthogonal").rnn.weight_hh_l0.detach()
    for block in weight.chunk(4):
        torch.testing.assert_close(block @ block.T, torch.eye(6), atol=1e-5, rtol=0)


def test_a_window_cuts_the_gradient_and_leaves_the_output(part: Any) -> None:
    x = torch.randn(2, 12, 3, requires_grad=True)
    whole, cut = model_of(part), model_of(part, window=4)
    torch.testing.assert_close(whole(x), cut(x))
    (gradient,) = torch.autograd.grad(cut(x).sum(), x)
    assert gradient[:, :8].abs().max() == 0 and gradient[:, 8:].abs().min(-1).values.min() > 0


def test_a_missing_detach_ends_training_at_the_second_step(part: Any) -> None:
    training = part("training")
    found = training.trained(training.Run(0, "characters lstm", "missing detach"))
    assert (found.steps, found.score) == (1, found.chance)
    assert "second time" in found.stopped


def test_twins_start_from_the_same_weights_and_batches(part: Any) -> None:
    training = part("training")
    first, second = (
        training.staged(training.Run(3, "recall-12 gru", name)) for name in ("clean", "rate x10")
    )
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.batches[7][0], second.batches[7][0])
    assert second.optimizer.param_groups[0]["lr"] == 10 * first.optimizer.param_groups[0]["lr"]


def test_the_clip_is_part_of_the_step_and_the_gradients_seen_are_unclipped(part: Any) -> None:
    training = part("training")
    stage = training.staged(training.Run(0, "recall-30 tanh", "gain x3"))
    sgd = torch.optim.SGD(stage.model.parameters(), lr=1.0)
    training.clip_(sgd, stage.model, 1.0)
    steps = training.steps_of(replace(stage, optimizer=sgd))
    next(steps)
    before = [p.detach().clone() for p in stage.model.parameters()]
    norm = torch.nn.utils.get_total_norm([p.grad for p in stage.model.parameters()])
    next(steps)
    moved = [p.detach() - b for p, b in zip(stage.model.parameters(), before, strict=True)]
    assert norm > 100
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(1, rel=1e-3)


def test_the_lag_profile_of_a_default_lstm_falls_as_theory_says(part: Any) -> None:
    training = part("training")
    lags = training.lag_profile(training.staged(training.Run(0, "recent-200 lstm", "clean")))
    # The leading exponent of a default LSTM is -0.44 per step; the last lags are free of starts.
    assert (lags[5] - lags[4]) / 50 * math.log(10) == pytest.approx(-0.44, abs=0.06)


def test_a_healthy_run_learns_and_its_harmed_twin_does_not(part: Any) -> None:
    training = part("training")
    fine, sick = (
        training.trained(training.Run(0, "recall-30 tanh", name)) for name in ("clean", "gain x3")
    )
    assert fine.converged and fine.learnt > 1
    assert not sick.converged and sick.learnt < 0.4
    assert sick.nonfinite_steps == 0 and not sick.stopped


def parameter(part: Any, **changes: float) -> Any:
    facts = {
        "name": "w", "kernel": True, "norm": 0.1, "mean_abs": 1e-3, "mean": 1e-4,
        "zero_share": 0.0, "weight_mean_abs": 0.1, "weight_mean": 0.01, "weight_variance": 0.01,
        "weight_tiny_share": 0.0, "update": 1e-4,
    }  # fmt: skip
    return part("first_steps").ParameterFacts(**facts | changes)


def seen(part: Any, *norms: float, losses: list[float] | None = None, **changes: float) -> Any:
    """First steps of two kernels: `changes` are those of the first one, norms of the last."""
    steps = part("first_steps")
    losses = losses or [1.0 - 0.01 * i for i in range(len(norms))]
    facts = tuple(
        steps.StepFacts(loss, 0.1 * (i // 10), (parameter(part, **changes),
                        parameter(part, name="head", norm=norm)), (0.5,), 0.0, 1.0, True)
        for i, (norm, loss) in enumerate(zip(norms, losses, strict=True))
    )  # fmt: skip
    return steps.FirstSteps(facts, 1e-3, None, False)


def test_no_peer_alarms_on_unremarkable_steps(part: Any) -> None:
    peers = part("peers")
    calm = seen(part, *[0.1] * 50, losses=[0.93**i + 0.5 * 0.99**i for i in range(50)])
    assert {k: v for k, v in peers.judged(calm).items() if v > 0} == {}


@pytest.mark.parametrize(
    ("peer", "norm", "changes", "excess"),
    [
        ("SageMaker Debugger", 0.1, {"mean_abs": 1e-9}, 2),
        ("AUTOTRAINER", 1.0, {"norm": 1e-6}, 2),
        ("AUTOTRAINER", 0.1, {"norm": 70.0}, 1),
        ("DeepDiagnosis", 0.1, {"mean_abs": 1e-8}, 1),
        ("DeepDiagnosis", 0.1, {"weight_variance": 1e3}, 2),
        ("TheDeepChecker", 0.1, {"mean_abs": 1e-7}, 1),
        ("TheDeepChecker", 0.1, {"mean_abs": 1e9}, 3),
        ("GradientFlow", 1e4, {}, 3),
        ("DLCheck", 1e7, {}, 1),
        ("norm > 1", 100.0, {"norm": 0.0}, 2),
    ],
)
def test_a_peers_rule_measures_how_far_beyond_its_threshold(
    part: Any, peer: str, norm: float, changes: dict[str, float], excess: float
) -> None:
    found = part("peers").judged(seen(part, norm, **changes))
    assert found[f"{peer} @1"] == pytest.approx(excess, abs=1e-6)


def test_the_window_rule_is_the_documented_one(part: Any) -> None:
    """Four successive halvings alarm, three do not; as shipped the rule cannot fire at all."""
    checker = part("peers").thedeepchecker
    values = [1e-2, 4e-3, 1.6e-3, 6.4e-4, 2.5e-4]

    def fading(magnitudes: list[float]) -> Any:
        steps = [seen(part, 0.1, mean_abs=value).steps[0] for value in magnitudes]
        return part("first_steps").FirstSteps(tuple(steps), 1e-3, None, False)

    assert checker(fading(values)) > 0
    assert checker(fading([*values[:4], values[3]])) <= 0


def test_autotrainer_keeps_quiet_about_a_run_that_gains(part: Any) -> None:
    """Its gradient rules speak only while accuracy is low or does not grow."""
    wild = seen(part, *[0.1] * 50, norm=70.0)
    steps = tuple(replace(s, skill=0.05 * i) for i, s in enumerate(wild.steps))
    found = part("peers").judged(part("first_steps").FirstSteps(steps, 1e-3, None, False))
    assert found["AUTOTRAINER @1"] > 0 > found["AUTOTRAINER @50"]


def test_thresholds_are_exceeded_in_their_own_scale(part: Any) -> None:
    verdicts = part("verdicts")
    row = verdicts.Threshold("growth", "above", 2.0, scale=0.5, log=True, needs=("known",))
    assert row.excess({"growth": 1e4, "known": True}) == pytest.approx(4)
    assert row.excess({"growth": 1e4, "known": False}) == verdicts.SILENT
    assert row.excess({}) == verdicts.SILENT
    fading = verdicts.Threshold("r", "below", -4.0)
    assert verdicts.score({"r": -6.0, "growth": 1.0}, (fading, row)) == 2


def test_refitting_finds_the_limit_that_parts_faults_from_controls(part: Any) -> None:
    verdicts, fitting = part("verdicts"), part("fitting")
    table = (verdicts.Threshold("r", "below", -4.0), verdicts.Threshold("noise", "above", 0.5))
    readings = [{"r": -float(i), "noise": float(i % 2)} for i in range(20)]
    fault = np.arange(20) >= 12
    fitted = fitting.refitted(table, readings, fault)
    assert [verdicts.score(r, fitted) > 0 for r in readings] == fault.tolist()
    assert -12 < fitted[0].limit < -11 and fitted[1].limit == fitting.NEVER


def test_refitting_keeps_to_the_false_alarms_that_are_allowed(part: Any) -> None:
    """Where the two overlap, the best balance would alarm on a tenth of the controls."""
    verdicts, fitting = part("verdicts"), part("fitting")
    values = [*range(100), *range(90, 110)]
    fault = np.arange(120) >= 100
    table = (verdicts.Threshold("x", "above", 50.0),)
    readings = [{"x": float(value)} for value in values]
    fitted = fitting.refitted(table, readings, fault)
    alarm = np.array([verdicts.score(r, fitted) > 0 for r in readings])
    assert 0.6 <= alarm[fault].mean() < 1 and alarm[~fault].mean() <= 0.03


def audited(level: str, errors: int, **trial: Any) -> dict[str, Any]:
    return {"level": level, "errors": errors, "memory_needed": 9} | trial


def test_a_trial_passes_over_to_an_audit_that_was_told_more(part: Any) -> None:
    before, after = audited("unknown", 0), audited("unstable", 2, spike_rate=0.5)
    told = audited("vanishing", 1) | {"memory_needed": 40}
    found = part("verdicts").with_trial(told, before, after)
    assert found == audited("unstable", 3, spike_rate=0.5) | {"memory_needed": 40}
    # A level that the trial left alone is the estimate's, and no better than what was told.
    calm = audited("unknown", 0, spike_rate=0.0)
    assert part("verdicts").with_trial(told, before, calm)["level"] == "vanishing"


def test_the_rows_of_a_trial_are_silent_without_one(part: Any) -> None:
    verdicts = part("verdicts")
    assert verdicts.score({"growth": 1.0}, verdicts.TRIAL_TABLE) == verdicts.SILENT
    assert {row.reading for row in verdicts.TRIAL_TABLE} <= set(verdicts.TRIAL_READINGS)
    risen = {"loss_ratio": 100.0, "nonfinite_share": 0.0}
    assert verdicts.score(risen, verdicts.TRIAL_TABLE) == pytest.approx(-verdicts.SILENT)


@pytest.mark.parametrize("kind", ["forest", "logistic"])
def test_a_fitted_model_finds_the_reading_that_tells(part: Any, kind: str) -> None:
    generator, row = np.random.default_rng(0), part("verdicts").Threshold
    fault = generator.random(160) < 0.5
    signal = np.where(fault, 3.0, -0.5) * np.exp(generator.normal(0, 0.3, 160))
    readings = [{"signal": float(v), "noise": float(generator.normal())} for v in signal]
    tasks = [f"t{i % 8}" for i in range(160)]
    table = (row("signal", "above", 1.0), row("noise", "below", 0.0), row("absent", "above", 0.0))
    score = part("fitting").MODELS[kind](table, readings[:120], fault[:120], tasks[:120])
    found = score(readings[120:])
    assert part("scoring").auroc(fault[120:], found) > 0.95
    assert (found[~fault[120:]] > 0).mean() <= 0.1
    # A row that has nothing to read tells as little as one far below its limit.
    assert score([{"signal": -9.0, "noise": 9.0}]) == score([{"noise": 9.0}])


def test_only_adaptive_steps_have_a_rate_to_judge(part: Any) -> None:
    verdicts = part("verdicts")
    wild = {"optimizer": "adam", "learning_rate": 1.0}
    assert verdicts.score(verdicts.derived(wild)) == pytest.approx(1)
    assert verdicts.score(verdicts.derived(wild | {"optimizer": "sgd"})) == verdicts.SILENT


def test_a_result_file_goes_on_where_it_was_stopped(part: Any, tmp_path: Path) -> None:
    ledger, run = part("ledger"), part("training").Run
    runs = [run(0, "t", "a"), run(0, "t", "b"), run(1, "t", "a")]
    asked = []

    def work(one: Any) -> dict[str, str]:
        asked.append(one)
        return {"task": one.task, "mutation": one.mutation, "seed": str(one.seed)}

    path = tmp_path / "found" / "rows.csv"
    finish = {"workers": 1, "deadline": math.inf}
    assert ledger.continue_(path, runs[:1], work, **finish) == 0
    assert ledger.continue_(path, runs, work, workers=1, deadline=-math.inf) == 2
    assert ledger.continue_(path, runs, work, **finish) == 0
    assert asked == runs and [ledger.run_of(row) for row in ledger.rows_of(path)] == runs
    with pytest.raises(ValueError, match="other columns"):
        ledger.continue_(path, [run(2, "t", "a")], lambda one: work(one) | {"x": ""}, **finish)


def test_a_seed_that_was_judged_in_part_is_left_out(part: Any, tmp_path: Path) -> None:
    cell = part("labels").Cell
    labelled = [cell("a", "m", "fault", 1.0, 0.03, 5), cell("b", "m", "healthy", 0.0, 1.0, 5)]
    names = [f"{name} @{steps}" for name in part("peers").PEERS for steps in (1, 50)]
    readings = {f"readings {mode}": '{"level": "healthy", "errors": 0}'
                for mode in part("verdicts").MODES}  # fmt: skip
    for file, columns in (("peers", dict.fromkeys(names, "1")), ("verdicts", readings)):
        runs = [("a", "0"), ("b", "0"), ("a", "1")]
        rows = [{"task": t, "mutation": "m", "seed": s} | columns for t, s in runs]
        part("results")._written(tmp_path / f"{file}.csv", rows)
    found = part("results").detectors(tmp_path, labelled, {"a", "b"})
    assert {(j.task, j.seed) for judged in found.values() for j in judged} == {("a", 0), ("b", 0)}
    assert [j.fault for j in found["DLCheck @1"]] == [True, False]


def test_the_work_is_where_a_worker_process_looks_for_it(part: Any) -> None:
    """A package's own `__main__` is not imported by spawned workers."""
    for _, work in part("stages").WORK.values():
        assert not work.__module__.endswith("__main__")
        assert pickle.loads(pickle.dumps(work)) is work


def test_from_a_run_to_the_table(part: Any, tmp_path: Path) -> None:
    """Two runs of one task through every stage: the fading one ranks above its healthy twin."""
    work_of, training = part("stages").WORK, part("training")
    folder = tmp_path / "diagnosis"
    runs = [training.Run(0, "recall-30 tanh", name) for name in ("clean", "gain x0.2")]
    for name, work in work_of.values():
        part("ledger").continue_(folder / name, runs, work, workers=1, deadline=math.inf)
    verdicts = part("ledger").rows_of(folder / "verdicts.csv")
    assert [row["level declared"] for row in verdicts] == ["healthy", "vanishing"]
    fine, fading = (float(row["score declared"]) for row in verdicts)
    assert fine <= 0 < fading
    readings = json.loads(verdicts[1]["readings declared"])
    assert readings["memory_needed"] == 30 and readings["retention_at_memory"] < -4
    assert readings["spike_rate"] is None
    tried = json.loads(verdicts[0]["readings trial"])
    assert tried["trial_steps"] == 40 and 0 < tried["loss_ratio"] < 1.1
    rows = part("results").report(folder, 1, draws=20)
    detectors = {row["detector"] for row in rows}
    assert detectors >= {"DLCheck @1", "rnnguard, levels, memory declared, trial"}
    with (tmp_path / "diagnosis.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    spec = importlib.util.spec_from_file_location("overhead", ROOT / "benchmarks" / "overhead.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_exponent_of_a_power_law_is_found(overhead: ModuleType) -> None:
    assert overhead.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_the_peak_is_what_was_held_at_once(overhead: ModuleType) -> None:
    def work() -> None:
        for _ in range(3):
            torch.zeros(2**18)
        kept = torch.zeros(2**18)
        kept += torch.ones(2**17).repeat(2)

    # 1 MiB kept, beside it half a MiB and its double.
    assert overhead.peak_bytes(work) == pytest.approx(2.5 * 2**20, rel=0.01)


def test_the_overhead_of_a_small_audit_is_measured(overhead: ModuleType) -> None:
    rows = [row for part in ("audit", "growth", "models") for row in overhead.PARTS[part](True)]
    taken = [float(row["value"]) for row in rows if row["unit"] != "exponent"]
    assert len(taken) > 5 and min(taken) > 0
    # Over so few steps an exponent of growth may be anything.
    assert all(math.isfinite(float(row["value"])) for row in rows)
    assert {row["met"] for row in rows} <= {"", "True", "False"}


def test_the_cost_of_the_guard_is_measured_for_every_form(overhead: ModuleType) -> None:
    rows = [*overhead.guard_rows(True)]
    assert all(float(row["value"]) > 0 for row in rows)
    judged = [row["figure"] for row in rows if row["target"] == "<= 1.05"]
    assert len(judged) == len(overhead.FORMS) and all("LSTM of" in figure for figure in judged)


def test_the_interval_of_a_median(overhead: ModuleType) -> None:
    middle, low, high = overhead.interval([float(n) for n in range(101)])
    assert middle == 50.0
    assert 35 < low < 50 < high < 65
