"""The built-in scenarios on real models: each situation finds its row, whatever the draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import rnnguard
from rnnguard.decision.conditions import vocabulary_values
from rnnguard.decision.diagnosis import diagnose
from rnnguard.decision.domains import IMPOSSIBLE, TAKEN
from rnnguard.decision.planning import SITE_SCOPES, matching
from rnnguard.decision.rulebook import load_rulebook
from rnnguard.measurements import Measurement

BOOK = load_rulebook()
SEEDS = 20
IN, HIDDEN, BATCH = 5, 24, 8
# The situations that the literature names, by the rows that answer them.
NAMED = set(
    """
tanh-short-ok tanh-fading-mid tanh-long tanh-exploding relu-exploding relu-dead lstm-short
lstm-fading-short lstm-fading-chrono lstm-very-long lstm-expansive mixed-lags gru-fading projected
saturated-gates spikes-only nonfinite-fp32 nonfinite-fp16 fading-fp16-only adam-early
trained-weights bidirectional truncated-window hand-written-loop deep-stack layernorm-silent
slow-language-model overfit-healthy bypass-present edge-spiky-long sgd-unclipped clip-always-on
short-gated-no-gain
""".split()  # noqa: SIM905
)


class Reader(nn.Module):
    """A recurrence and a head on its last step, with a norm before it where asked for."""

    def __init__(self, rnn: nn.RNNBase, norm: bool = False) -> None:
        super().__init__()
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.rnn, self.head = rnn, nn.Linear(width, 4)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.head(self.norm(self.rnn(x)[0])[:, -1])
        return read


class Tagger(Reader):
    """A head on every step."""

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.head(self.rnn(x)[0])
        return read


class Around(Reader):
    """The head sees the mean of the states, and the input of every step beside the recurrence."""

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.head(self.rnn(x)[0][:, -1] + x.mean(1).sum(1, keepdim=True))
        return read


class Written(nn.Module):
    """A plain recurrence spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), HIDDEN)
        for step in range(x.shape[1]):
            h = torch.tanh(self.enter(x[:, step]) + self.again(h))
        read: Tensor = self.head(h)
        return read


def of(kind: type[nn.LSTM | nn.GRU | nn.RNN], hidden: int = HIDDEN, **options: Any) -> nn.RNNBase:
    return kind(IN, hidden, batch_first=True, **options)


def relu(**options: Any) -> nn.RNNBase:
    return of(nn.RNN, nonlinearity="relu", **options)


@torch.no_grad()
def written(rnn: nn.RNNBase, name: str, value: float | Callable[[Tensor], Any]) -> nn.RNNBase:
    """The recurrence with all its parameters of this name filled, or changed in place."""
    for key, parameter in rnn.named_parameters():
        if key.startswith(name):
            value(parameter) if callable(value) else parameter.fill_(value)
    return rnn


def gained(rnn: nn.RNNBase, gain: float) -> nn.RNNBase:
    return written(rnn, "weight_hh", lambda w: w.normal_(0, gain / w.shape[1] ** 0.5))


def forgetting(rnn: nn.RNNBase, bias: float) -> nn.RNNBase:
    """The forget bias stands in both vectors, so that it counts twice."""
    return written(rnn, "bias_", lambda b: b[HIDDEN : 2 * HIDDEN].fill_(bias))


