"""The policies of the outcomes benchmark do what their descriptions say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from outcomes_cases import case_of, part, tiny
from torch import nn


def biases(model: nn.Module, name: str) -> list[torch.Tensor]:
    return [p for n, p in model.named_parameters() if name in n]


def test_the_blind_recipe_does_what_it_says() -> None:
    task = tiny()
    case = case_of(task, "lstm x2")
    head = case.model.head.weight.clone()
    prepared = part("recipes").blind(case)
    for weight in biases(case.model, "weight_hh"):
        assert torch.allclose(weight.T @ weight, torch.eye(8), atol=1e-5), "all four blocks as one"
    for bias in biases(case.model, "bias_ih") + biases(case.model, "bias_hh"):
        assert (bias[8:16] == 1).all() and (bias[:8] != 1).all() and (bias[16:] != 1).all()
    assert len(biases(case.model, "bias_ih")) == 2
    assert type(prepared.optimizer) is torch.optim.AdamW
    assert prepared.optimizer.param_groups[0]["lr"] == task.rate
    assert torch.equal(case.model.head.weight, head)
    assert clipped_norm(prepared) == pytest.approx(5, rel=1e-4)
    gru = case_of(task, "gru")
    kept = [bias.clone() for bias in biases(gru.model, "bias")]
    part("recipes").blind(gru)
    assert all(map(torch.equal, kept, biases(gru.model, "bias")))
    written, fresh = case_of(task, "written"), case_of(task, "written")
    part("recipes").blind(written)
    assert all(map(torch.equal, written.model.parameters(), fresh.model.parameters()))


def clipped_norm(prepared: Any) -> float:
    """The total norm that remains of gradients of 100."""
    for parameter in prepared.model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    prepared.before_update()
    return math.hypot(*(float(p.grad.norm()) for p in prepared.model.parameters()))


@pytest.mark.parametrize("name", ["lstm x2", "bilstm", "gru", "written", "rnn"])
def test_chrono_biases_keep_for_one_to_all_steps(name: str) -> None:
    task = tiny()
    case, fresh = (case_of(replace(task, steps=50), name) for _ in range(2))
    prepared = part("starts").chrono_and_clip(case)
    changed = {n for (n, p), q in zip(case.model.named_parameters(), fresh.model.parameters(),
                                      strict=True) if not torch.equal(p, q)}  # fmt: skip
    assert clipped_norm(prepared) == pytest.approx(1, rel=1e-4)
    if name == "rnn":
        assert not changed
        return
    assert all("bias" in n and "head" not in n for n in changed)
    inputs = [p for n, p in case.model.named_parameters() if n in changed and p.abs().sum() > 0]
    assert len(inputs) == (2 if name in ("lstm x2", "bilstm") else 1)
    for bias in inputs:
        block = {"gru": 1, "written": 0}.get(name, 1)
        keep = bias.detach()[8 * block : 8 * block + 8]
        assert (keep >= 0).all() and (keep <= math.log(49)).all() and len(keep.unique()) == 8
        rest = torch.cat([bias[: 8 * block], bias[8 * block + 8 :]])
        if "lstm" in name:
            assert torch.equal(bias[:8], -keep)
            rest = rest[8:]
        assert (rest == 0).all()


def test_chrono_steps_keep_more_of_the_state() -> None:
    """The sign: after chrono, every cell with a keep gate holds on to an early input for longer."""
    task = tiny()
    x = torch.zeros(1, 30, 1)
    x[0, 0] = 3.0
    for name in ("lstm", "gru", "written"):
        case = case_of(replace(task, steps=60), name)
        kept = []
        for act in (lambda case: None, part("starts").chrono_and_clip):
            act(case)
            with torch.no_grad():
                apart = case.model(x) - case.model(torch.zeros_like(x))
            kept.append(float(apart.norm()))
        assert kept[1] > 10 * kept[0], name


def test_agc_limits_each_row_by_its_weights() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0]]))
    weight.grad = torch.tensor([[6.0, 8.0], [6.0, 8.0], [0.03, 0.04]])
    part("clippers").clip_rows_([weight])
    norms = weight.grad.norm(dim=1).tolist()
    # 1 % of the row's norm, of at least 0.001; the third is small enough.
    assert norms == pytest.approx([0.05, 1e-5, 0.05], rel=1e-4)


def test_autoclip_clips_at_the_tenth_percentile_so_far() -> None:
    parameter, clip = nn.Parameter(torch.zeros(1)), part("clippers").AutoClip()
    left = []
    for norm in (5.0, 1.0, 9.0):
        parameter.grad = torch.tensor([norm])
        clip([parameter])
        left.append(float(parameter.grad))
    assert left == pytest.approx([5, 1, np.percentile([5.0, 1.0, 9.0], 10)], rel=1e-5)


def test_zclip_learns_the_norm_and_then_cuts_what_stands_out() -> None:
    clip = part("clippers").ZClip()
    for norm in [0.4, 0.6] * 12 + [0.5]:
        assert clip.threshold(norm) == math.inf
    mean, deviation = clip.mean, math.sqrt(clip.variance)
    assert mean == pytest.approx(0.5) and deviation == pytest.approx(0.098, abs=1e-3)
    assert clip.threshold(0.6) == 0.6
    z = (3.0 - clip.mean) / (math.sqrt(clip.variance) + 1e-6)
    wanted = clip.mean + 2.5 * math.sqrt(clip.variance) / (z / 2.5)
    before = clip.mean
    assert clip.threshold(3.0) == pytest.approx(wanted)
    assert clip.mean == pytest.approx(0.97 * before + 0.03 * wanted), "learns the cut one"
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([2.0])
    part("clippers").ZClip()([parameter])
    assert float(parameter.grad) == pytest.approx(1, rel=1e-5), "the cap of the warm-up"


def test_the_finder_picks_the_steepest_slope_and_gives_the_model_back() -> None:
    task = tiny()
    finder = part("rate_finder")
    losses = [2.0] * 20 + [1.9, 1.7, 1.2, 0.9, 0.85] + [0.8] * 10
    rates = [float(index) for index in range(len(losses))]
    assert finder.steepest(rates, losses) == 22
    assert finder.steepest([1.0] * 12, [1.0] * 12) is None
    case, fresh = case_of(task), case_of(task)
    finder.found_rate_and_clip(case)
    assert all(map(torch.equal, case.model.parameters(), fresh.model.parameters()))
    assert not case.optimizer.state
    assert case.optimizer.param_groups[0]["lr"] != task.rate


def test_a_random_recipe_is_the_same_for_the_same_cell_and_seed() -> None:
    task = tiny()
    drawn = [part("recipes").at_random(case_of(task, "lstm", s)).done for s in range(20)]
    assert drawn[3] == part("recipes").at_random(case_of(task, "lstm", 3)).done
    assert len(set(drawn)) > 8
    case = case_of(task, "lstm", next(s for s, d in enumerate(drawn) if "LayerNorm" in d))
    part("recipes").at_random(case)
    trained = {id(p) for group in case.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in case.model.parameters()}


@pytest.mark.parametrize(
    ("seen", "symptom"),
    [
        ({}, "not converging"),
        ({"first": 1e-5, "last": 1.0}, "vanish"),
        ({"first": 1e-3, "last": 10.0}, "not converging"),
        ({"first": 71.0, "last": 1.0}, "explode"),
        ({"finite": False, "loss": math.nan}, "explode"),
        ({"dead": 0.7}, "dying"),
    ],
)
def test_the_symptoms_of_a_training_that_stands_still(seen: dict[str, float], symptom: str) -> None:
    watched = part("symptoms").Watched([0.25] * 9, **seen)
    assert watched.symptom(25, 3) == symptom
    watched.accuracies = [0.25] * 4
    assert watched.symptom(25, 3) == "", "before 30 % of the epochs nothing is judged"


def test_a_training_that_gains_has_no_symptom_unless_it_swings() -> None:
    symptoms = part("symptoms")
    steady = [0.1 * index for index in range(10)]
    assert symptoms.Watched(steady, first=1e-9).symptom(25, 3) == ""
    swinging = [0.9, 0.5, 0.9, 0.5, 0.9, 0.5, 0.9, 0.5, 0.9]
    assert symptoms.swings(swinging) == 3
    assert symptoms.Watched(swinging).symptom(25, 3) == "unstable"


def test_autotrainer_trains_each_repair_from_the_first_weights() -> None:
    """Without a hope of learning: every repair starts anew, and all trainings are paid for."""
    task = tiny()

    def noise(batch: int, steps: int, generator: torch.Generator) -> tuple[Any, Any]:
        x = torch.zeros(batch, steps, 1)
        return x, torch.arange(batch) % 2

    hopeless = replace(task, draw=noise, budget=400, rate=1e-4)
    case = case_of(hopeless)
    first = [p.detach().clone() for p in case.model.rnn.parameters()]
    prepared = part("autotrainer").autotrainer(case)
    output, target = torch.zeros(8, 2), torch.arange(8) % 2
    for repair in ("SELU", "ReLU", "batch norm", ""):
        given, steps = None, 0
        for p in prepared.model.parameters():
            p.grad = torch.ones_like(p)
        # A gradient of the first layer that has died away names the symptom.
        next(prepared.model.parameters()).grad.fill_(1e-9)
        while given is None and steps < 200:
            steps += 1
            prepared.optimizer.step()
            given = prepared.watch(steps, torch.tensor(0.7), output, target)
            if given is None:
                next(p for p in prepared.model.parameters() if p.ndim > 1).grad.fill_(1e-9)
        if not repair:
            assert given is None and steps == 200, "the list is used up"
            return
        assert given is not None and steps == 60, "a check of three epochs of 20 steps"
        assert given.done.endswith(f"vanish: {repair}")
        assert all(map(torch.equal, first, given.model.rnn.parameters()))
        prepared = given


def test_autotrainer_draws_another_repair_each_time() -> None:
    """Six optimizers drawn one after the other are not all the same."""
    repairing = part("autotrainer").Repairing(case_of(tiny()))
    kinds = []
    for _ in range(2):
        repairing._left = None
        for _ in range(3):
            given = repairing._repaired("not converging", "watched")
            kinds.append(type(given.optimizer).__name__)
            assert given.optimizer.param_groups[0]["params"][0] is next(given.model.parameters())
    assert len(set(kinds)) > 1


def test_an_untouched_training_is_kept_as_long_as_nothing_is_wrong() -> None:
    task = tiny()
    case = case_of(task)
    prepared = part("autotrainer").autotrainer(case)
    target = torch.arange(8) % 2
    right = nn.functional.one_hot(target, 2).float()
    assert prepared.model is case.model and prepared.optimizer is case.optimizer
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    assert all(
        prepared.watch(step, torch.tensor(0.1), right, target) is None for step in range(1, 200)
    )


def test_a_policy_that_is_not_built_yet_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny()
    import rnnguard

    monkeypatch.setattr(rnnguard, "stabilize", lambda model, optimizer, data: None)
    with pytest.raises(NotImplementedError, match="no `trial="):
        part("guarded").tried(case_of(task))
