"""The outcomes benchmark: its account, its tasks, its figures and a whole tiny run."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes_cases import MODELS, case_of, part, tiny


class Ticking:
    """A clock that goes on by the next of some seconds whenever it is read, then by the last."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.now = list(seconds), 0.0

    def __call__(self) -> float:
        self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return self.now


def test_a_hiccup_is_not_charged_and_set_up_is() -> None:
    account = part("accounting").Account(10)
    account.charge_setup(6.0, 2.0)
    for seconds in (2.0, 2.0, 50.0, 2.0):
        account.charge_step(seconds, 2.0)
    assert (account.setup, account.training, account.spent) == (3, 4, 7)
    assert account.step_ratio == 1 and account.left
    account.charge_step(6.0, 2.0)
    assert account.spent == 8, "a median, so that one slow step of five is none"
    account.charge_setup(4.0, 2.0)
    assert not account.left


def test_trainings_that_are_given_up_are_set_up() -> None:
    account = part("accounting").Account(100)
    for _ in range(5):
        account.charge_step(3.0, 1.0)
    account.abandon_training()
    assert (account.setup, account.training) == (15, 0) and math.isnan(account.step_ratio)
    account.charge_step(1.0, 1.0)
    assert account.spent == 16 and account.step_ratio == 1


def test_the_yardstick_follows_the_machine() -> None:
    task = tiny()
    torch.manual_seed(0)
    clock = Ticking(1.0)
    yardstick = part("accounting").Yardstick(task, task.model("rnn"), task.stream(0), clock)
    assert yardstick.unit == 1
    clock.seconds = [3.0]
    yardstick.measure(12)
    assert yardstick.unit == 3


def test_training_ends_when_the_budget_is_spent() -> None:
    """Set-up takes 20 of 60 untouched steps, and every step costs as much as two."""
    task = tiny()
    unreachable = replace(task, target=2.0)
    case = case_of(unreachable)
    accounting, training = part("accounting"), part("training")
    yardstick = accounting.Yardstick(unreachable, task.model("lstm"), case.data, Ticking(1.0))
    account, result = accounting.Account(task.budget), training.Result(0.5)
    # Read before and after the set-up, then at both ends of each step and of the look inside it.
    training.train(
        part("policies").nothing, case, account, yardstick, result, Ticking(1.0, 20.0, 1.0)
    )
    assert account.setup == 20 and account.step_ratio == 2
    assert result.steps == 20 and account.spent == 60 and not result.solved


