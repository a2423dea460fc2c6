"""Models and calls from the wild that once ended in a crash or in a wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rnnguard
from rnnguard.decision.verification import Verdict
from rnnguard.probe.snapshot import fingerprint

X, Y = torch.randn(6, 15, 5), torch.randint(2, (6,))
DATA = [(X, Y)] * 3
CE, PER_SAMPLE = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none")


class Net(nn.Module):
    """A recurrence and a head, read by the given function or at the last step."""

    def __init__(self, read: Callable[..., Tensor] | None = None, rnn: nn.Module | None = None):
        super().__init__()
        self.rnn = rnn or nn.GRU(5, 16, batch_first=True)
        self.head = nn.Linear(16, 2)
        self.read = read

    def forward(self, x: Any) -> Tensor:
        if self.read is not None:
            return self.read(self, x)
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def shrinking(model: Any, x: Tensor) -> Tensor:
    h, outputs = torch.zeros(6, 16), []
    for step in range(15):
        alive = 6 - step // 4
        h = model.rnn(x[:alive, step], h[:alive])
        outputs.append(model.head(h))
    return torch.cat(outputs)


def test_sequences_that_drop_out_of_the_batch() -> None:
    model = Net(shrinking, nn.GRUCell(5, 16))
    (site,) = rnnguard.audit(model, data=DATA, loss=lambda out, _: out.sum()).sites
    assert (site.steps, site.batch) == (15, 6)


class WeightDrop(nn.Module):
    """Makes the recurrent weight anew in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(5, 16, batch_first=True)
        self.raw = nn.Parameter(self.inner.weight_hh_l0.detach().clone())
        del self.inner.weight_hh_l0

    def forward(self, x: Tensor) -> Any:
        self.inner.weight_hh_l0 = functional.dropout(self.raw, 0.5)
        names = self.inner._flat_weights_names
        self.inner._flat_weights = [getattr(self.inner, name) for name in names]
        return self.inner(x)


def test_weight_drop_is_measured_and_never_written() -> None:
    model = Net(rnn=WeightDrop())
    assert len(rnnguard.audit(model, data=DATA, loss=CE).sites) == 1
    with pytest.raises(rnnguard.RefusedError) as caught:
        rnnguard.stabilize(model, torch.optim.Adam(model.parameters()), DATA, loss=CE)
    assert caught.value.code == "RG903" and "weight_hh_l0" in str(caught.value)


def backward_inside(model: nn.Module, batch: Any) -> Tensor:
    loss = CE(model(batch[0]), batch[1])
    loss.backward()
    return loss


def frozen() -> nn.Module:
    return Net().requires_grad_(False)


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Net()


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "loss per sample": (
        Net,
        {"data": DATA, "loss": nn.CrossEntropyLoss(reduction="none")},
        "RG912",
    ),
    "backward inside the step": (Net, {"data": DATA, "step": backward_inside}, "RG912"),
    "a step that gives a float": (Net, {"data": DATA, "step": lambda m, b: 1.0}, "RG912"),
    "nothing to train": (frozen, {"data": DATA, "loss": CE}, "RG912"),
    "empty batch": (Net, {"data": [(torch.zeros(0, 15, 5), Y[:0])], "loss": CE}, "RG912"),
    "half a step of memory": (Net, {"data": DATA, "loss": CE, "memory": 10.5}, "RG920"),
    "negative memory": (Net, {"data": DATA, "loss": CE, "memory": -3}, "RG920"),
    "made in inference mode": (in_inference_mode, {"data": DATA, "loss": CE}, "RG921"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    build, options, code = REFUSED[name]
    with pytest.raises(rnnguard.RefusedError) as caught:
        rnnguard.audit(build(), **options)
    assert caught.value.code == code
    assert len(caught.value.reasons) == 1


def test_a_state_whose_graph_is_spent() -> None:
    model = Net()
    model.h = None

    def read(net: Any, x: Tensor) -> Tensor:
        out, net.h = net.rnn(x, net.h)
        logits: Tensor = net.head(out[:, -1])
        return logits

    model.read = read
    CE(model(X), Y).backward()
    with pytest.raises(rnnguard.RefusedError, match="Detach a state") as caught:
        rnnguard.audit(model, data=DATA, loss=CE)
    assert caught.value.code == "RG912"


def test_unbatched_input_with_a_single_target() -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0][-1]), nn.GRU(5, 16))
    report = rnnguard.audit(model, data=[(torch.randn(15, 5), torch.tensor(1))], loss=CE)
    assert len(report.sites) == 1


