"""Hand-written recurrences are mended by values and steps; plans are replayed and undone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

import rnnguard
from rnnguard.errors import RefusedError
from rnnguard.probe.snapshot import fingerprint
from rnnguard.report.report import Report

IN, H, B, T = 5, 16, 8, 60


class Own(nn.Module):
    """An LSTM (gates f, o, g, i), a GRU that keeps with 1 - z, or a tanh RNN, in a loop."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        blocks = {"lstm": 4, "gru": 2, "rnn": 1}[kind]
        self.x2h, self.h2h = nn.Linear(IN, blocks * H), nn.Linear(H, blocks * H)
        self.head = nn.Linear(H, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), H)
        for x_t in x.unbind(1):
            parts = (self.x2h(x_t) + self.h2h(h)).split(H, 1)
            if self.kind == "lstm":
                f, o, g, i = parts
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif self.kind == "gru":
                z, n = parts[0].sigmoid(), parts[1].tanh()
                h = (1 - z) * h + z * n
            else:
                h = parts[0].tanh()
        return self.head(h)


def stabilized(kind: str, **options: object) -> tuple[Own, Adam, Report]:
    model = Own(kind)
    optimizer = Adam(model.parameters())
    known = {"inputs": torch.randn(B, T, IN), "memory": T} | options
    return model, optimizer, rnnguard.stabilize(model, optimizer, **known)  # type: ignore[arg-type]


CURES = {"lstm": "written_chrono_bias", "gru": "written_chrono_bias", "rnn": "written_orthogonal"}


@pytest.mark.parametrize("kind", CURES)
def test_each_kind_gets_its_cure(kind: str) -> None:
    _, _, report = stabilized(kind)
    applied = [c.remedy for c in report.changes if c.outcome == "applied" and c.path is not None]
    assert applied[0] == CURES[kind] and set(applied[1:]) <= {"written_critical_gain"}
    assert (report.before[""].level, report[""].level) == ("vanishing", "healthy")
    assert not report.refusals


def test_the_dose_stands_where_the_graph_shows_the_gates() -> None:
    model, _, _ = stabilized("lstm")
    keep, out, cand, write = model.x2h.bias.detach().split(H)
    assert bool((keep > 0).all()) and torch.equal(write, -keep)
    assert float(keep.max()) > 2.5 > float(keep.min())
    assert not model.h2h.bias.detach()[:H].any() and not model.h2h.bias.detach()[3 * H :].any()
    fresh = Own("lstm").x2h.bias.detach()
    for untouched in (out, cand):
        assert float(untouched.abs().max()) <= float(fresh.abs().max()) * 1.2


def test_a_gate_that_keeps_by_closing_gets_a_negative_bias() -> None:
    model, _, _ = stabilized("gru")
    assert bool((model.x2h.bias[:H] < 0).all()) and not model.h2h.bias[:H].detach().any()


def test_a_plain_one_becomes_orthogonal() -> None:
    model, _, _ = stabilized("rnn")
    w = model.h2h.weight.detach().double()
    gain = float((w @ w.T).diagonal().mean())
    assert 1 <= gain < 4
    assert torch.allclose(w @ w.T, gain * torch.eye(H, dtype=torch.float64), atol=1e-5)


def test_an_exploding_one_is_tamed() -> None:
    model = Own("rnn")
    nn.init.normal_(model.h2h.weight, 0, 3 / H**0.5)
    report = rnnguard.stabilize(
        model, Adam(model.parameters()), inputs=0.1 * torch.randn(B, T, IN), memory=T
    )
    assert report.before[""].level in ("exploding", "at risk: expansive")
    assert report[""].level == "healthy"


@pytest.mark.parametrize("kind", CURES)
def test_all_is_undone_bit_by_bit_and_replayed_from_the_plan(kind: str) -> None:
    torch.manual_seed(3)
    model = Own(kind)
    optimizer, x = Adam(model.parameters()), torch.randn(B, T, IN)
    before = fingerprint(model, optimizer)
    plan = rnnguard.plan(model, optimizer, inputs=x, memory=T)
    assert fingerprint(model, optimizer) == before
    report = rnnguard.stabilize(model, optimizer, inputs=x, memory=T)
    mended = {name: value.clone() for name, value in model.state_dict().items()}
    report.undo()
    assert fingerprint(model, optimizer) == before
    torch.manual_seed(3)
    other = Own(kind)
    rnnguard.apply(other, Adam(other.parameters()), plan.to_dict())
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in mended.items())


def test_a_plan_for_another_model_is_refused() -> None:
    model, x = Own("lstm"), torch.randn(B, T, IN)
    plan = rnnguard.plan(model, Adam(model.parameters()), inputs=x, memory=T)
    other = nn.Sequential(nn.Linear(IN, 4))
    with pytest.raises(RefusedError, match=r"x2h\.bias, which the model does not have.*RG915"):
        rnnguard.apply(other, Adam(other.parameters()), plan)


def trained_by_steps(model: Own, optimizer: Adam) -> None:
    model(torch.randn(B, T, IN)).sum().backward()
    optimizer.step()


def trained_by_weights(model: Own, optimizer: Adam) -> None:
    with torch.no_grad():
        model.h2h.weight.mul_(1.7).add_(0.05)


@pytest.mark.parametrize("train", [trained_by_steps, trained_by_weights])
def test_trained_weights_are_never_touched(train: Callable[[Own, Adam], None]) -> None:
    model = Own("lstm")
    optimizer = Adam(model.parameters())
    train(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = rnnguard.stabilize(model, optimizer, inputs=torch.randn(B, T, IN), memory=T)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "RG902" in {refusal.code for refusal in report.refusals}


def test_structure_is_refused_with_a_reason_where_values_do_not_suffice() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.full((H,), 0.3))
            self.x2h = nn.Linear(IN, H)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), H)
            for x_t in x.unbind(1):
                h = self.rate * h + self.x2h(x_t)
            return h

    model = Leaky()
    report = rnnguard.stabilize(
        model, Adam(model.parameters()), inputs=torch.randn(B, T, IN), memory=T
    )
    assert report[""].level == "vanishing"
    (refusal,) = (found for found in report.refusals if found.code == "RG910")
    assert "hand-written" in str(refusal)
    assert {c.remedy for c in report.changes if c.outcome == "applied"} == {
        "clip_gradient",
        "nonfinite_guard",
    }


def test_a_site_to_skip_is_left_alone() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own("lstm")

        def forward(self, x: Tensor) -> Tensor:
            return self.own(x)

    model = Around()
    report = rnnguard.stabilize(
        model, Adam(model.parameters()), inputs=torch.randn(B, T, IN), memory=T, skip=["own"]
    )
    assert [change.path for change in report.changes] == [None, None]


def test_a_frozen_gate_bias_stays() -> None:
    model = Own("lstm")
    model.x2h.bias.requires_grad_(False)
    before = model.x2h.bias.detach().clone()
    report = rnnguard.stabilize(
        model,
        Adam(p for p in model.parameters() if p.requires_grad),
        inputs=torch.randn(B, T, IN),
        memory=T,
    )
    assert torch.equal(model.x2h.bias.detach(), before)
    doses = [str(c.dose.get("gates")) for c in report.changes if c.path is not None]
    assert doses and not any("x2h.bias" in dose for dose in doses)


def test_a_gate_bias_of_another_optimizer_stays() -> None:
    model = Own("lstm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = Adam(p for name, p in model.named_parameters() if name != "x2h.bias")
    rnnguard.stabilize(model, optimizer, inputs=torch.randn(B, T, IN), memory=T)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
