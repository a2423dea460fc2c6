"""A trial runs real steps, reads what they show, and leaves no trace of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import pytest
import torch
from factories import subject
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

from rnnguard.errors import RefusedError
from rnnguard.probe.snapshot import fingerprint
from rnnguard.probe.trial import run_trial
from rnnguard.probe.trial_readings import Trial
from rnnguard.rewrite.stepguard import GuardSettings, StepGuard

Data = list[tuple[Tensor, Tensor]]
CROSS_ENTROPY = nn.CrossEntropyLoss()


class Classifier(nn.Module):
    """A fused recurrence and a head on its last output."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, hidden: int = 16, **options: Any) -> None:
        super().__init__()
        self.rnn: nn.Module = kind(3, hidden, batch_first=True, **options)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def signs(batches: int = 4, size: int = 16, steps: int = 10) -> Data:
    """Whether the last input is positive: within reach of any recurrence."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(size, steps, 3, generator=generator) for _ in range(batches)]
    return [(x, (x[:, -1, 0] > 0).long()) for x in inputs]


def tried(
    model: nn.Module,
    optimizer: Optimizer | None,
    steps: int = 8,
    *,
    data: Any = None,
    loss: Any = CROSS_ENTROPY,
    step: Any = None,
    **options: Any,
) -> Trial:
    """The trial of a model, checked to leave no trace."""
    batches = signs() if data is None else data
    given = {"step": step} if step is not None else {"loss": loss}
    tried_on = subject(model, batches, optimizer, **given)
    held = (options.get("scaler"), options.get("scheduler"), tried_on.batches)
    before = fingerprint(model, optimizer, *held)
    trial = run_trial(tried_on, steps, **options)
    assert fingerprint(model, optimizer, *held) == before
    return trial


# What a trial shows.


def test_a_healthy_lstm_improves_without_spikes() -> None:
    model = Classifier()
    trial = tried(model, Adam(model.parameters(), 1e-2), 50)
    assert (trial.steps, trial.planned, trial.stopped) == (50, 50, None)
    assert trial.improved is True and trial.loss_change is not None and trial.loss_change < -0.1
    assert trial.spikes == trial.skipped == trial.nonfinite_steps == ()
    assert trial.first_nonfinite is None and not any(trial.calibrating)
    assert all(trial.applied) and not any(trial.clipped) and trial.clip is None
    assert set(trial.update_ratios) == {name for name, _ in model.named_parameters()}
    assert trial.recurrent_update_ratio == trial.update_ratios["rnn.weight_hh_l0"]
    assert -3 < trial.recurrent_update_ratio < -1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_a_rate_a_hundred_times_too_large_diverges(kind: type[nn.RNNBase]) -> None:
    model = Classifier(kind)
    trial = tried(model, SGD(model.parameters(), lr=100.0), 50)
    assert trial.improved is not True
    assert trial.loss_above_start is not None and trial.loss_above_start > 1
    calm = tried(model, SGD(model.parameters(), lr=1.0), 50)
    assert calm.improved is True
    assert calm.loss_above_start is not None and calm.loss_above_start < -0.1


@pytest.mark.parametrize(("gain", "spikes"), [(3.0, (0,)), (1.0, ())])
def test_a_gain_of_three_spikes(gain: float, spikes: tuple[int, ...]) -> None:
    model = Classifier(nn.RNN, 32)
    nn.init.normal_(model.rnn.weight_hh_l0, std=gain / 32**0.5)
    trial = tried(model, SGD(model.parameters(), lr=1e-3), 30, data=signs(steps=60))
    # One step along the exploding gradient saturates every unit, and all is calm.
    assert trial.spikes == spikes
    assert (max(trial.norms) > 1e4) is (gain > 1)


def test_the_series_are_those_of_plain_training() -> None:
    model = Classifier().double()
    data = [(x.double(), y) for x, y in signs()]
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    trial = tried(model, optimizer, 6, data=data)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = data[0]
    CROSS_ENTROPY(model(x), y).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()  # type: ignore[union-attr]
    assert trial.norms[0] == pytest.approx(float(norm), rel=1e-12)
    optimizer.zero_grad()
    ratios: dict[str, list[float]] = {name: [] for name in before}
    losses = []
    for index in range(6):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x, y = data[index % 4]
        optimizer.zero_grad()
        loss = CROSS_ENTROPY(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        for name, p in model.named_parameters():
            ratios[name].append(float((p.detach() - before[name]).norm() / before[name].norm()))
    assert list(trial.losses) == losses
    expected = {name: math.log10(numpy.median(values)) for name, values in ratios.items()}
    assert trial.update_ratios == pytest.approx(expected, abs=1e-10)


# Every optimizer, every schedule: no trace, and training afterwards is the same to the bit.

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: Adam(p, 1e-2),
    "adamw": lambda p: AdamW(p, 1e-2, amsgrad=True),
    "fused": lambda p: Adam(p, 1e-2, fused=True),
    "tensor rate": lambda p: Adam(p, torch.tensor(1e-2)),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=4),
}


def trained(model: nn.Module, optimizer: Optimizer, steps: int = 4) -> list[float]:
    """Losses of plain training, dropout and all, from the random state as it stands."""
    losses = []
    for x, y in signs()[:steps]:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = CROSS_ENTROPY(model(x), y)
            loss.backward()
            losses.append(float(loss.detach()))
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return losses


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_on_as_if_nothing_had_been(name: str, warm: bool) -> None:
    runs = []
    for with_trial in (False, True):
        torch.manual_seed(0)
        model = Classifier(num_layers=2, dropout=0.5)
        optimizer = OPTIMIZERS[name](model.parameters())
        if warm:
            trained(model, optimizer, 2)
        known = len(optimizer.state)
        if with_trial:
            trial = tried(model, optimizer, 5)
            assert all(trial.applied) and trial.stopped is None and trial.norms[0] > 0
            assert len(optimizer.state) == known
        runs.append(trained(model, optimizer))
    assert runs[0] == runs[1]


def test_sparse_embeddings() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 3, sparse=True), "rnn": Classifier(nn.GRU)})

    def step(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return CROSS_ENTROPY(model["rnn"](model["embed"](batch[0])), batch[1])  # type: ignore[no-any-return]

    data = [(torch.randint(9, (6, 7)), torch.randint(2, (6,))) for _ in range(3)]
    trial = tried(model, torch.optim.SparseAdam(model["embed"].parameters()), data=data, step=step)
    assert list(trial.update_ratios) == ["embed.weight"]
    assert all(trial.applied) and all(norm > 0 for norm in trial.norms)
    assert trial.recurrent_update_ratio is None


def test_an_optimizer_over_a_part_of_the_parameters() -> None:
    model = Classifier()
    trial = tried(model, SGD(model.head.parameters(), lr=0.1))
    assert set(trial.update_ratios) == {"head.weight", "head.bias"}
    assert trial.recurrent_update_ratio is None


def test_what_never_moves_has_the_smallest_ratio() -> None:
    model = Classifier()
    model.head.weight.register_hook(lambda gradient: gradient * 0)
    trial = tried(model, SGD(model.parameters(), lr=0.1))
    assert trial.update_ratios["head.weight"] == -300.0


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda n: 0.9**n),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "chain": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.5), schedules.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_steps_and_is_given_back(name: str) -> None:
    model = Classifier()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = SCHEDULES[name](optimizer)
    at_rest, rates = scheduler.state_dict(), []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    tried(model, optimizer, 6, data=signs(1), scheduler=scheduler)
    assert scheduler.state_dict() == at_rest
    # What the hook has kept in its closure is given back as well.
    assert rates == []


def test_the_schedule_is_followed() -> None:
    model = Classifier()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = schedules.LambdaLR(optimizer, lambda n: 0.1**n)
    trial = tried(model, optimizer, 3, data=signs(1), scheduler=scheduler)
    plain = tried(model, optimizer, 3, data=signs(1))
    assert trial.losses[:2] == plain.losses[:2]
    assert trial.losses[2] != plain.losses[2]


def test_a_schedule_that_ends_stops_the_trial() -> None:
    model = Classifier()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = schedules.OneCycleLR(optimizer, 0.1, total_steps=3)
    trial = tried(model, optimizer, 9, scheduler=scheduler)
    assert trial.stopped is not None
    assert (trial.stopped.step, trial.stopped.stage) == (3, "scheduler")
    assert "ValueError: Tried to step 4 times" in str(trial.stopped)


# Clips and guards.


def test_the_guard_runs_as_in_training() -> None:
    model = Classifier()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = StepGuard(GuardSettings(max_norm=0.05, warmup=4))
    guard.install(optimizer)
    trial = tried(model, optimizer, 8)
    assert trial.clip == pytest.approx(0.05, rel=1e-3)
    assert trial.clipped == tuple(norm > 0.05 for norm in trial.norms)
    assert trial.clip_fraction > 0.5
    seen = guard.engagement()
    assert (seen.steps, seen.clipped, seen.last_norm) == (0, 0, None)
    # The first of four warm-up steps, along a gradient of norm 0.05.
    first = tried(model, optimizer, 1).update_ratios
    moved = [10 ** first[name] * float(p.detach().norm()) for name, p in model.named_parameters()]
    assert math.hypot(*moved) == pytest.approx(0.1 / 4 * 0.05, rel=1e-3)


def test_a_clip_of_the_users_own_is_seen() -> None:
    model = Classifier()
    optimizer = SGD(model.parameters(), lr=0.1)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    optimizer.register_step_pre_hook(clip)
    trial = tried(model, optimizer)
    assert all(trial.clipped) and trial.clip == pytest.approx(0.01, rel=1e-3)


def test_a_guarded_nonfinite_step_moves_nothing() -> None:
    model = Classifier()
    optimizer = Adam(model.parameters())
    guard = StepGuard(GuardSettings(max_norm=1.0, on_nonfinite="skip"))
    guard.install(optimizer)
    data = signs(3)
    data[1][0][2, 4, 1] = math.nan
    trial = tried(model, optimizer, 6, data=data)
    assert trial.skipped == trial.nonfinite_steps == (1, 4)
    assert (guard.engagement().skipped, guard.engagement().nonfinite) == (0, 0)


# Values that are not finite.


def test_a_nan_in_one_batch_is_named() -> None:
    model = Classifier()
    data = signs(3)
    data[2][0][5, 4, 1] = math.nan
    trial = tried(model, Adam(model.parameters()), 6, data=data)
    place = trial.first_nonfinite
    assert place is not None
    assert (place.step, place.batch, place.phase, place.path) == (2, 2, "input", "input 0")
    assert trial.nonfinite_steps == (2, 3, 4, 5)
    assert trial.improved is False


def test_a_nan_in_a_target_is_named() -> None:
    model = Classifier()
    data = [(x, torch.zeros(len(x), 2)) for x, _ in signs(2)]
    data[1][1][3, 0] = math.nan
    place = tried(model, Adam(model.parameters()), 3, data=data, loss=nn.MSELoss()).first_nonfinite
    assert str(place) == "step 1, batch 1: the input `target`"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_overflow_in_low_precision_is_named_with_its_time(dtype: torch.dtype) -> None:
    model = Classifier(nn.RNN, nonlinearity="relu", bias=False)
    with torch.no_grad():
        model.rnn.weight_ih_l0.fill_(0.5)
        model.rnn.weight_hh_l0.copy_(4 * torch.eye(16))
    model.to(dtype)
    data = [(torch.ones(4, 100, 3, dtype=dtype), torch.ones(4, dtype=torch.long))]
    trial = tried(model, SGD(model.parameters(), lr=1e-3), 2, data=data)
    place = trial.first_nonfinite
    assert place is not None
    assert (place.step, place.phase, place.path, place.operation) == (
        0,
        "forward",
        "rnn",
        "rnn_relu",
    )
    # The state is 1.5 (4^(t+1) - 1) / 3 at step t.
    over = next(t for t in range(100) if 0.5 * (4.0 ** (t + 1) - 1) > torch.finfo(dtype).max)
    assert place.time == over
    assert place.location is not None and "test_trial.py" in place.location


class Rooted(Classifier):
    """Adds the square root of a length that is 0."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)[0][:, -1]
        return self.head(out) + (out * 0).pow(2).sum(-1, keepdim=True).sqrt()


