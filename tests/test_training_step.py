"""Training steps as users write them, watched: what is said of each, and that nothing stays."""

from __future__ import annotations

import cProfile
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from factories import subject
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from zoo import ZOO

from rnnguard.inspection.recording import tensors_in
from rnnguard.probe.snapshot import fingerprint
from rnnguard.probe.subject import Subject
from rnnguard.probe.training_step import Watched, watch_steps

B, T, F, H = 6, 11, 5, 16
Step = Callable[[Any, Any, Any], Any]


class Forecaster(nn.Module):
    def __init__(self, kind: Any = nn.GRU, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(F, H, batch_first=True, **options)
        self.head = nn.Linear(H * (2 if options.get("bidirectional") else 1), 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.rnn(x)[0].mean(1))


class Packed(Forecaster):
    def forward(self, x: Tensor) -> Any:
        lengths = torch.arange(T, T - len(x), -1)
        out, _ = self.rnn(pack_padded_sequence(x, lengths, batch_first=True))
        return self.head(pad_packed_sequence(out, batch_first=True)[0].mean(1))


class Loop(nn.Module):
    """A recurrence written by hand, with two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back, self.head = nn.Linear(F, H), nn.Linear(H, H), nn.Linear(H, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = x.new_zeros(len(x), H)
        for x_t in x.unbind(1):
            h = torch.tanh(self.into(x_t) + self.back(h))
        return {"out": self.head(h), "state": (h,)}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(9, F), nn.LSTMCell(F, H), nn.Linear(H, 1)

    def forward(self, ids: Tensor) -> Any:
        state: Any = None
        for x in self.embed(ids).unbind(1):
            state = self.cell(x, state)
        return self.head(state[0])


def batches(scale: float = 1.0, count: int = 3, ids: bool = False) -> list[tuple[Tensor, Tensor]]:
    def made() -> Tensor:
        return torch.randint(9, (B, T)) if ids else torch.randn(B, T, F)

    return [(made(), scale * torch.randn(B, 1)) for _ in range(count)]


def error(model: Any, batch: Any) -> Any:
    x, y = batch
    found = model(x)
    return nn.functional.mse_loss(found["out"] if isinstance(found, dict) else found, y)


def watched(
    train_step: Step,
    model: nn.Module | None = None,
    optimizer: Callable[..., Optimizer] = Adam,
    data: Any = None,
    **options: Any,
) -> Watched:
    model = Forecaster() if model is None else model
    held = optimizer(model.parameters(), lr=0.01)
    data = batches() if data is None else data
    before = fingerprint(model, held, train_step)
    found = watch_steps(_subject(model, held, data), held, train_step, **options)
    assert fingerprint(model, held, train_step) == before
    assert sys.getprofile() is None
    return found


def _subject(model: nn.Module, optimizer: Optimizer, data: Any) -> Subject:
    return subject(model, data, optimizer, loss=nn.MSELoss())


# --- steps ------------------------------------------------------------------------------------


def plain(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    error(model, batch).backward()
    optimizer.step()


def clipped(model: Any, optimizer: Any, batch: Any, norm: float = 0.5) -> Any:
    model.train()
    model.zero_grad(set_to_none=False)
    loss = error(model, batch)
    loss.backward()
    clip_grad_norm_(model.parameters(), norm)
    optimizer.step()
    return loss


def clipped_by_value(model: Any, optimizer: Any, batch: Any) -> None:
    error(model, batch).backward()
    clip_grad_value_(model.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()


def clipped_in_two(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    error(model, batch).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.rnn.parameters()])
    torch.nn.utils.clip_grads_with_norm_(model.rnn.parameters(), 0.5, norm)
    optimizer.step()


def clipped_by_hand(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    error(model, batch).backward()
    for parameter in model.parameters():
        parameter.grad.data.clamp_(-5, 5)
    optimizer.step()


def clipped_by_hook(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    states = model.rnn(batch[0])[0]
    states.register_hook(lambda gradient: gradient.clamp(-1, 1))
    loss: Any = nn.functional.mse_loss(model.head(states[:, -1]), batch[1])
    loss.backward()
    optimizer.step()


def clipped_in_closure(model: Any, optimizer: Any, batch: Any) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = error(model, batch)
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        return loss

    optimizer.step(closure)


def accumulated(model: Any, optimizer: Any, batch: Any) -> None:
    for x, y in zip(batch[0].split(2), batch[1].split(2), strict=True):
        (error(model, (x, y)) / 3).backward()
    clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def skipping(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    error(model, batch).backward()
    norm = clip_grad_norm_(model.parameters(), float("inf"))
    if norm < 100:
        optimizer.step()


def late(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    error(model, batch).backward()
    optimizer.step()
    clip_grad_norm_(model.parameters(), 0.5)


def early(model: Any, optimizer: Any, batch: Any) -> None:
    loss = error(model, batch)
    optimizer.zero_grad(set_to_none=False)
    clip_grad_norm_(model.parameters(), 0.5)
    loss.backward()
    optimizer.step()


def early_at_the_start(model: Any, optimizer: Any, batch: Any) -> None:
    clip_grad_norm_([p for p in model.parameters() if p.grad is not None] or [], 0.5)
    clip_grad_norm_(list(model.parameters()), 0.5)
    optimizer.zero_grad()
    error(model, batch).backward()
    optimizer.step()


HEALTHY = [clipped, clipped_by_value, clipped_in_two, clipped_in_closure, accumulated]
MODELS: list[Callable[[], nn.Module]] = [
    Forecaster,
    lambda: Forecaster(nn.LSTM, num_layers=2, bidirectional=True),
    lambda: Forecaster(nn.RNN, dropout=0.2, num_layers=3),
    Packed,
    Loop,
]


def line_of(place: str) -> str:
    file, line = place.rsplit(":", 1)
    assert file.endswith("test_training_step.py")
    with open(__file__, encoding="utf-8") as source:
        return source.read().splitlines()[int(line) - 1].strip()


# --- the clip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("step", [clipped, clipped_by_value, clipped_in_closure, accumulated])
def test_a_healthy_step_has_nothing_against_it(step: Step, build: Callable[[], nn.Module]) -> None:
    found = watched(step, build()).readings
    assert (found["watched_steps"], found["clip_order"]) == (3, "sound")
    assert found["clip_use"] in ("sound", "never")
    told = ("clip_scaled", "graph_retained", "fp16_unscaled", "never_cleared")
    assert not any(found[name] for name in (*told, "cleared_before_step"))


NATIVE = [specimen for specimen in ZOO if specimen.kind == "native"][::12]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize("specimen", NATIVE, ids=lambda specimen: specimen.name)
def test_models_of_many_shapes(specimen: Any) -> None:
    def train_step(model: Any, optimizer: Any, inputs: Any) -> None:
        optimizer.zero_grad()
        found = [t for t in tensors_in(model(*inputs)) if t.requires_grad]
        loss: Any = torch.stack([t.pow(2).mean() for t in found]).sum()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model, inputs = specimen.build(), specimen.inputs()
    given = subject(model, None, optimizer := Adam(model.parameters()), inputs=inputs)
    before = fingerprint(model, optimizer)
    found = watch_steps(given, optimizer, train_step).readings
    assert fingerprint(model, optimizer) == before
    assert (found["watched_steps"], found["clip_order"]) == (3, "sound")
    told = ("clip_scaled", "graph_retained", "never_cleared", "cleared_before_step")
    assert not any(found[name] for name in told)


def test_cells_in_a_loop_on_tokens_and_a_batch_of_one() -> None:
    data = [(x[:1], y[:1]) for x, y in batches(ids=True)]
    found = watched(clipped, Tagger(), data=data).readings
    assert (found["watched_steps"], found["clip_order"], found["never_cleared"]) == (
        3,
        "sound",
        False,
    )


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_no_clip(kind: Callable[..., Optimizer]) -> None:
    found = watched(plain, optimizer=kind).readings
    assert (found["clip_order"], found["clip_use"], found["clip_norm"]) == ("none", "none", None)
    assert line_of(found["places"]["clip_order"]) == "optimizer.step()"


@pytest.mark.parametrize("step", [clipped_by_hand, clipped_by_hook, skipping])
def test_a_bound_that_torch_knows_nothing_of(step: Step) -> None:
    assert watched(step).readings["clip_order"] == "sound"


def test_hooks_on_parameters_may_clip() -> None:
    model = Forecaster()
    for parameter in model.parameters():
        hooked: Any = parameter
        hooked.register_hook(lambda gradient: gradient.clamp(-1, 1))
    assert watched(plain, model).readings["clip_order"] == "sound"


def test_the_norm_alone_is_no_clip() -> None:
    def measured(model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        error(model, batch).backward()
        clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()

    assert watched(measured).readings["clip_order"] == "none"


def test_a_guarded_optimizer_clips_by_itself() -> None:
    model, data = Forecaster(), batches()
    optimizer = Adam(model.parameters())
    optimizer.register_step_pre_hook(lambda held, *_: _clip_of(held))
    found = watch_steps(_subject(model, optimizer, data), optimizer, plain).readings
    assert found["clip_order"] == "sound"


def _clip_of(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.clamp_(-1, 1)


@pytest.mark.parametrize(
    ("step", "order"),
    [(late, "after the step"), (early, "before backward"), (early_at_the_start, "before backward")],
)
@pytest.mark.filterwarnings("ignore:`parameters` is an empty generator")
def test_a_clip_at_the_wrong_time(step: Step, order: str) -> None:
    found = watched(step, optimizer=SGD).readings
    assert found["clip_order"] == order
    assert line_of(found["places"]["clip_order"]).startswith("clip_grad_norm_(")
    assert found["clip_use"] == "none"


@pytest.mark.parametrize(
    ("norm", "use"), [(-1.0, "not positive"), (0.0, "not positive"), (1e-3, "always"),
                      (0.5, "sound"), (1e9, "never")],
)  # fmt: skip
def test_the_threshold(norm: float, use: str) -> None:
    found = watched(partial(clipped, norm=norm), data=batches(10.0)).readings
    assert (found["clip_use"], found["clip_norm"]) == (use, norm)
    assert line_of(found["places"]["clip_use"]).startswith("clip_grad_norm_(")


def test_a_clip_of_another_model_does_not_count() -> None:
    other = nn.Linear(2, 2)

    def adversarial(model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        error(model, batch).backward()
        other(torch.ones(1, 2)).sum().backward()
        clip_grad_norm_(other.parameters(), 0.1)
        optimizer.step()

    assert watched(adversarial).readings["clip_order"] == "none"


# --- whose parameters ---------------------------------------------------------------------------


def _shared_out(train_step: Step) -> Watched:
    """Watched with an optimizer that holds the recurrence alone."""
    model, data = Forecaster(), batches()
    optimizer = Adam(model.rnn.parameters(), lr=0.01)
    return watch_steps(_subject(model, optimizer, data), optimizer, train_step)


def test_another_optimizer_trains_the_rest() -> None:
    def train_step(model: Any, optimizer: Any, batch: Any) -> None:
        model.zero_grad()
        error(model, batch).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        SGD(model.head.parameters(), lr=0.1).step()

    found = _shared_out(train_step).readings
    assert (found["parameters_missing"], found["missing_names"]) == (0, "")


def test_a_copy_is_kept_up_by_hand() -> None:
    def train_step(model: Any, optimizer: Any, batch: Any) -> None:
        clipped(model, optimizer, batch)
        model.head.weight.data.mul_(0.99)

    found = _shared_out(train_step).readings
    assert (found["parameters_missing"], found["missing_names"]) == (1, "`head.bias`")


def test_what_nothing_moves_is_left_to_the_look_before() -> None:
    assert "parameters_missing" not in _shared_out(clipped).readings
    assert "parameters_missing" not in watched(clipped).readings


# --- scaler and precision -----------------------------------------------------------------------


def with_scaler(order: str) -> tuple[Step, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def train_step(model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = error(model, batch).float()
        scaler.scale(loss).backward()
        if order == "unscaled":
            scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return train_step, scaler


@pytest.mark.parametrize("order", ["unscaled", "scaled"])
def test_a_clip_under_a_scaler(order: str) -> None:
    step, scaler = with_scaler(order)
    held = scaler.state_dict()
    found = watched(step).readings
    assert found["clip_scaled"] is (order == "scaled")
    assert found["fp16_unscaled"] is False and found["nonfinite_passed"] is False
    assert scaler.state_dict() == held and scaler._scale is None
    if order == "scaled":
        assert line_of(found["places"]["clip_scaled"]).startswith("clip_grad_norm_(")


def test_gradients_unscaled_by_hand() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def train_step(model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        scaler.scale(error(model, batch)).backward()
        for parameter in model.parameters():
            parameter.grad /= scaler.get_scale()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert watched(train_step).readings["clip_scaled"] is False


@pytest.mark.parametrize(
    ("dtype", "unscaled"), [(torch.float16, True), (torch.bfloat16, False), (None, False)]
)
def test_half_precision_without_a_scaler(dtype: torch.dtype | None, unscaled: bool) -> None:
    def train_step(model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = error(model, batch).float()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    found = watched(train_step).readings
    assert found["fp16_unscaled"] is unscaled


@pytest.mark.parametrize("clips", [True, False])
def test_a_loss_scaled_by_hand(clips: bool) -> None:
    def train_step(model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = error(model, batch).float()
        (loss * 512).backward()
        for parameter in model.parameters():
            parameter.grad /= 512
        if clips:
            clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    assert watched(train_step).readings["fp16_unscaled"] is False


# --- gradients that are not finite --------------------------------------------------------------


def unguarded(model: Any, optimizer: Any, batch: Any) -> None:
    clipped(model, optimizer, batch)


def raising(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    error(model, batch).backward()
    clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
    optimizer.step()


def checking(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    error(model, batch).backward()
    norm = clip_grad_norm_(model.parameters(), 0.5)
    if torch.isfinite(norm):
        optimizer.step()


def emptying(model: Any, optimizer: Any, batch: Any) -> None:
    """The infinite norm makes every gradient zero, and the step is taken all the same."""
    optimizer.zero_grad()
    error(model, batch).backward()
    norm = clip_grad_norm_(model.parameters(), 0.5)
    for parameter in model.parameters():
        parameter.grad.nan_to_num_()
    assert norm >= 0
    optimizer.step()


@pytest.mark.parametrize(
    ("step", "passed"),
    [(plain, True), (unguarded, True), (emptying, True), (raising, False), (checking, False)],
)
def test_a_gradient_that_is_not_finite(step: Step, passed: bool) -> None:
    assert watched(step).readings["nonfinite_passed"] is passed


# --- clearing and keeping -----------------------------------------------------------------------


def cleared_too_soon(model: Any, optimizer: Any, batch: Any) -> None:
    loss = error(model, batch)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()


def never_cleared(model: Any, optimizer: Any, batch: Any) -> None:
    error(model, batch).backward()
    clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


def with_momentum_by_hand(model: Any, optimizer: Any, batch: Any) -> None:
    error(model, batch).backward()
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad.mul_(0.9)


def cleared_by_hand(model: Any, optimizer: Any, batch: Any) -> None:
    error(model, batch).backward()
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None


def test_gradients_cleared_before_the_step() -> None:
    found = watched(cleared_too_soon).readings
    assert found["cleared_before_step"] and not found["never_cleared"]
    assert line_of(found["places"]["cleared_before_step"]) == "optimizer.zero_grad()"


def test_gradients_never_cleared() -> None:
    found = watched(never_cleared).readings
    assert found["never_cleared"] and not found["cleared_before_step"]
    assert line_of(found["places"]["never_cleared"]) == "error(model, batch).backward()"


@pytest.mark.parametrize("step", [plain, with_momentum_by_hand, cleared_by_hand, accumulated, late])
def test_gradients_are_cleared_or_kept_on_purpose(step: Step) -> None:
    found = watched(step).readings
    assert not found["never_cleared"] and not found["cleared_before_step"]


def test_two_optimizers_take_turns() -> None:
    """The generator's loss leaves gradients on the critic, which its own turn clears."""
    critic = Forecaster()
    of_critic = Adam(critic.parameters())

    def adversarial(model: Any, optimizer: Any, batch: Any) -> None:
        of_critic.zero_grad()
        (critic(batch[0]) - model(batch[0])).mean().backward()
        clip_grad_norm_(critic.parameters(), 0.5)
        of_critic.step()
        optimizer.zero_grad()
        (model(batch[0]) * critic(batch[0])).mean().backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    model, data = Forecaster(), batches()
    before = fingerprint(critic, of_critic)
    for watched_model, optimizer in ((model, Adam(model.parameters())), (critic, of_critic)):
        given = _subject(watched_model, optimizer, data)
        step = partial(_with, adversarial, model, Adam(model.parameters()), optimizer)
        found = watch_steps(given, optimizer, step).readings
        assert (found["clip_order"], found["never_cleared"]) == ("sound", False)
        assert not found["cleared_before_step"] and not found["graph_retained"]
    assert fingerprint(critic, of_critic) == before


def _with(step: Step, model: Any, of_model: Any, given: Any, _: Any, held: Any, batch: Any) -> None:
    mine = [id(p) for p in model.parameters()]
    same = id(given.param_groups[0]["params"][0]) in mine
    step(model, held if same else of_model, batch)


def keeping(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    error(model, batch).backward(retain_graph=True)
    optimizer.step()


def several_losses(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    found = model(batch[0])
    for loss in (found.mean(), found.pow(2).mean()):
        loss.backward(retain_graph=True)
    optimizer.step()


def two_losses(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    found = model(batch[0])
    found.mean().backward(retain_graph=True)
    found.pow(2).mean().backward()
    optimizer.step()


def penalised(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    loss = error(model, batch)
    loss.backward(create_graph=True, retain_graph=True)
    optimizer.step()


def test_a_graph_that_is_retained() -> None:
    found = watched(keeping).readings
    assert found["graph_retained"]
    assert line_of(found["places"]["graph_retained"]).endswith("backward(retain_graph=True)")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("step", [plain, several_losses, two_losses, penalised])
def test_a_graph_that_is_needed_or_freed(step: Step) -> None:
    assert watched(step).readings["graph_retained"] is False


# --- nothing stays, and nothing crashes ---------------------------------------------------------

COUNT = 0
FRESH: Any
SEEN: list[float] = []
CRITERION = nn.MSELoss()
EMA = torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))
STATE: dict[str, Any] = {}


def with_globals(model: Any, optimizer: Any, batch: Any) -> None:
    global COUNT, FRESH
    COUNT += 1
    FRESH = batch
    plain(model, optimizer, batch)
    _remember(float(CRITERION(model(batch[0]), batch[1]).detach()))
    batch[0].zero_()


def _remember(loss: float) -> None:
    SEEN.append(loss)
    EMA.update_parameters(nn.Linear(1, 1))
    STATE["scaler"].scale(torch.ones(()))
    STATE["scheduler"].step()


def test_what_the_step_refers_to_is_given_back() -> None:
    model, data = Forecaster(dropout=0.0), batches()
    optimizer = Adam(model.parameters(), lr=0.1)
    STATE["scheduler"] = StepLR(optimizer, 1, gamma=0.5)
    STATE["scaler"] = torch.amp.GradScaler("cpu")
    model.head.weight.grad = torch.ones_like(model.head.weight)
    others = (STATE["scheduler"], STATE["scaler"], EMA, CRITERION, SEEN, data, STATE)
    before = fingerprint(model, optimizer, *others)
    found = watch_steps(_subject(model, optimizer, data), optimizer, with_globals)
    assert found.words is None and found.readings["watched_steps"] == 3
    assert fingerprint(model, optimizer, *others) == before
    assert COUNT == 0 and SEEN == [] and "FRESH" not in globals()


class Trainer:
    """Holds what it trains with, and steps once in two batches."""

    def __init__(self, model: nn.Module) -> None:
        self.count, self.average = 0, [p.detach().clone() for p in model.parameters()]

    def train_step(self, model: Any, optimizer: Any, batch: Any) -> None:
        self.count += 1
        (error(model, batch) / 2).backward()
        if self.count % 2 == 0:
            clip_grad_norm_(model.parameters(), 0.5)
            self.update(model, optimizer)

    def update(self, model: Any, optimizer: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()
        for mine, new in zip(self.average, model.parameters(), strict=True):
            mine.lerp_(new.detach(), 0.1)


def test_a_method_that_accumulates_over_calls() -> None:
    model = Forecaster()
    trainer = Trainer(model)
    kept = [tensor.clone() for tensor in trainer.average]
    found = watched(trainer.train_step, model).readings
    assert (found["watched_steps"], found["clip_order"]) == (1, "sound")
    assert trainer.count == 0
    assert all(map(torch.equal, trainer.average, kept))


class Stateful(Forecaster):
    state: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        out, self.state = self.rnn(x, self.state)
        return self.head(out[:, -1])


def test_a_step_that_raises_is_told() -> None:
    found = watched(plain, Stateful())
    assert found.words is not None and "second time" in found.words
    assert found.words.endswith("(a state kept from the batch before, see RG301).")
    assert found.readings["watched_steps"] == 1 and found.readings["graph_kept"]


def test_a_graph_that_is_run_through_twice_in_one_step_is_none_kept() -> None:
    def twice(model: Any, optimizer: Any, batch: Any) -> None:
        plain(model, optimizer, batch)
        loss = model(batch[0]).square().sum()
        loss.backward()
        loss.backward()

    found = watched(twice)
    assert found.words is not None and "second time" in found.words
    assert "graph_kept" not in found.readings


def test_a_step_that_raises_at_once_is_told() -> None:
    def broken(model: Any, optimizer: Any, batch: Any) -> None:
        raise KeyError("no such batch")

    found = watched(broken)
    assert found.readings == {} and found.words == "train_step raised KeyError: 'no such batch'."


def test_an_interrupt_leaves_no_trace() -> None:
    def interrupted(model: Any, optimizer: Any, batch: Any) -> None:
        plain(model, optimizer, batch)
        raise KeyboardInterrupt

    model = Forecaster()
    optimizer = Adam(model.parameters())
    given = _subject(model, optimizer, batches())
    before = fingerprint(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        watch_steps(given, optimizer, interrupted)
    assert fingerprint(model, optimizer) == before and sys.getprofile() is None


def test_no_step_of_this_optimizer() -> None:
    found = watched(lambda model, optimizer, batch: error(model, batch).backward())
    assert found.readings == {} and found.words is not None and "no step" in found.words


def test_without_data_there_is_nothing_to_run_on() -> None:
    from rnnguard.probe.subject import guessed_batches

    model = nn.GRU(F, H)
    optimizer = SGD(model.parameters(), lr=0.1)
    guessed = Subject(model, optimizer, guessed_batches(model, None, 0), None, None, 0, False)
    found = watch_steps(guessed, optimizer, plain)
    assert found.readings == {} and found.words is not None and "no data" in found.words


def test_an_optimizer_that_evaluates_the_loss_itself() -> None:
    def train_step(model: Any, optimizer: Any, batch: Any) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = error(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)

    found = watched(train_step, optimizer=LBFGS).readings
    assert found["watched_steps"] == 3 and not found["cleared_before_step"]
    assert not found["never_cleared"]


def test_a_profiler_of_the_user_goes_on() -> None:
    calls: list[str] = []

    def profiler(frame: Any, what: str, _: Any) -> None:
        calls.append(frame.f_code.co_name)

    model = Forecaster()
    optimizer = Adam(model.parameters())
    given = _subject(model, optimizer, batches())
    sys.setprofile(profiler)
    try:
        watch_steps(given, optimizer, plain)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert "watch_steps" in calls and "clip_grad_norm_" not in calls
    with cProfile.Profile() as profile:
        found = watch_steps(given, optimizer, clipped)
        fingerprint(model)
    assert found.readings["clip_order"] == "sound"
    assert any("fingerprint" in str(entry.code) for entry in profile.getstats())
