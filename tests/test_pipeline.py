"""The user's story from end to end: diagnosis, rewrite, before and after, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.probe.snapshot import fingerprint


class LastStep(nn.Module):
    """A recurrence whose last output a linear head reads."""

    def __init__(self, rnn: nn.Module, classes: int = 4) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(int(rnn.hidden_size), classes)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0][:, -1])
        return output


def small_input(steps: int = 256, batch: int = 4, features: int = 8) -> Tensor:
    return 0.01 * torch.randn(batch, steps, features)


def recall_batches(steps: int, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The first symbol among noise: label shown at step 0, noise in channel 4 afterwards."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        label = torch.randint(4, (32,), generator=generator)
        x = torch.zeros(32, steps, 5)
        x[torch.arange(32), 0, label] = 1
        x[:, 1:, 4] = torch.randn(32, steps - 1, generator=generator)
        batches.append((x, label))
    return batches


WIDE: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(8, 512, batch_first=True),
    "gru": lambda: nn.GRU(8, 512, batch_first=True),
    "rnn": lambda: nn.RNN(8, 512, batch_first=True),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_default_cells_are_healthy_after_stabilization(name: str) -> None:
    model = LastStep(WIDE[name]())
    optimizer = torch.optim.Adam(model.parameters())
    report = rnnguard.stabilize(model, optimizer, inputs=small_input(), memory=200)
    assert report.before["rnn"].level == "vanishing"
    after = report["rnn"]
    assert after.level == "healthy"
    assert 5e-2 <= 10 ** after.retention[200] <= 100
    assert not after.expansive or after.growth_over_window < 1.1


def stabilized() -> tuple[nn.Module, torch.optim.Optimizer, rnnguard.Report]:
    model = LastStep(nn.LSTM(5, 32, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = recall_batches(60, 4, seed=0)
    report = rnnguard.stabilize(model, optimizer, batches, loss=nn.CrossEntropyLoss())
    return model, optimizer, report


def test_undo_restores_every_bit() -> None:
    model = LastStep(nn.LSTM(5, 32, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    inputs = torch.randn(4, 60, 5)
    before = fingerprint(model, optimizer)
    report = rnnguard.stabilize(model, optimizer, inputs=inputs, memory=60)
    assert fingerprint(model, optimizer) != before
    report.undo()
    assert fingerprint(model, optimizer) == before


def test_second_stabilize_plans_nothing() -> None:
    model, optimizer, first = stabilized()
    assert len(first.plan) > 0
    between = fingerprint(model, optimizer)
    batches = recall_batches(60, 4, seed=0)
    second = rnnguard.stabilize(model, optimizer, batches, loss=nn.CrossEntropyLoss())
    assert len(second.plan) == 0 and not second.changes
    assert fingerprint(model, optimizer) == between


@pytest.mark.parametrize("fresh_optimizer", [True, False])
def test_trained_model_keeps_its_weights(fresh_optimizer: bool) -> None:
    model = LastStep(nn.LSTM(5, 32, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = recall_batches(60, 30, seed=0)
    for x, label in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    if fresh_optimizer:
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    report = rnnguard.stabilize(model, optimizer, batches[:4], loss=nn.CrossEntropyLoss())
    assert {change.tier for change in report.changes} == {"step"}
    assert [refusal.code for refusal in report.refusals] == ["RG902"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_frozen_recurrence_keeps_its_weights() -> None:
    model = LastStep(nn.LSTM(5, 32, batch_first=True))
    for parameter in model.rnn.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(model.head.parameters())
    weights = model.rnn.weight_hh_l0.clone()
    report = rnnguard.stabilize(model, optimizer, inputs=torch.randn(4, 60, 5), memory=60)
    assert {change.tier for change in report.changes} == {"step"}
    assert [refusal.code for refusal in report.refusals] == ["RG902"]
    assert torch.equal(model.rnn.weight_hh_l0, weights)


def test_remedy_that_makes_the_loss_non_finite_is_taken_back() -> None:
    """A loss that only the default weights leave finite stands for an unstable step."""
    model = LastStep(nn.GRU(5, 32, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters())
    first = model.rnn.bias_ih_l0.detach().clone()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        changed = not torch.equal(model.rnn.bias_ih_l0, first)
        return output.sum() * (float("nan") if changed else 1.0)

    data = (torch.randn(4, 60, 5), torch.zeros(4))
    report = rnnguard.stabilize(model, optimizer, data, loss=loss, memory=60)
    tried = [change for change in report.changes if change.path == "rnn"]
    assert [change.outcome for change in tried] == ["taken back"]
    assert torch.equal(model.rnn.bias_ih_l0, first)


def test_plan_changes_nothing_and_replays() -> None:
    model = LastStep(nn.GRU(5, 32, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters())
    inputs = torch.randn(4, 60, 5)
    before = fingerprint(model, optimizer)
    plan = rnnguard.plan(model, optimizer, inputs=inputs, memory=60)
    assert fingerprint(model, optimizer) == before
    saved = json.loads(json.dumps(plan.to_dict()))
    rnnguard.apply(model, optimizer, saved)
    bias = model.rnn.bias_ih_l0.detach()[32:64]
    assert bool((bias >= 0).all()) and float(bias.max()) > 3

    other = LastStep(nn.GRU(5, 32, batch_first=True))
    report = rnnguard.apply(other, torch.optim.Adam(other.parameters()), saved)
    assert torch.equal(other.rnn.bias_ih_l0, model.rnn.bias_ih_l0)
    assert [change.outcome for change in report.changes] == ["applied"] * len(plan)


def test_plan_of_another_model_is_refused() -> None:
    model = LastStep(nn.GRU(5, 32, batch_first=True))
    plan = rnnguard.plan(
        model, torch.optim.Adam(model.parameters()), inputs=torch.randn(4, 60, 5), memory=60
    )
    other = nn.Sequential(nn.GRU(5, 32))
    optimizer = torch.optim.Adam(other.parameters())
    before = fingerprint(other, optimizer)
    with pytest.raises(rnnguard.RefusedError) as caught:
        rnnguard.apply(other, optimizer, plan)
    assert caught.value.code == "RG915"
    assert fingerprint(other, optimizer) == before


def test_healthy_control_gets_the_step_tier_only() -> None:
    model = LastStep(nn.GRU(5, 32, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = recall_batches(10, 8, seed=0)
    report = rnnguard.stabilize(model, optimizer, batches, loss=nn.CrossEntropyLoss())
    assert {change.tier for change in report.changes} == {"step"}
    assert report.ok and not report.exceeds("warning")


def test_audit_leaves_no_trace() -> None:
    model = LastStep(nn.LSTM(5, 32, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    before = fingerprint(model, optimizer)
    report = rnnguard.audit(model, optimizer, recall_batches(60, 4, 0), loss=nn.CrossEntropyLoss())
    assert fingerprint(model, optimizer) == before
    site = report["rnn"]
    assert (site.level, site.memory_needed, site.memory_source) == ("vanishing", 60, "estimated")
    assert site.lag_concentration == 1.0


def test_length_is_only_assumed_where_the_data_tell_nothing() -> None:
    model = LastStep(nn.LSTM(5, 32, batch_first=True))
    noise = [(torch.randn(32, 60, 5), torch.randint(4, (32,))) for _ in range(4)]
    site = rnnguard.audit(model, data=noise, loss=nn.CrossEntropyLoss())["rnn"]
    assert (site.level, site.memory_source) == ("at risk: fading", "assumed")


def test_skipped_site_is_left_alone() -> None:
    model = LastStep(nn.LSTM(5, 32, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters())
    report = rnnguard.stabilize(
        model, optimizer, inputs=torch.randn(4, 60, 5), memory=60, skip=["rnn"]
    )
    assert {change.path for change in report.changes} == {None}


def test_exploding_recurrence_is_tamed() -> None:
    rnn = nn.RNN(5, 64, batch_first=True)
    nn.init.normal_(rnn.weight_hh_l0, 0, 3 / 8)
    model = LastStep(rnn)
    optimizer = torch.optim.Adam(model.parameters())
    inputs = 0.01 * torch.randn(8, 100, 5)
    report = rnnguard.stabilize(model, optimizer, inputs=inputs, memory=100)
    assert report.before["rnn"].level == "exploding"
    assert report["rnn"].level == "healthy"


def test_remedy_that_does_not_help_is_taken_back() -> None:
    rnn = nn.RNN(5, 64, batch_first=True)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    nn.init.zeros_(rnn.bias_ih_l0)
    nn.init.zeros_(rnn.bias_hh_l0)
    nn.init.uniform_(rnn.weight_ih_l0, -0.125, 0.125)
    model = LastStep(rnn)
    optimizer = torch.optim.Adam(model.parameters())
    weights = rnn.weight_hh_l0.detach().clone()
    report = rnnguard.stabilize(model, optimizer, inputs=torch.randn(8, 200, 5), memory=200)
    tried = [change for change in report.changes if change.remedy == "orthogonal"]
    assert [change.outcome for change in tried] == ["taken back"]
    assert "log10 R(200)" in tried[0].result
    assert torch.equal(rnn.weight_hh_l0, weights)
    assert all(change.remedy != "orthogonal" for change in report.plan)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no site": (lambda: on(nn.Linear(3, 3)), "RG003"),
    "foreign optimizer": (
        lambda: rnnguard.stabilize(
            LastStep(nn.GRU(5, 8)), torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
        ),
        "RG904",
    ),
    "wrong width": (
        lambda: on(LastStep(nn.GRU(5, 8, batch_first=True)), inputs=torch.randn(2, 3, 6)),
        "RG912",
    ),
    "wrong dtype": (
        lambda: on(LastStep(nn.GRU(5, 8, batch_first=True)), inputs=torch.ones(2, 3, 5).long()),
        "RG912",
    ),
    "unknown tier": (lambda: on(LastStep(nn.GRU(5, 8)), tiers=["stepp"]), "RG914"),
    "empty data": (lambda: on(LastStep(nn.GRU(5, 8)), data=[]), "RG912"),
}


def on(model: nn.Module, **options: object) -> rnnguard.Report:
    optimizer = torch.optim.Adam(model.parameters())
    before = fingerprint(model, optimizer)
    try:
        return rnnguard.stabilize(model, optimizer, **options)
    finally:
        assert fingerprint(model, optimizer) == before


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_before_any_touch(name: str) -> None:
    call, code = BAD[name]
    with pytest.raises(rnnguard.RefusedError) as caught:
        call()
    assert caught.value.code == code
    assert str(caught.value).endswith(f"({code})") and "\n" not in str(caught.value)


def test_failure_in_the_middle_restores_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LastStep(nn.LSTM(5, 32, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters())
    inputs = torch.randn(4, 60, 5)
    before = fingerprint(model, optimizer)
    calls = 0

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    monkeypatch.setattr("rnnguard.mending.verify", failing)
    with pytest.raises(KeyboardInterrupt):
        rnnguard.stabilize(model, optimizer, inputs=inputs, memory=60)
    assert calls == 1
    assert fingerprint(model, optimizer) == before


def test_one_liner_without_data_works() -> None:
    model = LastStep(nn.LSTM(5, 32, batch_first=True))
    report = rnnguard.stabilize(model, torch.optim.Adam(model.parameters()))
    assert report.before.run.basis == "inferred inputs"
    assert report["rnn"].level == "unknown"
    assert {change.tier for change in report.changes} == {"step"}