def test_a_nan_in_the_gradient_alone() -> None:
    model = Rooted(nn.GRU)
    trial = tried(model, Adam(model.parameters()), 3)
    place = trial.first_nonfinite
    assert place is not None
    assert (place.step, place.phase, place.operation) == (0, "backward", "sqrt")
    assert place.parameter is not None and place.parameter.startswith("rnn.")
    assert math.isfinite(trial.losses[0]) and math.isnan(trial.norms[0])


def test_a_loss_of_torchs_own_that_overflows() -> None:
    model = Classifier()
    nn.init.constant_(model.head.bias, 1e30)
    data = [(x, torch.zeros(len(x), 2)) for x, _ in signs(1)]
    place = tried(
        model, SGD(model.parameters(), lr=0.1), 1, data=data, loss=nn.MSELoss()
    ).first_nonfinite
    assert str(place) == "step 0, batch 0: forward `loss` at mse_loss"


def test_a_parameter_that_the_optimizer_ruins() -> None:
    model = Classifier()
    trial = tried(model, SGD(model.parameters(), lr=1e38), 3, loss=lambda o, t: 100 * o.mean())
    place = trial.first_nonfinite
    assert place is not None and (place.step, place.phase) == (0, "parameter")
    assert place.path in dict(model.named_parameters())