def test_no_gradient_is_left_on_the_criterion() -> None:
    criterion = nn.Linear(2, 2)
    rnnguard.audit(Net(), data=DATA, loss=lambda out, target: CE(criterion(out), target))
    assert criterion.weight.grad is None


def test_a_subclass_of_adam_keeps_its_class() -> None:
    class Lookahead(torch.optim.Adam):
        pass

    model = Net()
    optimizer = Lookahead(model.parameters(), weight_decay=0.01)
    rnnguard.stabilize(model, optimizer, DATA, loss=CE)
    assert type(optimizer) is Lookahead


def test_the_other_network_of_a_pair_is_left_alone() -> None:
    model = nn.ModuleDict({"generator": Net(), "critic": Net()})
    optimizer = torch.optim.Adam(model["generator"].parameters())
    kept = {name: value.clone() for name, value in model["critic"].state_dict().items()}

    def step(pair: Any, batch: Any) -> Tensor:
        loss: Tensor = CE(pair["generator"](batch[0]) + pair["critic"](batch[0]), batch[1])
        return loss

    report = rnnguard.stabilize(model, optimizer, DATA, step=step, memory=15)
    assert {c.path for c in report.changes} == {None, "generator.rnn"}
    assert all(
        torch.equal(value, kept[name]) for name, value in model["critic"].state_dict().items()
    )


def test_fresh_adagrad_counts_as_untrained() -> None:
    model = Net()
    optimizer = torch.optim.Adagrad(model.parameters())
    report = rnnguard.stabilize(model, optimizer, DATA, loss=CE, memory=15)
    assert "chrono_bias" in {change.remedy for change in report.changes}


def test_the_longest_batch_is_measured() -> None:
    batches = [(torch.randn(6, steps, 5), Y) for steps in (2, 40, 3)]
    (site,) = rnnguard.audit(Net(), data=batches, loss=CE).sites
    assert site.steps == 40


def test_a_packed_sequence_is_one_argument() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(X, [15, 9, 9, 4, 3, 2], batch_first=True)
    model = Net(lambda m, x: m.head(m.rnn(x)[1][-1]))
    (site,) = rnnguard.audit(model, data=[(packed, Y)], loss=CE).sites
    assert site.packed and site.steps == 15


def test_a_list_is_one_argument_where_the_forward_takes_one() -> None:
    model = Net(lambda m, x: m.head(m.rnn(torch.stack(x))[0][:, -1]))
    assert len(rnnguard.audit(model, inputs=list(X)).sites) == 1


def test_cells_in_a_plain_list_are_named() -> None:
    model = Net(lambda m, x: m.head(m.cells[0](x)[0][:, -1]))
    model.cells = [nn.GRU(5, 16, batch_first=True)]
    del model.rnn
    with pytest.raises(rnnguard.RefusedError) as caught:
        rnnguard.stabilize(model, torch.optim.Adam(model.parameters()), DATA, loss=CE)
    assert {reason.code for reason in caught.value.reasons} == {"RG109"}


