"""Plans as files, their replay on the plain model, and training that goes on in a new process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

import rnnguard
from rnnguard.errors import RefusedError
from rnnguard.nn import OutputNormLSTM
from rnnguard.probe.snapshot import fingerprint, same_bits
from rnnguard.records import Change, Plan
from rnnguard.replay import REMEDY
from rnnguard.rewrite.stepguard import guard_of

IN, H, STEPS = 3, 8, 6


class Model(nn.Module):
    """Two recurrences, the second without biases, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(IN, H, batch_first=True)
        self.second = nn.GRU(H, H, bias=False, batch_first=True)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.second(self.first(x)[0])[0][:, -1])
        return output


def change(remedy: str, path: str | None = None, **dose: Any) -> Change:
    tier = REMEDY[remedy].tier if remedy in REMEDY else "step"
    return Change(remedy=remedy, path=path, tier=tier, dose=dose, scenario="test", why="A test.")


CLIP = change("clip_gradient", max_norm=0.5)
WARMUP = change("warmup_cosine", warmup=5, total_steps=40)
CHRONO = change("chrono_bias", "first", t_max=20, seed=3)
ORTHOGONAL = change("orthogonal", "second", gain=1.0, seed=3)
NORM = change("layer_norm", "first")
FULL = Plan(changes=(CLIP, WARMUP, change("amsgrad"), CHRONO, ORTHOGONAL, NORM))


def plan_of(*changes: Change) -> Plan:
    return Plan(changes=changes)