class Carrying(nn.Module):
    """Keeps a state that grows from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.state = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        before = self.state + torch.rand(1)
        self.state = before * 1e15
        return self.lin(x[:, -1]) * self.state  # type: ignore[no-any-return]


@pytest.mark.parametrize("where", ["model", "step"])
def test_the_replay_sees_the_state_that_failed(where: str) -> None:
    model, state = Carrying(), torch.ones(1)

    def step(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal state
        before = state + torch.rand(1)
        state = before * 1e15
        return (model.lin(batch[0][:, -1]) * state).mean()  # type: ignore[no-any-return]

    options = {"step": step} if where == "step" else {"loss": lambda o, _: o.mean()}
    place = tried(model, SGD(model.parameters(), lr=0.0), 4, **options).first_nonfinite
    assert place is not None
    # From the state after the failing step, the sum would be the first to see it.
    assert (place.step, place.phase, place.operation) == (2, "forward", "mul")


# Loss scaling.


def under_autocast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of mixed precision: half within the model, single in the loss."""
    with torch.autocast("cpu", torch.float16):
        output = model(batch[0])
    return CROSS_ENTROPY(output.float(), batch[1])


def test_calibration_is_no_explosion() -> None:
    model = Classifier(nn.GRU)
    optimizer = SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
    trial = tried(model, optimizer, 40, step=under_autocast, scaler=scaler)
    assert trial.calibration_steps[:2] == (0, 1)
    assert trial.calibration_steps == trial.skipped and len(trial.skipped) < 30
    # Between them the scale was grown too far again.
    assert trial.calibration_steps != tuple(range(len(trial.skipped)))
    assert trial.nonfinite_steps == trial.spikes == () and trial.first_nonfinite is None
    first = trial.applied.index(True)
    plain = tried(model, optimizer, first + 1, step=under_autocast)
    assert trial.losses[first] == pytest.approx(plain.losses[first], rel=0.1)
    data = signs()
    CROSS_ENTROPY(model(data[first % 4][0]), data[first % 4][1]).backward()
    norm = math.hypot(*(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))
    assert trial.norms[first] == pytest.approx(norm, rel=0.02)  # without the scale
    assert scaler.get_scale() == 2.0**30 and scaler._scale is None