def test_the_same_seed_gives_every_policy_the_same_weights_and_batches() -> None:
    task = tiny()
    first, again, other = (case_of(task, "gru", seed) for seed in (3, 3, 4))
    for a, b, c in zip(*(x.model.parameters() for x in (first, again, other)), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    # However many were asked for before, and in whatever order.
    assert len(list(first.data)) == task.budget
    assert torch.equal(first.data[7][0], again.data[7][0])
    assert not torch.equal(first.data[7][0], other.data[7][0])


def test_every_task_can_be_trained_with_every_model() -> None:
    for task in part("tasks").all_tasks():
        small = replace(task, batch=4, steps=task.steps if "digit" in task.name else 30)
        x, y = small.stream(0)[0]
        for name in MODELS:
            model = task.model(name)
            loss, output = part("accounting").step(
                model, task.optimizer_of(model), task.loss(), (x, y)
            )
            assert torch.isfinite(loss)
            wanted = y.shape if task.metric == "error" else (*y.shape, task.outputs)
            assert output.shape == wanted, (task.name, name)


@pytest.mark.parametrize("name", ["characters", "forecast"])
def test_a_model_of_both_directions_cannot_see_what_it_is_asked_for(name: str) -> None:
    """An input moves no answer between the one that asks for it and itself."""
    task = part("tasks").task_named(name)
    x, _ = task.stream(0)[0]
    model = task.model("bilstm").eval()
    other = x.clone()
    other[:, 21] = (x[:, 21] + 1) % task.inputs if task.tokens else x[:, 21] + 1
    with torch.no_grad():
        moved = (model(x) - model(other)).abs().sum((0, 2)) > 0
    asks = 21 - task.ahead
    assert not moved[asks:21].any()
    assert moved[asks - 1] and moved[21], "it reads from both sides"


def test_one_direction_of_tagging_is_worth_three_in_four() -> None:
    streams = part("streams")
    x, y = streams.tagging(400, 40, torch.Generator().manual_seed(0))
    asked = y != streams.IGNORED
    far = streams.FAR
    before = torch.nn.functional.pad(x, (far, 0))[:, :40]
    assert abs(float(y[asked].double().mean()) - 66 / 144) < 0.02
    guess = (before > (streams.TAGS - 1) / 2).long()
    assert abs(float((guess == y)[asked].double().mean()) - 0.75) < 0.03


def test_mackey_glass_oscillates_for_ever() -> None:
    series = part("streams").mackey_glass(3000)
    assert float(series.mean()) == pytest.approx(0, abs=1e-4)
    assert float(series.std()) == pytest.approx(1, abs=1e-4)
    crossings = int((series[1:].sign() != series[:-1].sign()).sum())
    assert 80 < crossings < 200, "a period of some 50 steps"
    assert float(series[-500:].std()) > 0.5


def tiny_runs(monkeypatch: pytest.MonkeyPatch, task: Any) -> Callable[..., Any]:
    for name in ("training", "sizes"):
        monkeypatch.setattr(part(name), "task_named", lambda asked: task)
    for name in ("__main__", "results", "page"):
        monkeypatch.setattr(part(name), "all_tasks", lambda: (task,))
    main: Callable[..., Any] = part("__main__").main
    return main


def test_from_the_runs_to_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Two seeds of one cell after every policy but rnnguard, and of one that raises."""
    task = tiny()
    main = tiny_runs(monkeypatch, replace(task, control=True))

    def broken(case: Any) -> Any:
        raise ValueError("as it happens")

    policies = {
        name: policy
        for name, policy in part("lineup").POLICIES.items()
        if not name.startswith("rnnguard")
    } | {"rnnguard broken": broken}
    for name in ("training", "__main__"):
        monkeypatch.setattr(part(name), "POLICIES", policies)
    monkeypatch.setattr(part("guarded"), "warm_up", lambda: None)
    folder = tmp_path / "outcomes"
    common = ["--models", "lstm", "--seeds", "2", "--workers", "1", "--results", str(folder)]
    main([*common, "--stage", "train", "--minutes", "-1"])
    assert f"{2 * len(policies)} runs to go" in capsys.readouterr().out
    main([*common, "--stage", "train", "--policies", "nothing"])
    first = (folder / "runs.csv").read_text()
    main(common)
    rows = part("results").rows_of(folder / "runs.csv")
    assert (folder / "runs.csv").read_text().startswith(first), "what was done is not done again"
    assert [row["policy"] for row in rows[:3]] == ["nothing", "nothing", "clip"]
    assert len(rows) == 2 * len(policies) == len({(r["seed"], r["policy"]) for r in rows})
    wrong = [row for row in rows if row["error"]]
    assert {row["policy"] for row in wrong} == {"rnnguard broken"}
    assert wrong[0]["error"] == "ValueError: as it happens" and wrong[0]["steps_to_target"] == "60"
    fine = next(row for row in rows if row["policy"] == "clip")
    assert fine["solved"] == "True" and float(fine["learnt"]) >= 1 and int(fine["steps"]) < 60
    assert 0.3 < float(fine["step_ratio"]) < 3
    page = (folder / "outcomes.md").read_text()
    assert "| rnnguard broken | tiny | lstm | 2 of 2 | 0 of 2 |" in page
    assert "2 runs of rnnguard broken ended in an error" in page
    assert "<svg" in (folder / "outcomes.svg").read_text()
    table = {row["policy"]: row for row in part("results").rows_of(tmp_path / "outcomes.csv")}
    assert table["nothing"]["worse_count"] == "0 of 2" and table["clip"]["errors"] == "0"
    assert table["rnnguard broken"]["controls_worse_count"] == "2 of 2"


def test_rnnguard_is_given_what_a_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny()
    tiny_runs(monkeypatch, task)
    row = part("training").worked(part("training").Run(0, "tiny", "lstm", "rnnguard probe"))
    assert not row["error"], row["error"]
    assert "clip_gradient" in row["done"] and float(row["setup_cost"]) > 1
    assert int(row["steps"]) < 60 and row["words"]


def reached(policy: str, model: str, seed: int, learnt: float, cost: float = 100) -> Any:
    return {
        "seed": str(seed), "task": "t", "model": model, "policy": policy,
        "solved": str(learnt >= 1), "learnt": str(learnt), "steps_to_target": str(cost),
        "cost_to_target": str(cost), "setup_cost": "0", "step_ratio": "1", "error": "",
    }  # fmt: skip


def test_worse_means_beyond_the_noise_of_the_cell() -> None:
    scoring = part("scoring")
    untouched = {"steady": [0.9, 0.9, 0.9], "noisy": [0.5, 0.9, 0.1]}
    after = {"steady": [0.81, 0.79, 1.0], "noisy": [-0.2, 0.2, 0.1]}
    rows = [
        reached(policy, model, seed, value)
        for policy, found in (("nothing", untouched), ("x", after))
        for model, values in found.items()
        for seed, value in enumerate(values)
    ]
    policies = scoring.by_policy(scoring.read(rows, set()))
    limits = scoring.noise(policies["nothing"])
    assert limits == {("t", "steady"): 0.1, ("t", "noisy"): pytest.approx(0.8)}
    worse = scoring.made_worse(policies["x"], policies["nothing"])
    assert [(run.model, run.seed) for run in worse] == [("steady", 1)]
    row = scoring.row_of("x", policies, "nothing", 200)
    assert row["worse_count"] == "1 of 6" and row["solved"] == "0.167"


def test_the_figures_are_paired_and_their_intervals_draw_cells() -> None:
    scoring = part("scoring")
    rows = []
    for seed in range(4):
        for model, learnt, cost in (("a", 1.0, 50), ("b", 0.0, 400)):
            rows.append(reached("nothing", model, seed, 0.0, 400))
            rows.append(reached("blind", model, seed, learnt, cost * 2 if learnt else cost))
            rows.append(reached("rnnguard", model, seed, learnt, cost))
    rows.append(reached("nothing", "c", 0, 1.0))
    policies = scoring.by_policy(scoring.read(rows, {"t"}))
    assert {len(runs) for runs in policies.values()} == {8}, "what not all have run is left out"
    assert scoring.best_blind(policies) == "blind"
    row = scoring.row_of("rnnguard", policies, "blind", 500)
    assert (row["solved"], row["solved_low"], row["solved_high"]) == ("0.500", "0.000", "1.000")
    assert row["solved_minus_best_blind"] == "0.000" == row["solved_minus_best_blind_high"]
    assert float(row["cost_to_target"]) == pytest.approx(math.sqrt(50 * 400), abs=0.5)
    # Half the cost in one cell, the same in the other.
    assert float(row["cost_over_best_blind"]) == pytest.approx(math.sqrt(1 / 2), abs=5e-3)
    assert (row["cost_over_best_blind_low"], row["cost_over_best_blind_high"]) == ("0.50", "1.00")
    assert row["controls_solved_count"] == "4 of 8"


def test_shards_divide_the_cells_and_keep_the_policies_together() -> None:
    runs = list(part("training").all_runs(["a", "b"], ["m", "n"], ["x", "y"], 3))
    main = part("__main__")
    parts = [main.shard(runs, f"{index}/3") for index in (1, 2, 3)]
    assert sorted(run for shard in parts for run in shard) == sorted(runs)
    cells = [{(run.seed, run.task, run.model) for run in shard} for shard in parts]
    assert all(not a & b for a in cells for b in cells if a is not b)
    assert {len(shard) for shard in parts} == {8}


def test_the_work_is_where_a_worker_process_looks_for_it() -> None:
    """A package's own `__main__` is not imported by spawned workers."""
    worked, run = part("training").worked, part("training").Run(0, "t", "m", "p")
    assert pickle.loads(pickle.dumps((worked, run))) == (worked, run)


def test_names_are_chosen_whole_or_by_part() -> None:
    chosen = part("lineup").chosen
    assert chosen("lstm,gru", MODELS) == ["lstm", "gru"]
    assert chosen("x2,written", MODELS) == ["lstm x2", "written"]
    assert chosen("", MODELS) == list(MODELS)
    with pytest.raises(SystemExit, match="'cnn' is none of"):
        chosen("cnn", MODELS)
