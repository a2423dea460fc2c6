"""A range test finds where steps overshoot, proposes less than that, and leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from factories import subject
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rnnguard.errors import RefusedError
from rnnguard.probe.rate_range import BELOW, MOST, OVERSHOT, RateRange, rate_range
from rnnguard.probe.snapshot import fingerprint
from rnnguard.rewrite.stepguard import GuardSettings, StepGuard, guard_of

Data = list[tuple[Tensor, Tensor]]
STEPS = 30


def swept(
    model: nn.Module, optimizer: Optimizer, data: Any, *, loss: Any = None, step: Any = None,
    **options: Any,
) -> RateRange:  # fmt: skip
    """The range test of a model, checked to leave no trace."""
    given = {"step": step} if step is not None else {"loss": loss or nn.CrossEntropyLoss()}
    tested = subject(model, data, optimizer, **given)
    before = fingerprint(model, optimizer, tested.batches)
    found = rate_range(tested, **options)
    assert fingerprint(model, optimizer, tested.batches) == before
    return found


# A parabola, whose edge is known.


class Bowl(nn.Module):
    """Half the sum of curvature times error squared, plus what the batch adds of its own."""

    def __init__(self, *curvatures: float) -> None:
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)
        self.errors = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.curvatures * self.errors**2).sum() / 2 + x.mean()


def value(output: Tensor, target: Tensor) -> Tensor:
    return output


def levels(*values: float) -> Data:
    """Batches that differ by how hard they are."""
    return [(torch.full((2, 1), each, dtype=torch.float64), torch.zeros(2)) for each in values]


@pytest.mark.parametrize("steps", [20, STEPS, 80])
@pytest.mark.parametrize("curvatures", [(4.0,), (4.0, 1.0, 0.1), (0.01, 0.1)])
@pytest.mark.parametrize("factor", [1.0, 5.0, 10.0])
def test_the_edge_of_a_parabola_is_two_over_its_curvature(
    factor: float, curvatures: tuple[float, ...], steps: int
) -> None:
    model = Bowl(*curvatures)
    edge = 2 / max(curvatures)
    found = swept(
        model, SGD(model.parameters(), edge / factor), levels(0.0), loss=value, steps=steps
    )
    assert found.left is not None and found.edge is not None and found.peak is not None
    assert factor / 1.5 < found.edge < factor * 1.5
    assert found.left == pytest.approx(found.edge * OVERSHOT)
    # At the very edge the user's own rate stays.
    expected = min(MOST, found.edge / BELOW) if factor > 1 else 1.0
    assert found.peak == pytest.approx(expected, rel=0.05)


def test_the_sweeps_own_delay_is_where_the_dilogarithm_is_zero() -> None:
    """The logs of |1 - rc| along an exponential sweep up to twice that delay add to nothing."""
    fine = 1e-5
    rates = torch.arange(math.log(1e-8), math.log(2 * OVERSHOT), fine, dtype=torch.float64).exp()
    assert float((1 - rates).abs().log().sum() * fine) == pytest.approx(0, abs=1e-3)


def test_a_hard_batch_is_no_rise() -> None:
    even, uneven = Bowl(4.0), Bowl(4.0)
    rate = 0.5 / 8
    known = swept(even, SGD(even.parameters(), rate), levels(3.0, 3.0, 3.0), loss=value)
    found = swept(uneven, SGD(uneven.parameters(), rate), levels(0.5, 8.0, 0.5), loss=value)
    assert found.losses[1] > found.losses[0] + 7
    assert (found.left, found.peak) == (known.left, known.peak)
    assert found.smoothed == pytest.approx(known.smoothed, abs=1e-9)


# Which factor follows from which losses.


class Script:
    """Losses that are 1 plus these, once the untouched model has been looked at twice."""

    calls: ClassVar[int] = 0  # past what a snapshot gives back

    def __init__(self, *rises: float) -> None:
        Script.calls = -2
        self.rises = rises

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        Script.calls += 1
        rise = self.rises[Script.calls - 1] if Script.calls > 0 else 0.0
        return (next(model.parameters()) * 0).sum() + 1 + rise


def scripted(*rises: float) -> RateRange:
    model = nn.Linear(1, 1)
    data = [(torch.zeros(1, 1), torch.zeros(1))]
    return swept(model, SGD(model.parameters(), 0.1), data, step=Script(*rises), steps=len(rises))


def factor_at(index: int, steps: int = STEPS) -> float:
    return float(0.1 * 1500 ** (index / (steps - 1)))


def padded(*rises: float, before: float = 0.01) -> list[float]:
    return [*[before, -before] * STEPS, *rises][-STEPS:]


def test_a_plateau_is_judged_by_the_edge_alone() -> None:
    found = scripted(*padded(*[0.5] * 5))
    assert found.left is not None
    assert found.left == pytest.approx(factor_at(STEPS - 6))
    assert found.peak == pytest.approx(found.left / OVERSHOT / BELOW, rel=0.05)


def test_the_sweep_ends_as_soon_as_the_loss_has_left() -> None:
    found = scripted(*padded(*[0.5] * 12))
    assert len(found.losses) == STEPS - 9
    assert found.left == pytest.approx(factor_at(STEPS - 13))


def test_spikes_that_pass_are_no_end() -> None:
    found = scripted(*padded(3.0, 9.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0))
    assert found.left is None and len(found.losses) == STEPS
    assert found.peak == MOST and "has not left at 150 times" in found.words


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_sweep(last: float) -> None:
    found = scripted(*padded(last, 0.0, 0.0, 0.0, 0.0))
    assert len(found.losses) == STEPS - 4 and not math.isfinite(found.losses[-1])
    assert found.left == pytest.approx(factor_at(STEPS - 6))
    again = RateRange.model_validate_json(found.model_dump_json())
    assert again.model_dump_json() == found.model_dump_json()


def test_a_sweep_that_does_not_go_far_shows_only_that() -> None:
    model = built(kind=nn.RNN)
    found = swept(model, SGD(model.parameters(), 1e-4), signs(), highest=18.0)
    assert found.peak is None and found.words == "the loss has not left at 18 times the rate"
    further = swept(model, SGD(model.parameters(), 1e-4), signs(), highest=63.0)
    assert further.peak == 5.0


def test_a_loss_that_falls_and_comes_back_has_not_left() -> None:
    assert scripted(*padded(*[-0.9] * 8, *[-0.2] * 8, *[-0.9] * 8)).left is None


def test_a_rate_that_diverges_itself_is_lowered() -> None:
    found = scripted(*[0.0] * 5, *[2.0] * 25)
    assert found.left is not None and found.left < 1
    assert found.peak == pytest.approx(found.left / OVERSHOT / BELOW, rel=0.05)
    assert found.words == f"the loss leaves at {found.left:.3g} times the rate: " + (
        "the rate itself is too large"
    )


def test_a_rate_with_little_room_stays_as_it_is() -> None:
    found = scripted(*[0.0] * 12, *[2.0] * 18)
    assert found.left is not None and 1 < found.left < OVERSHOT
    assert found.peak == 1.0 and "leaves the rate as it is" in str(found)


def test_noise_of_the_loss_itself_is_no_rise() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.9), nn.Linear(64, 1))
    data = [(torch.ones(2, 3), torch.ones(2, 1))] * 4
    found = swept(model, SGD(model.parameters(), 1e-6), data, loss=nn.MSELoss())
    losses = torch.tensor(found.losses)
    assert float(losses.std() / losses.mean()) > 0.2
    assert found.left is None


# Real recurrences, every optimizer, no trace.


class Classifier(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.RNN] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 16, batch_first=True, **options)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def signs(count: int = 4, steps: int = 8) -> Data:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, steps, 3, generator=generator) for _ in range(count)]
    return [(x, (x[:, -1, 0] > 0).long()) for x in inputs]


def built(seed: int = 0, **options: Any) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(**options)


def trained(model: nn.Module, optimizer: Optimizer) -> list[float]:
    losses = []
    for x, y in signs():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: Adam(p, 1e-3),
    "adamw": lambda p: AdamW(p, 1e-3, amsgrad=True),
    "tensor rate": lambda p: Adam(p, torch.tensor(1e-3)),
    "fused": lambda p: Adam(p, 1e-3, fused=True),
    "learned rate": lambda p: SGD(p, lr=torch.tensor(0.1, requires_grad=True)),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_on_as_if_nothing_had_been(name: str, warm: bool) -> None:
    runs, ranges = [], []
    for times in (0, 2):
        model = built(num_layers=2, dropout=0.3)
        optimizer = OPTIMIZERS[name](model.parameters())
        if warm:
            trained(model, optimizer)
        ranges += [swept(model, optimizer, signs(), steps=12) for _ in range(times)]
        runs.append(trained(model, optimizer))
    assert runs[0] == runs[1]
    assert ranges[0] == ranges[1]
    assert ranges[0].losses and ranges[0].peak is not None


class Tiring(Classifier):
    """Answers from call to call more faintly, out of a state that it keeps."""

    strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.strength *= 0.9
        return super().forward(x) * self.strength


def test_the_sweep_begins_from_the_state_in_which_the_model_was() -> None:
    torch.manual_seed(0)
    model = Tiring()
    x, y = signs(1)[0]
    first = float(nn.functional.cross_entropy(Classifier.forward(model, x) * 0.9, y).detach())
    found = swept(model, SGD(model.parameters(), 0.1), signs(1), steps=12)
    assert found.losses[0] == pytest.approx(first, rel=1e-6)


def test_a_rate_a_thousand_times_too_small_may_go_up_and_one_too_large_down() -> None:
    model = built(kind=nn.RNN)
    small = swept(model, SGD(model.parameters(), 1e-4), signs())
    assert small.peak == MOST
    large = swept(model, SGD(model.parameters(), 300.0), signs())
    assert large.peak is not None and large.peak < 0.1 and "too large" in large.words


class Watching(SGD):
    """Notes the rates inside each step where no snapshot reaches."""

    seen: ClassVar[list[list[float]]] = []

    def step(self, closure: Any = None) -> Any:
        Watching.seen.append([float(group["lr"]) for group in self.param_groups])
        return super().step(closure)


def watched(model: Classifier) -> Watching:
    Watching.seen.clear()
    parts = [model.rnn.parameters(), [model.head.weight], [model.head.bias]]
    rates = (0.01, torch.tensor(0.25, dtype=torch.float64), 1)
    return Watching([{"params": p, "lr": lr} for p, lr in zip(parts, rates, strict=True)], 0.1)


GUARDS: list[dict[str, Any] | None] = [
    None,
    {"warmup": 100, "total_steps": 200, "peak": 5.0},
    {"max_norm": 1e9, "on_nonfinite": "skip", "peak": 0.3},
]


@pytest.mark.parametrize("guard", GUARDS)
def test_several_groups_keep_their_ratios_whatever_guards_them(
    guard: dict[str, Any] | None,
) -> None:
    model = built()
    optimizer = watched(model)
    plain = swept(model, optimizer, signs(), steps=12)
    Watching.seen.clear()
    if guard is not None:
        StepGuard(GuardSettings(**guard)).install(optimizer)
    found = swept(model, optimizer, signs(), steps=12)
    assert found == plain
    expected = [[factor * rate for rate in (0.01, 0.25, 1)] for factor in found.factors]
    assert len(Watching.seen) == len(found.losses) > 5
    for seen, known in zip(Watching.seen, expected, strict=True):
        assert seen == pytest.approx(known, rel=1e-12)
    present = guard_of(optimizer)
    assert present is None or present.engagement().steps == 0


def test_the_users_own_schedule_does_not_move() -> None:
    model = built()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, lambda n: 0.9**n)
    at_rest = scheduler.state_dict()
    assert swept(model, optimizer, signs(), steps=12).factors[0] == 0.1
    assert scheduler.state_dict() == at_rest


# What breaks it off.


class Failing:
    """A loss that raises at one of its calls."""

    calls: ClassVar[int] = 0

    def __init__(self, at: int, error: type[BaseException]) -> None:
        Failing.calls = 0
        self.at, self.error = at, error

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        Failing.calls += 1
        if Failing.calls == self.at:
            raise self.error("broken off\nhere")
        return nn.functional.cross_entropy(output, target)


def test_an_error_ends_the_sweep_and_is_told() -> None:
    model = built()
    # Two looks at each of four batches come first.
    loss = Failing(8 + 6, ValueError)
    found = swept(model, Adam(model.parameters()), signs(), loss=loss)
    assert (
        found.words == f"the loss has not left at {factor_at(4):.3g} times the rate; "
        f"at {factor_at(5):.3g} times the rate a step raised ValueError: broken off"
    )
    assert len(found.losses) == len(found.factors) == 5
    assert found.left is None and found.peak is None


@pytest.mark.parametrize("at", [1, 6, 8 + 1, 8 + 9])
def test_an_interrupt_passes_and_leaves_nothing(at: int) -> None:
    model = built()
    optimizer = Adam(model.parameters())
    StepGuard(GuardSettings(max_norm=0.1, warmup=5)).install(optimizer)
    tested = subject(model, signs(), optimizer, loss=Failing(at, KeyboardInterrupt))
    before = fingerprint(model, optimizer, tested.batches)
    with pytest.raises(KeyboardInterrupt):
        rate_range(tested)
    assert fingerprint(model, optimizer, tested.batches) == before


def test_a_step_that_raises_inside_the_optimizer_leaves_nothing() -> None:
    model = built()
    rate = torch.tensor(0.1)
    optimizer = SGD(model.parameters(), lr=rate)
    StepGuard(GuardSettings(warmup=50)).install(optimizer)

    def broken(optimizer: Optimizer, *_: Any) -> None:
        if float(optimizer.param_groups[0]["lr"]) > 0.05:
            raise MemoryError("no memory")

    optimizer.register_step_pre_hook(broken)
    found = swept(model, optimizer, signs())
    assert "raised MemoryError: no memory" in found.words and found.peak is None
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.1)


def test_a_long_list_of_batches_costs_no_more() -> None:
    model = built()
    tested = subject(model, signs(8), Adam(model.parameters()), loss=Failing(-1, ValueError))
    batches = replace(tested.batches, batches=tested.batches.batches * 3)
    found = rate_range(replace(tested, batches=batches), steps=12)
    assert Failing.calls == 8 + 8 + len(found.losses) == 28


def test_a_time_limit_ends_the_sweep() -> None:
    model = built()
    found = swept(model, Adam(model.parameters()), signs(), seconds=0.0)
    assert found.words == f"the time of 0 s was up after 0 of {STEPS} steps"
    assert found.peak is None and found.losses == ()


# What cannot be swept.


def test_what_has_no_rate_to_sweep_says_so() -> None:
    model = built()
    words = {
        swept(model, LBFGS(model.parameters()), signs()).words,
        swept(model, SGD(model.parameters(), lr=0.0), signs()).words,
    }
    assert words == {
        "LBFGS evaluates the loss several times in a step, and chooses its length itself",
        "every learning rate is 0",
    }
    still = swept(model, SGD([nn.Parameter(torch.zeros(2))], lr=0.1), signs())
    assert still.peak is None and still.words == "no step changed the loss"
    nothing = swept(model, Adam(model.parameters()), signs(), loss=lambda o, t: o.sum() * 0)
    assert nothing.peak is None and "nothing to compare with" in nothing.words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 5}, "5 steps are no sweep"),
        ({"lowest": 0.0}, "from 0.0 to"),
        ({"lowest": 2.0, "highest": 1.0}, "from 2.0 to 1.0"),
        ({"highest": math.inf}, "to inf"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(options: dict[str, Any], words: str) -> None:
    model = built()
    tested = subject(model, signs(), Adam(model.parameters()), loss=nn.CrossEntropyLoss())
    with pytest.raises(RefusedError, match=words):
        rate_range(tested, **options)


@pytest.mark.parametrize("missing", ["optimizer", "loss"])
def test_without_optimizer_or_loss_there_is_no_sweep(missing: str) -> None:
    model = built()
    optimizer = None if missing == "optimizer" else SGD(model.parameters(), 0.1)
    given: dict[str, Any] = {} if missing == "loss" else {"loss": nn.CrossEntropyLoss()}
    data: Sequence[Any] = signs()
    with pytest.raises(RefusedError, match=f"no {missing}"):
        rate_range(subject(model, data, optimizer, **given))