def train(model: nn.Module, optimizer: Optimizer, batches: list[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def batches(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, STEPS, IN, generator=generator) for _ in range(count)]


def refused(plan: Any, model: nn.Module | None = None, optimizer: Any = None) -> RefusedError:
    """The refusal of the plan, which has touched nothing."""
    model = model or Model()
    optimizer = optimizer or Adam(model.parameters())
    before = fingerprint(model, optimizer)
    with pytest.raises(RefusedError) as caught:
        rnnguard.apply(model, optimizer, plan)
    assert fingerprint(model, optimizer) == before
    return caught.value


# --- files -------------------------------------------------------------------------------


def test_a_plan_survives_its_file_and_its_text(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    text = FULL.to_json(file)
    assert file.read_text(encoding="utf-8") == text == FULL.to_json()
    assert Plan.from_json(text) == Plan.from_json(file) == Plan.from_json(str(file)) == FULL
    assert Plan.from_dict(FULL.to_dict()) == FULL


def test_every_form_of_a_plan_is_applied_alike(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    FULL.to_json(file)
    states = []
    for form in (FULL, FULL.to_dict(), FULL.to_json(), file, str(file)):
        torch.manual_seed(0)
        model = Model()
        rnnguard.apply(model, Adam(model.parameters()), form)
        states.append(model.state_dict())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)


UNREADABLE: dict[str, tuple[Any, str]] = {
    "no such file": ("nowhere/plan.json", r"^`nowhere/plan\.json`: the plan cannot be read \(No"),
    "half a file": ('{"schema_version": 1, "changes": [', "the plan cannot be read"),
    "not a table": ({"changes": 3}, r"changes is wrong in the plan"),
    "another schema": ({"schema_version": 2, "odd": 1}, "schema_version 2; this rnnguard reads 1"),
    "a schema in words": ({"schema_version": "1"}, "schema_version '1'; this rnnguard reads 1"),
    "an unknown field": ({"changes": [], "eval": "x"}, "eval is wrong in the plan"),
    "a number of no JSON": ('{"changes": [], "x": NaN}', "NaN is no number of JSON"),
    "a list for a dose": (
        {"changes": [CLIP.model_dump() | {"dose": {"max_norm": [1.0]}}]},
        r"changes\.0\.dose\.max_norm\.",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_plan_is_refused_with_a_cure(name: str) -> None:
    plan, words = UNREADABLE[name]
    refusal = refused(plan)
    assert refusal.code == "RG924"
    with pytest.raises(RefusedError, match=words):
        raise refusal
    assert "plan" in refusal.cure and "\n" not in str(refusal)


# --- what does not fit -------------------------------------------------------------------

MISFITS: dict[str, tuple[Change, str, str]] = {
    "unknown remedy": (change("orthogonl", "first"), "RG914", "did you mean 'orthogonal'?"),
    "lying tier": (CHRONO.model_copy(update={"tier": "step"}), "RG914", "it is one of values"),
    "unknown dose": (
        change("orthogonal", "first", gian=1.0, seed=0),
        "RG914",
        "orthogonal has no dose 'gian'; did you mean 'gain'?",
    ),
    "missing dose": (change("chrono_bias", "first", seed=0), "RG915", "no 't_max'"),
    "dose of words": (change("chrono_bias", "first", t_max="long", seed=0), "RG915", "'long'"),
    "dose of nothing": (change("critical_gain", "first", factor=float("inf")), "RG915", "finite"),
    "negative clip": (change("clip_gradient", max_norm=-1.0), "RG914", "`max_norm`: "),
    "endless warm-up": (change("warmup_cosine", warmup=1e400), "RG915", "warmup"),
    "unknown path": (change("orthogonal", "third", gain=1.0, seed=0), "RG915", "does not have"),
    "no path": (change("orthogonal", None, gain=1.0, seed=0), "RG915", "does not have"),
    "no recurrence": (change("orthogonal", "head", gain=1.0, seed=0), "RG915", "not a Linear"),
    "no bias": (
        change("chrono_bias", "second", t_max=9, seed=0),
        "RG915",
        "finds nothing here to act on",
    ),
    "no such parameter": (
        change("written_orthogonal", "x", entries="w.weight:1:0:4", gain=1.0, seed=0),
        "RG915",
        "the parameter w.weight, which the model does not have",
    ),
    "an odd entry": (
        change("written_critical_gain", "x", entries="head.weight:1:a:b", factor=1.0),
        "RG915",
        "written_critical_gain cannot be applied",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_before_any_touch(name: str) -> None:
    odd, code, words = MISFITS[name]
    refusal = refused(plan_of(CLIP, ORTHOGONAL, odd))
    assert [reason.code for reason in refusal.reasons] == [code]
    assert words in str(refusal)


def test_all_reasons_come_at_once() -> None:
    odd = [misfit for misfit, _, _ in MISFITS.values()]
    assert len(refused(plan_of(*odd)).reasons) == len(odd)


def test_adams_options_are_for_adam() -> None:
    model = Model()
    refusal = refused(plan_of(change("amsgrad"), change("adamw")), model, SGD(model.parameters()))
    assert [reason.code for reason in refusal.reasons] == ["RG915", "RG915"]


def test_a_scheduler_that_holds_the_step_and_lbfgs_are_told_before() -> None:
    model = Model()
    optimizer = LBFGS(model.parameters())
    assert refused(plan_of(CLIP), model, optimizer).code == "RG906"
    optimizer.step(lambda: model(batches(1, 0)[0]).square().sum())
    codes = [reason.code for reason in refused(plan_of(NORM), model, optimizer).reasons]
    assert "RG906" in codes


class Own(nn.LSTM):
    """A class of the user's."""


def test_a_users_class_is_not_morphed() -> None:
    model = Model()
    model.first = Own(IN, H, batch_first=True)
    assert refused(plan_of(NORM), model).code == "RG910"


def test_a_foreign_optimizer_is_refused() -> None:
    other = Model()
    assert refused(FULL, Model(), Adam(other.parameters())).code == "RG904"
    with pytest.raises(RefusedError, match="RG904"):
        rnnguard.apply(other, None, FULL)  # type: ignore[arg-type]


def test_a_wrapped_model_takes_a_plan_of_steps_only() -> None:
    model = Model()
    wrapped, optimizer = nn.DataParallel(model), Adam(model.parameters())
    assert refused(FULL, wrapped, optimizer).code == "RG901"
    report = rnnguard.apply(wrapped, optimizer, plan_of(CLIP, WARMUP))
    assert len(report.changes) == 2
    assert guard_of(optimizer).settings.max_norm == 0.5


# --- trained weights ---------------------------------------------------------------------


@pytest.mark.parametrize("plan", [plan_of(CHRONO), plan_of(NORM), plan_of(ORTHOGONAL)])
@pytest.mark.parametrize("fresh_optimizer", [False, True])
def test_trained_weights_are_refused_values_and_structure(
    plan: Plan, fresh_optimizer: bool
) -> None:
    model = Model()
    optimizer: Optimizer = SGD(model.parameters(), 0.1, momentum=0.5)
    train(model, optimizer, batches(20, 0))
    if fresh_optimizer:
        loaded = Model()
        loaded.load_state_dict(model.state_dict())
        model, optimizer = loaded, SGD(loaded.parameters(), 0.1)
    refusal = refused(plan, model, optimizer)
    assert (refusal.code, refusal.path) == ("RG902", plan.changes[0].path)
    assert refusal.cure.startswith("Apply the plan before `load_state_dict`")


def test_trained_weights_take_a_plan_of_steps() -> None:
    model = Model()
    optimizer = Adam(model.parameters())
    train(model, optimizer, batches(2, 0))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    rnnguard.apply(model, optimizer, plan_of(CLIP, WARMUP, change("adamw")))
    assert type(optimizer) is AdamW and guard_of(optimizer) is not None
    torch.testing.assert_close(dict(model.state_dict()), values, rtol=0, atol=0)


# --- once and twice ----------------------------------------------------------------------


def test_a_second_replay_changes_nothing_and_says_so() -> None:
    model = Model()
    optimizer = Adam(model.named_parameters())
    first = rnnguard.apply(model, optimizer, FULL)
    assert [each.remedy for each in first.changes] == [each.remedy for each in FULL]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = fingerprint(model, optimizer)
    second = rnnguard.apply(model, optimizer, FULL)
    assert fingerprint(model, optimizer) == before
    assert second.changes == ()
    assert "6 of the plan's 6 changes found their work done already." in second.notes
    assert second.undo() == "0 changes taken back."
    assert fingerprint(model, optimizer) == before


def test_values_that_are_written_twice_in_a_plan_are_still_the_same_the_second_time() -> None:
    plan = plan_of(CLIP, ORTHOGONAL, change("critical_gain", "second", factor=1.1))
    model = Model()
    optimizer = Adam(model.parameters())
    rnnguard.apply(model, optimizer, plan)
    before = fingerprint(model, optimizer)
    assert rnnguard.apply(model, optimizer, plan).changes == ()
    assert fingerprint(model, optimizer) == before


def test_a_gain_is_not_applied_on_top_of_itself() -> None:
    plan = plan_of(CLIP, change("critical_gain", "second", factor=1.1))
    model = Model()
    optimizer = Adam(model.parameters())
    rnnguard.apply(model, optimizer, plan)
    codes = {reason.code for reason in refused(plan, model, optimizer).reasons}
    assert "RG915" in codes


def test_an_empty_plan_is_in_order() -> None:
    model = Model()
    optimizer = Adam(model.parameters())
    before = fingerprint(model, optimizer)
    assert rnnguard.apply(model, optimizer, Plan()).changes == ()
    assert fingerprint(model, optimizer) == before


# --- resuming ----------------------------------------------------------------------------


def two_groups(model: nn.Module) -> Optimizer:
    head = list(model.head.parameters())
    rest = [p for p in model.parameters() if all(p is not h for h in head)]
    return SGD([{"params": head, "lr": 0.5}, {"params": rest}], 0.1, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adam": lambda m: Adam(m.parameters(), 0.01),
    "named adam": lambda m: Adam(m.named_parameters(), 0.01),
    "fused adamw": lambda m: AdamW(m.parameters(), 0.01, fused=True),
    "sgd in two groups": two_groups,
}


def plan_for(name: str) -> Plan:
    return plan_of(*(c for c in FULL if c.remedy != "amsgrad" or "adam" in name))


def resume(folder: Path) -> None:
    """What a new process does: build plain, apply, load, train on; saves what came of it."""
    torch.set_num_threads(1)
    torch.manual_seed(99)
    for name, build in OPTIMIZERS.items():
        model = Model()
        optimizer = build(model)
        rnnguard.apply(model, optimizer, folder / f"{name}.json")
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, batches(6, 2))
        end = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(end, folder / f"{name}.resumed.pt")


def is_the_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return same_bits(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_the_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_the_same, one, other))
    return bool(one == other)


def test_training_resumed_in_a_new_process_is_equal_bit_by_bit(
    tmp_path: Path, fresh_python: Callable[..., str]
) -> None:
    expected = {}
    for name, build in OPTIMIZERS.items():
        model = Model()
        optimizer = build(model)
        rnnguard.apply(model, optimizer, plan_for(name))
        # Into the warm-up, whose rest must go on after the load.
        train(model, optimizer, batches(3, 1))
        plan_for(name).to_json(tmp_path / f"{name}.json")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / f"{name}.pt")
        train(model, optimizer, batches(6, 2))
        expected[name] = copy.deepcopy(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        )
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from pathlib import Path; import test_replay\n"
        f"test_replay.resume(Path({str(tmp_path)!r}))"
    )
    fresh_python("-c", code)
    for name, state in expected.items():
        resumed = torch.load(tmp_path / f"{name}.resumed.pt", weights_only=True)
        assert is_the_same(resumed, state)
        steps = [group["rnnguard_step"] for group in resumed["optimizer"]["param_groups"]]
        assert set(steps) == {9}
        assert "first.output_norm.weight" in resumed["model"]


def test_the_note_of_a_replay_names_the_new_keys() -> None:
    model = Model()
    report = rnnguard.apply(model, Adam(model.parameters()), FULL)
    assert type(model.first) is OutputNormLSTM
    (note,) = (note for note in report.notes if "Checkpoints from now on" in note)
    assert "`first`" in note and "rnnguard.apply" in note
    assert report.undo().endswith("load after `rnnguard.apply` of `report.plan`.")
    assert json.loads(report.to_json())["plan"] == FULL.to_dict()