def test_the_scheduler_waits_while_the_scaler_calibrates() -> None:
    model = Classifier(nn.GRU)
    optimizer = SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    def factor(step: int) -> float:
        _seen.append(step)
        return 1.0

    scheduler = schedules.LambdaLR(optimizer, factor)
    _seen.clear()
    options = {"step": under_autocast, "scaler": scaler, "scheduler": scheduler}
    trial = tried(model, optimizer, 14, **options)
    assert trial.skipped and trial.stopped is None
    assert _seen == list(range(1, sum(trial.applied) + 1))


def test_a_scaler_in_use_is_given_back() -> None:
    model = Classifier()
    optimizer = Adam(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)
    for x, y in signs(2):
        optimizer.zero_grad()
        scaler.scale(CROSS_ENTROPY(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    at_rest = scaler.state_dict()
    assert at_rest["_growth_tracker"] == 2
    scheduler = schedules.LambdaLR(optimizer, lambda n: 0.9**n)
    trial = tried(model, optimizer, 12, scaler=scaler, scheduler=scheduler)
    assert all(trial.applied) and scaler.state_dict() == at_rest


@pytest.mark.parametrize("fused", [False, True])
def test_a_clip_under_a_scaler(fused: bool) -> None:
    model = Classifier()
    optimizer = Adam(model.parameters(), 1e-3, fused=fused)
    StepGuard(GuardSettings(max_norm=0.05)).install(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trial = tried(model, optimizer, scaler=scaler)
    plain = tried(model, optimizer)
    assert trial.norms == pytest.approx(plain.norms, rel=1e-3)
    assert trial.cut_to == pytest.approx(plain.cut_to, rel=1e-3)
    assert trial.clip == pytest.approx(0.05, rel=1e-3)


def test_a_real_nan_under_a_scaler_is_not_calibration() -> None:
    model = Rooted(nn.GRU)
    scaler = torch.amp.GradScaler("cpu")
    trial = tried(model, Adam(model.parameters()), 3, scaler=scaler)
    assert trial.calibration_steps == () and trial.nonfinite_steps == (0, 1, 2)
    assert trial.first_nonfinite is not None and trial.first_nonfinite.operation == "sqrt"


# What models, losses and steps hold.


def test_a_step_function_with_state_in_its_closure() -> None:
    model = nn.GRU(3, 8, batch_first=True)
    state, calls = None, 0

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal state, calls
        out, state = model(batch[0], state)
        state = state.detach()
        calls += 1
        return out.square().mean()  # type: ignore[no-any-return]

    trial = tried(model, SGD(model.parameters(), lr=0.1), step=step)
    assert trial.steps == 8 and (state, calls) == (None, 0)


class Stateful(Classifier):
    """Keeps its state with the graph."""

    state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out, self.state = self.rnn(x, self.state)
        return self.head(out[:, -1])  # type: ignore[no-any-return]


def test_a_missing_detach_stops_the_trial_with_torchs_words() -> None:
    model = Stateful(nn.GRU)
    trial = tried(model, SGD(model.parameters(), lr=0.1))
    assert trial.stopped is not None
    assert (trial.stopped.step, trial.stopped.stage) == (1, "backward")
    assert "backward through the graph a second time" in trial.stopped.words
    assert trial.steps == 1 and model.state is None


class Restless(Classifier):
    """Changes buffers, counters, its input, its mode and every random state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.history: list[float] = []
        self.draws = numpy.random.default_rng(0)
        self.own = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        self.history.append(random.random() + self.own.random() + self.draws.random())
        x.mul_(1.5)
        numpy.random.rand()
        return self.norm(super().forward(x)) + torch.rand(1) + self.history[-1]


def test_buffers_counters_inputs_and_random_states() -> None:
    model, data = Restless(), signs(1)
    x = data[0][0].clone()
    optimizer = SGD(model.parameters(), lr=0.0)
    trial = tried(model, optimizer, 5, data=data)
    assert torch.equal(data[0][0], x) and model.history == []
    assert int(model.norm.num_batches_tracked) == 0
    assert len(set(trial.norms)) == 5  # the random states went on from step to step


class Telling(Classifier):
    """Tells the world outside what it was given, and then writes into it."""

    def forward(self, x: Tensor) -> Tensor:
        _seen.append(float(x.sum()))
        return super().forward(x.mul_(1.5))


def test_every_step_sees_its_batch_as_it_was_given() -> None:
    model, data = Telling(), signs(2)
    _seen.clear()
    tried(model, SGD(model.parameters(), lr=0.1), 5, data=data)
    before_any_step = [0, 1] * 2
    steps = [step % 2 for step in range(5)]
    assert _seen == [float(data[batch][0].sum()) for batch in (*before_any_step, *steps)]


def test_a_restless_model_trains_on_as_if_nothing_had_been() -> None:
    runs = []
    for with_trial in (False, True):
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
        model = Restless()
        optimizer = Adam(model.parameters())
        if with_trial:
            assert tried(model, optimizer, 5).stopped is None
        runs.append((trained(model, optimizer), model.norm.running_mean.tolist()))
    assert runs[0] == runs[1]


def test_the_same_trial_twice() -> None:
    model = Classifier(num_layers=2, dropout=0.5)
    optimizer = Adam(model.parameters())
    first = tried(model, optimizer)
    torch.rand(1)
    second = tried(model, optimizer)
    assert first.losses == second.losses and first.norms == second.norms
    assert len(set(first.losses)) == 8


@pytest.mark.parametrize(("dropout", "noisy"), [(0.5, True), (0.0, False)])
def test_the_noise_of_a_loss(dropout: float, noisy: bool) -> None:
    model = Classifier(num_layers=2, dropout=dropout)
    trial = tried(model, SGD(model.parameters(), lr=1e-6))
    assert (trial.noise > 0) is noisy
    assert trial.starts and trial.loss_rise is not None and abs(trial.loss_rise) < 1e-3


def test_gradients_are_the_same_objects_with_the_same_bits() -> None:
    model = Classifier()
    CROSS_ENTROPY(model(signs()[0][0]), signs()[0][1]).backward()
    held = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    frozen = model.head.weight.requires_grad_(False)
    tried(model, SGD(model.rnn.parameters(), lr=0.1))
    now = [p.grad for p in model.parameters()]
    assert len(held) == len(now) and not frozen.requires_grad
    assert all(
        g is grad and torch.equal(g, bits) for g, (grad, bits) in zip(now, held, strict=True)
    )


class Counter:
    """A user's own hook that counts."""

    def __init__(self) -> None:
        self.steps = 0

    def count(self, *_: Any) -> None:
        self.steps += 1


def test_hooks_run_and_their_own_state_is_given_back() -> None:
    model, counter = Classifier(), Counter()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen: list[int] = []
    _seen.clear()
    optimizer.register_step_post_hook(counter.count)
    optimizer.register_step_post_hook(lambda *_: seen.append(counter.steps))
    optimizer.register_step_post_hook(_hear)
    tried(model, optimizer, 3)
    assert (counter.steps, seen) == (0, [])
    assert _seen == [1, 1, 1]  # a global variable is not given back


_seen: list[float] = []


def _hear(*_: Any) -> None:
    _seen.append(1)


def test_a_loader_keeps_its_order() -> None:
    def loader() -> DataLoader[Any]:
        x, y = (torch.cat(parts) for parts in zip(*signs(), strict=True))
        generator = torch.Generator().manual_seed(3)
        return DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=generator)

    model, data, other = Classifier(), loader(), loader()
    once, again = list(data), list(other)
    tried(model, SGD(model.parameters(), lr=0.1), data=once)

    def step(model: nn.Module, batch: Any, source: Any = data) -> Tensor:
        x, y = next(iter(source))
        return CROSS_ENTROPY(model(x), y)  # type: ignore[no-any-return]

    tried(model, SGD(model.parameters(), lr=0.1), data=once, step=step)
    for (x, y), (u, v) in zip([*once, *data], [*again, *other], strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


# Ends.


class Failing(Classifier):
    """Raises in its fourth forward."""

    calls = 0
    error: type[BaseException] = ValueError

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 4:
            raise self.error("half-way\nand more")
        return super().forward(x)


def test_an_error_ends_the_trial_and_is_told() -> None:
    model = Failing()
    trial = tried(model, Adam(model.parameters()))
    assert str(trial.stopped) == "step 3: forward raised ValueError: half-way"
    assert (trial.steps, trial.planned) == (3, 8)


def test_a_guarded_step_that_raises_leaves_no_scaled_rate() -> None:
    model = Classifier()
    optimizer = SGD(model.parameters(), lr=0.1)
    StepGuard(GuardSettings(max_norm=0.05, warmup=100)).install(optimizer)

    def fail(*_: Any) -> None:
        assert optimizer.param_groups[0]["lr"] < 0.0025, "no more"

    optimizer.register_step_pre_hook(fail)
    trial = tried(model, optimizer)
    assert str(trial.stopped) == "step 2: step raised AssertionError: no more"
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_interrupt_passes_and_all_is_given_back() -> None:
    model = Failing()
    model.error = KeyboardInterrupt
    optimizer = Adam(model.parameters())
    before = fingerprint(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        run_trial(subject(model, signs(), optimizer, loss=CROSS_ENTROPY), 8)
    assert fingerprint(model, optimizer) == before


def test_the_time_is_kept() -> None:
    model = Classifier()
    trial = tried(model, Adam(model.parameters()), 10**6, seconds=0.2)
    assert trial.stopped is not None and trial.stopped.stage == "time"
    assert 1 <= trial.steps < 10**6 and trial.seconds < 2
    assert f"after {trial.steps} of 1000000 steps" in str(trial.stopped)
    model.register_forward_hook(lambda *_: time.sleep(0.2))
    assert tried(model, Adam(model.parameters()), 9, seconds=0.5).steps <= 2
    none = tried(model, Adam(model.parameters()), 5, seconds=0.0)
    assert (none.steps, none.update_ratios, none.recurrent_update_ratio) == (0, {}, None)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_inside_every_grad_mode(around: Callable[[], Any]) -> None:
    model = Classifier()
    optimizer = Adam(model.parameters())
    with around():
        trial = tried(model, optimizer, 4, data=signs())
        assert not torch.is_grad_enabled()
    assert all(trial.applied)


def test_casts_of_a_surrounding_autocast_do_not_outlive_a_step() -> None:
    model = Classifier()
    optimizer = SGD(model.parameters(), lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        trial = tried(model, optimizer, 4, data=signs(1))
    assert len(set(trial.losses)) == 4


def test_refusals_come_all_at_once() -> None:
    model = Classifier()
    with pytest.raises(RefusedError) as none:
        run_trial(subject(model, None, inputs=torch.randn(2, 5, 3)), 0)
    assert str(none.value).splitlines() == [
        "`trial`: there is no optimizer to step. Give the optimizer that trains the model. (RG912)",
        "`trial`: there is no loss to train on. Give data with `loss=`, or `step=`. (RG912)",
        "`trial`: 0 steps show nothing. Give at least 1. (RG912)",
    ]
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(RefusedError, match=r"GradScaler cannot step LBFGS .*\(RG906\)"):
        tried(model, lbfgs, scaler=torch.amp.GradScaler("cpu"))