def test_an_output_as_long_as_the_decoding_took() -> None:
    """The number of steps rests on the weights, so that a rewrite may change it."""

    def decode(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        out = m.head(m.rnn(x)[0])
        length = int(m.rnn.bias_ih_l0.detach().abs().sum()) % 7 + 1
        return out[:, -1], out[:, :length].argmax(-1)

    model = Net(decode)
    before = fingerprint(model)
    report = rnnguard.stabilize(model, torch.optim.Adam(model.parameters()), inputs=X, memory=15)
    report.undo()
    assert fingerprint(model) == before


def test_a_bad_value_in_the_data_rewrites_no_weights() -> None:
    model = Net(rnn=nn.LSTM(5, 16, batch_first=True))
    bad = X.clone()
    bad[0, 3, 1] = float("nan")
    report = rnnguard.stabilize(
        model, torch.optim.Adam(model.parameters()), [(bad, Y)] * 3, loss=CE, memory=15
    )
    assert report.level == "unstable" and "RG403" in {f.code for f in report.remaining}
    assert {change.tier for change in report.changes} == {"step"}


def test_gates_without_bias_get_what_can_be_had() -> None:
    model = Net(rnn=nn.GRU(5, 16, batch_first=True, bias=False))
    optimizer = torch.optim.Adam(model.parameters())
    report = rnnguard.stabilize(model, optimizer, inputs=torch.randn(6, 60, 5), memory=60)
    assert [c.remedy for c in report.changes if c.path == "rnn"] == [
        "orthogonal",
        "layer_norm_inside",
    ]


def test_a_plan_for_adam_is_not_replayed_on_sgd() -> None:
    model = Net()
    change = {
        "remedy": "adamw",
        "path": None,
        "tier": "step",
        "dose": {},
        "scenario": "x",
        "why": "",
    }
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(rnnguard.RefusedError) as caught:
        rnnguard.apply(model, optimizer, {"changes": [change]})
    assert caught.value.code == "RG915" and type(optimizer) is torch.optim.SGD


def test_the_output_behind_a_norm_is_measured_with_its_epsilon() -> None:
    model = Net(rnn=nn.LSTM(5, 16, batch_first=True))
    inputs = 1e-4 * torch.randn(8, 60, 5)
    report = rnnguard.stabilize(
        model, torch.optim.Adam(model.parameters()), inputs=inputs, memory=60
    )
    assert "layer_norm" in {c.remedy for c in report.changes if c.outcome == "applied"}
    with torch.no_grad():
        real = float(model.rnn(inputs)[0].square().mean().sqrt())
    assert report["rnn"].output_rms == pytest.approx(real, rel=0.2)


def test_what_was_taken_back_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scenario asks for the same remedy three times: once as measured, once more gently."""
    model = Net(rnn=nn.RNN(5, 16, batch_first=True, nonlinearity="relu"))
    optimizer = torch.optim.Adam(model.parameters())
    monkeypatch.setattr("rnnguard.mending.verify", lambda *_: Verdict(False, "did not help"))
    report = rnnguard.stabilize(model, optimizer, inputs=torch.randn(6, 60, 5), memory=60)
    tried = [change for change in report.changes if change.path == "rnn"]
    assert [change.remedy for change in tried] == ["orthogonal", "critical_gain", "critical_gain"]
    first, second = (float(change.dose["factor"] or 0) for change in tried[1:])
    assert second == pytest.approx(first**0.5, rel=1e-3)


@dataclass
class Sequences:
    """A batch as a class of the user's own."""

    x: Tensor


def in_place(model: Any, x: Any) -> Tensor:
    """A forward that scales whatever it is given in place."""
    x = x["x"] if isinstance(x, dict) else x.x if isinstance(x, Sequences) else x
    logits: Tensor = model.head(model.rnn(x.mul_(0.5))[0][:, -1])
    return logits


HELD: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "dict in a tuple": lambda x: ({"x": x},),
    "dataclass": Sequences,
}


@pytest.mark.parametrize("form", HELD)
def test_a_forward_that_changes_its_input_in_place(form: str) -> None:
    """The user's batch stays as it is, and every look sees the same one."""
    x = 1e-2 * X
    given, left = HELD[form](x), x.clone()
    site = rnnguard.audit(Net(in_place), inputs=given, memory=15)["rnn"]
    assert torch.equal(x, left) and x._version == 0
    assert site.input_rms == pytest.approx(float(left.pow(2).mean().sqrt()) / 2, rel=1e-4)
    model = Net(in_place)
    optimizer = torch.optim.Adam(model.parameters())
    plan = rnnguard.plan(model, optimizer, inputs=given, memory=15)
    assert rnnguard.stabilize(model, optimizer, inputs=given, memory=15).plan == plan
    assert torch.equal(x, left) and len(plan) > 2


class Twice(nn.Module):
    """One net under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.two = Net(rnn=nn.LSTM(5, 16, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.one(x) + self.two(x.flip(1))
        return logits


@pytest.mark.parametrize("skip", [["one.rnn"], ["two.rnn"], ["one"], ["two"], "two.rnn"])
def test_what_is_to_be_left_alone_is_left_under_every_name(skip: Any) -> None:
    model = Twice()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())
    report = rnnguard.stabilize(model, optimizer, inputs=X, memory=15, skip=skip)
    assert {change.path for change in report.changes} == {None}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rnnguard.audit(model, inputs=X, memory=15, skip=skip).sites == ()


@pytest.mark.parametrize("taken", [None, nn.Identity(), "a note"])
def test_a_name_that_the_user_has_taken_costs_one_remedy_only(taken: Any) -> None:
    model = Net(rnn=nn.LSTM(5, 16, batch_first=True))
    model.rnn.output_norm = taken
    optimizer = torch.optim.Adam(model.parameters())
    report = rnnguard.stabilize(model, optimizer, inputs=1e-3 * X, memory=15)
    assert [(r.code, r.path) for r in report.refusals] == [("RG910", "rnn")]
    assert "output_norm" in str(report.refusals[0])
    assert "chrono_bias" in {change.remedy for change in report.changes}
    assert type(model.rnn) is nn.LSTM and model.rnn.output_norm is taken