def noise(steps: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(BATCH, steps, IN)


def silent_start(steps: int) -> Tensor:
    return torch.cat([torch.zeros(BATCH, steps // 2, IN), noise(steps - steps // 2)], dim=1)


def spiky(steps: int) -> list[tuple[Tensor, Tensor]]:
    return [(noise(steps), (100.0 if at == 2 else 1.0) * torch.randn(BATCH, 4)) for at in range(4)]


def infinite(steps: int) -> list[tuple[Tensor, Tensor]]:
    return [(noise(steps), torch.full((BATCH, 4), float("inf") if at else 1.0)) for at in range(2)]


def summed(steps: int) -> list[tuple[Tensor, Tensor]]:
    """What is to be said rests on every step, on the late ones more."""
    drawn = [torch.randn(256, steps, 1) for _ in range(4)]
    weights = torch.linspace(0.4, 1, steps)[:, None]
    return [(x, ((weights * x).sum((1, 2)) > 0).long()) for x in drawn]


def trained(model: nn.Module) -> Optimizer:
    optimizer = Adam(model.parameters())
    model(noise(5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters())


Rows = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A model, its data, and by the memory needed the rows that must be chosen in each scope.

    The audit is made at the first of the memories; the others are put in its place.
    """

    model: Callable[[], nn.Module]
    rows: dict[int, Rows]
    data: Callable[[], Any] = lambda: noise(40)
    optimizer: Callable[[nn.Module], Optimizer] = adam
    declared: bool = True

    def measured(self, seed: int) -> Measurement:
        torch.manual_seed(seed)
        model, given = self.model(), self.data()
        options: dict[str, Any] = {"memory": next(iter(self.rows)) if self.declared else None}
        if isinstance(given, Tensor):
            options["inputs"] = given
        else:
            classes = given[0][1].dtype == torch.long
            loss = nn.CrossEntropyLoss() if classes else nn.MSELoss()
            options |= {"data": given, "loss": loss}
        return rnnguard.audit(model, self.optimizer(model), **options).before


def needing(measurement: Measurement, memory: int) -> Measurement:
    """The measurement for a task that needs this many steps."""
    (site,) = measurement.sites
    reached = site.retention[min(memory, len(site.retention) - 1)]
    update = {"memory_needed": memory, "retention_at_memory": reached}
    return diagnose(measurement.model_copy(update={"sites": (site.model_copy(update=update),)}))


def chosen(measurement: Measurement) -> Rows:
    """The row of each scope that has one, at the only site and in the run."""
    (site,), run = measurement.sites, measurement.run
    rows = {scope: matching(BOOK, scope, site, run) for scope in SITE_SCOPES}
    rows["run"] = matching(BOOK, "run", None, run)
    return {scope: row.id for scope, row in rows.items() if row is not None}


def recurrence(row: str, **others: str) -> Rows:
    return {"recurrence": row, "run": "unclipped"} | others


CASES: dict[str, Case] = {
    "tanh": Case(
        lambda: Reader(of(nn.RNN)),
        {
            105: recurrence("tanh-long"),
            40: recurrence("tanh-fading-mid"),
            15: recurrence("tanh-short-ok"),
        },
        lambda: noise(105),
    ),
    "tanh of great gain": Case(
        lambda: Reader(gained(of(nn.RNN, 64), 4)),
        {40: recurrence("tanh-exploding", structure="plain-still-exploding")},
        lambda: noise(40, 0.1),
    ),
    "ReLU of great gain": Case(
        lambda: Reader(gained(relu(), 3)),
        {
            40: recurrence(
                "relu-exploding", structure="plain-still-exploding", output="loud-output"
            )
        },
    ),
    "ReLU that is off": Case(
        lambda: Reader(written(relu(), "bias_ih", -3.0)),
        {10: recurrence("relu-dead", output="faint-output")},
    ),
    "LSTM": Case(
        lambda: Reader(of(nn.LSTM)),
        {
            40: recurrence("lstm-fading-chrono"),
            25: recurrence("lstm-fading-short"),
            10: recurrence("lstm-short"),
            90: recurrence("truncated-window"),
            2: recurrence("healthy"),
        },
    ),
    "LSTM with a doubled bias": Case(
        lambda: Reader(gained(forgetting(of(nn.LSTM), 2.0), 4)),
        {40: recurrence("lstm-expansive", structure="gated-still-exploding")},
    ),
    "LSTM on all lags": Case(
        lambda: Reader(nn.LSTM(1, HIDDEN, batch_first=True)),
        {40: recurrence("mixed-lags")},
        lambda: summed(40),
        declared=False,
    ),
    "LSTM with a projection": Case(
        lambda: Reader(of(nn.LSTM, proj_size=12)), {40: recurrence("projected")}
    ),
    "LSTM with gates wide open": Case(
        lambda: Reader(written(of(nn.LSTM), "bias_ih", 8.0)),
        {40: recurrence("healthy", input="saturated-gates")},
    ),
    "LSTM, trained": Case(
        lambda: Reader(of(nn.LSTM)),
        {40: recurrence("trained-weights", structure="trained-structure")},
        optimizer=trained,
    ),
    "LSTM in two directions": Case(
        lambda: Reader(of(nn.LSTM, bidirectional=True)),
        {40: recurrence("lstm-fading-chrono", output="bidirectional")},
    ),
    "GRU under SGD": Case(
        lambda: Reader(of(nn.GRU)),
        {
            40: recurrence("gru-fading", run="sgd-unclipped"),
            10: recurrence("short-gated-no-gain", run="sgd-unclipped"),
        },
        optimizer=sgd,
    ),
    "GRU, every step read": Case(
        lambda: Tagger(of(nn.GRU)), {40: recurrence("every-step-read")}
    ),
    "GRU without bias behind silence": Case(
        lambda: Reader(of(nn.GRU, bias=False), norm=True),
        {
            40: recurrence(
                "gated-without-bias",
                structure="gates-without-bias-still-fading",
                output="layernorm-silent",
            )
        },
        lambda: silent_start(40),
    ),
    "GRU with a path around": Case(
        lambda: Around(of(nn.GRU)), {40: recurrence("gru-fading", structure="bypass-present")}
    ),
    "hand-written": Case(
        Written, {40: recurrence("written-plain"), 15: recurrence("hand-written-loop")}
    ),
    "spikes": Case(
        lambda: Reader(of(nn.LSTM)), {2: recurrence("healthy", run="spikes-only")},
        lambda: spiky(20), sgd,
    ),
    "not finite": Case(
        lambda: Reader(of(nn.LSTM)),
        {2: recurrence("sound-but-unstable", run="nonfinite-fp32")},
        lambda: infinite(20),
    ),
}  # fmt: skip


def test_each_named_situation_has_its_row() -> None:
    assert NAMED - {row.id for row in BOOK.scenarios} == set()
    assert len(NAMED) == 33


# torch itself says that its kernel for projections is the slower one.
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", CASES)
def test_the_rows_are_the_same_for_every_draw(name: str) -> None:
    case = CASES[name]
    for seed in range(SEEDS):
        measurement = case.measured(seed)
        found = {memory: chosen(needing(measurement, memory)) for memory in case.rows}
        assert found == case.rows, f"seed {seed}"
        (site,) = measurement.sites
        values = vocabulary_values(site, measurement.run)
        assert [fact for fact in IMPOSSIBLE if _all_hold(fact, values)] == []


def _all_hold(fact: dict[str, Any], values: dict[str, Any]) -> bool:
    """Whether a measurement has all that is said never to come together."""
    return all(
        (values[name] is None) == (states != TAKEN)
        if isinstance(states, str)
        else values[name] is not None and states.holds(values[name])
        for name, states in fact.items()
    )
