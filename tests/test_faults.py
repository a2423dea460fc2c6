"""Whatever fails, wherever: after each verb of random plans, in a verb, and on the way back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import rnnguard
import rnnguard.rewrite
from rnnguard.errors import RewriteError
from rnnguard.probe.snapshot import fingerprint
from rnnguard.records import Change, Plan
from rnnguard.remedies.remedy import Remedy
from rnnguard.replay import REMEDY, replay
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.schedule import GuardSettings
from rnnguard.rewrite.transaction import transaction

FAULTS = (RuntimeError("injected"), KeyboardInterrupt(), MemoryError())
VERBS = ("write_", "morph_", "adopt_", "hook_", "tune_", "retype_")
H = 2


class FaultAfter(Edit):
    """Raises after the verb of that number has done its work; 0 lets all of them pass."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, number: int, fault: Any) -> None:
        super().__init__(model, optimizer)
        self.left, self.fault, self.count = number, fault, 0


def _counted(name: str) -> Callable[..., Any]:
    verb = getattr(Edit, name)

    def call(self: FaultAfter, *args: Any, **kwargs: Any) -> Any:
        result = verb(self, *args, **kwargs)
        self.count += 1
        if self.count == self.left:
            raise self.fault
        return result

    return call


for each in VERBS:
    setattr(FaultAfter, each, _counted(each))


# --- models, optimizers and plans --------------------------------------------------------


def one() -> nn.Module:
    return nn.LSTM(H, H)


def gated() -> nn.Module:
    return nn.GRU(H, H)


def deep() -> nn.Module:
    return nn.RNN(H, H, num_layers=2)


def shared() -> nn.Module:
    """One recurrence under two paths, and one whose weight is tied to it."""
    model = nn.Module()
    model.a = model.alias = nn.LSTM(H, H)
    model.b = nn.LSTM(H, H, bias=False)
    model.b.weight_hh_l0 = model.a.weight_hh_l0
    return model


def three() -> nn.Module:
    parts = [nn.GRU(H, H, bidirectional=True), nn.RNN(2 * H, H), nn.LSTM(H, H, proj_size=1)]
    model = nn.Sequential(*parts).double()
    model[1].requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "one": (one, [""]),
    "gated": (gated, [""]),
    "deep": (deep, [""]),
    "shared": (shared, ["a", "alias", "b"]),
    "three": (three, ["0", "1", "2"]),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), 0.1, momentum=0.9),
    "adam": lambda m: Adam(m.parameters(), 0.01, weight_decay=0.1),
    "named adam": lambda m: Adam(m.named_parameters(), 0.01),
    "adamw in two groups": lambda m: AdamW(
        [{"params": group} for group in halves(list(m.parameters()))], 0.01
    ),
}


def halves(params: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return params[::2], params[1::2]


SEEDS = st.integers(0, 5)
DOSES: dict[str, Any] = {
    "orthogonal": st.fixed_dictionaries({"gain": st.sampled_from([0.5, 1.0]), "seed": SEEDS}),
    "chrono_bias": st.fixed_dictionaries({"t_max": st.integers(3, 99), "seed": SEEDS}),
    "uniform_gate_bias": st.fixed_dictionaries({"seed": SEEDS}),
    "recurrent_gain": st.fixed_dictionaries({"target": st.just(0.1)}),
    "critical_gain": st.fixed_dictionaries({"factor": st.floats(0.5, 2.0)}),
    "variance_scaling": st.fixed_dictionaries({"input_rms": st.just(2.0), "seed": SEEDS}),
    "layer_norm": st.just({}),
    "layer_norm_between": st.just({}),
    "residual": st.fixed_dictionaries({"shortcut": st.sampled_from(["residual", "highway"])}),
    "variational_dropout": st.just({"dropout": 0.2, "input_dropout": 0.1}),
    "weight_drop": st.just({"p": 0.5}),
    "weight_norm": st.fixed_dictionaries({"over": st.sampled_from(["row", "gate"])}),
    "orthogonal_parametrization": st.just({}),
    "spectral_bound": st.just({"bound": 0.5}),
    "attention_readout": st.fixed_dictionaries({"seed": SEEDS}),
    "layer_norm_inside": st.fixed_dictionaries({"memory": st.integers(3, 99)}),
    "zoneout": st.just({"hidden": 0.1, "cell": 0.2}),
    "residual_rnn": st.fixed_dictionaries({"memory": st.integers(2, 99)}),
    "bounded_rnn": st.fixed_dictionaries({"memory": st.integers(1, 99)}),
    "indrnn": st.fixed_dictionaries({"memory": st.integers(1, 99), "seed": SEEDS}),
    "gated_rnn": st.fixed_dictionaries({"memory": st.integers(3, 99), "seed": SEEDS}),
    "gate_last_gru": st.just({}),
    "clip_gradient": st.fixed_dictionaries({"max_norm": st.floats(0.1, 9.0)}),
    "warmup_cosine": st.fixed_dictionaries({"warmup": st.integers(2, 9)}),
    "nonfinite_guard": st.fixed_dictionaries(
        {"on_nonfinite": st.sampled_from(["skip", "propagate"])}
    ),
    "amsgrad": st.just({}),
    "adamw": st.just({}),
}


@st.composite
def changes(draw: st.DrawFn, paths: list[str]) -> Change:
    name = draw(st.sampled_from(sorted(DOSES)))
    remedy: Remedy = REMEDY[name]
    path = None if remedy.tier == "step" else draw(st.sampled_from(paths))
    why = {"scenario": "test", "why": "A test."}
    return Change(remedy=name, path=path, tier=remedy.tier, dose=draw(DOSES[name]), **why)


@st.composite
def plans(draw: st.DrawFn) -> tuple[str, Plan]:
    kind = draw(st.sampled_from(sorted(MODELS)))
    several = st.lists(changes(MODELS[kind][1]), min_size=1, max_size=4)
    return kind, Plan(changes=tuple(draw(several)))


def prepared(kind: str, name: str, used: bool) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    optimizer = OPTIMIZERS[name](model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    if used:
        optimizer.step()
    return model, optimizer


PLANS = 500
verbs_seen: list[int] = []
remedies_seen: set[str] = set()


@settings(
    max_examples=PLANS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(plan=plans(), name=st.sampled_from(sorted(OPTIMIZERS)), used=st.booleans())
def test_a_fault_after_any_verb_of_any_plan_leaves_no_trace(
    plan: tuple[str, Plan], name: str, used: bool
) -> None:
    kind, ordered = plan
    model, optimizer = prepared(kind, name, used)
    before = fingerprint(model, optimizer)
    whole = FaultAfter(model, optimizer, 0, None)
    with transaction(whole):
        remedies_seen.update(change.remedy for change in replay(model, whole, ordered))
    whole.undo_()
    assert fingerprint(model, optimizer) == before
    verbs_seen.append(whole.count)
    for number in range(1, whole.count + 1):
        for fault in FAULTS:
            edit = FaultAfter(model, optimizer, number, fault)
            interrupt = isinstance(fault, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt if interrupt else RewriteError), transaction(edit):
                replay(model, edit, ordered)
            assert fingerprint(model, optimizer) == before, f"{fault!r} after verb {number}"


def test_there_were_enough_of_them() -> None:
    """Runs after the test above, in the order of the file; alone it has nothing to count."""
    if verbs_seen:
        assert len(verbs_seen) >= PLANS and sum(verbs_seen) > 1000
        assert remedies_seen == set(DOSES)


# --- in the middle of a verb, and on the way back ----------------------------------------


class FaultAtLine:
    """Raises at the n-th line that is run in the rewrite folder, once."""

    FOLDER = str(Path(rnnguard.rewrite.__file__).parent)

    def __init__(self, line: int, fault: BaseException) -> None:
        self.left, self.fault = line, fault

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.FOLDER):
            return None
        # What has begun to be taken back is another matter than what has begun to be done.
        if frame.f_code.co_name in {"transaction", "__init__", "rolled_back"}:
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                raise self.fault
        return self


@contextmanager
def traced(tracer: FaultAtLine) -> Iterator[None]:
    outer = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(outer)


def every_verb(edit: Edit, model: Any) -> None:
    edit.write_(model.weight_hh_l0, torch.zeros(4 * H, H))
    REMEDY["layer_norm"].apply(edit, model, {})
    edit.hook_(GuardSettings(max_norm=1.0))
    edit.hook_(GuardSettings(warmup=3))
    edit.tune_("amsgrad", True)
    edit.retype_(AdamW)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_at_any_line_of_any_verb_is_restored(fault: BaseException) -> None:
    model, optimizer = prepared("one", "named adam", used=True)
    before, line, fired = fingerprint(model, optimizer), 0, True
    while fired:
        tracer, edit = FaultAtLine(line, fault), Edit(model, optimizer)
        try:
            with transaction(edit), traced(tracer):
                every_verb(edit, model)
        except (KeyboardInterrupt, RewriteError):
            assert fingerprint(model, optimizer) == before, f"at line {line}"
            assert torch.is_grad_enabled()
        fired, line = tracer.left < 0, line + 1
    assert line > 60
    assert fingerprint(model, optimizer) != before


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_at_any_line_of_the_way_back_does_not_stop_it(fault: BaseException) -> None:
    """An interrupt waits, and an inverse that failed for a moment is run once more."""
    model, optimizer = prepared("one", "named adam", used=True)
    before, line, fired = fingerprint(model, optimizer), 0, True
    inverses = {"inverse", "lists_without", "remove", "_end_step", "return_all_", "given_back"}
    while fired:
        tracer, edit = FaultAtLine(line, fault), Edit(model, optimizer)
        if not isinstance(fault, KeyboardInterrupt):
            # Only an interrupt comes from without; the others come out of an inverse.
            tracer = _within(inverses, tracer)
        with pytest.raises((KeyboardInterrupt, RewriteError)), transaction(edit):
            every_verb(edit, model)
            sys.settrace(tracer)
            raise ValueError("to be taken back")
        sys.settrace(None)
        assert fingerprint(model, optimizer) == before, f"at line {line}"
        fired, line = tracer.left < 0, line + 1
    assert line > 30


def _within(names: set[str], tracer: FaultAtLine) -> FaultAtLine:
    class Within(FaultAtLine):
        def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
            if event == "call" and frame.f_code.co_name not in names:
                return None
            return super().__call__(frame, event, argument)

    return Within(tracer.left, tracer.fault)


# --- through the public door -------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0][:, -1])
        return output


PUBLIC = Plan(
    changes=tuple(
        Change(remedy=name, path=path, tier=REMEDY[name].tier, dose=dose, scenario="t", why="t")
        for name, path, dose in (
            ("clip_gradient", None, {"max_norm": 1.0}),
            ("amsgrad", None, {}),
            ("chrono_bias", "rnn", {"t_max": 20, "seed": 0}),
            ("layer_norm", "rnn", {}),
        )
    )
)


@pytest.mark.parametrize("door", ["apply", "stabilize", "plan"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_behind_a_public_door_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, door: str, fault: BaseException
) -> None:
    model = Model()
    optimizer = Adam(model.parameters())
    before, verb = fingerprint(model, optimizer), Edit.write_

    def failing(self: Edit, *args: Any) -> None:
        verb(self, *args)
        raise fault

    monkeypatch.setattr(Edit, "write_", failing)
    if door == "plan":
        # `plan` takes back on purpose what it has done; it must do so after a fault as well.
        monkeypatch.setattr("rnnguard.mending.verify", _raising(fault))
        monkeypatch.setattr(Edit, "write_", verb)
    run = {
        "apply": lambda: rnnguard.apply(model, optimizer, PUBLIC),
        "stabilize": lambda: rnnguard.stabilize(model, optimizer, inputs=X, memory=40),
        "plan": lambda: rnnguard.plan(model, optimizer, inputs=X, memory=40),
    }[door]
    interrupt = isinstance(fault, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if interrupt else RewriteError):
        run()
    assert fingerprint(model, optimizer) == before


X = 1e-3 * torch.linspace(-1, 1, 480).view(4, 40, 3)


def _raising(fault: BaseException) -> Callable[..., Any]:
    def verify(*_: object) -> None:
        raise fault

    return verify


ALL_STEPS = """
schema = 1
[[scenario]]
id    = "all-steps"
scope = "run"
when  = { optimizer = "adam" }
apply = ["clip_gradient", "nonfinite_guard", "warmup_cosine", "amsgrad", "adamw"]
dose  = { warmup_cosine = { at_least = 5 } }
why   = "A test."
refs  = ["a test"]
"""


def test_a_plan_of_all_verbs_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "scenarios.toml").write_text(ALL_STEPS, encoding="utf-8")
    model, verbs = Model(), set[str]()
    optimizer = Adam(model.named_parameters(), weight_decay=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = fingerprint(model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        for name in VERBS:
            patch.setattr(Edit, name, _noted(getattr(Edit, name), name, verbs))
        plan = rnnguard.plan(model, optimizer, inputs=X, memory=40, rules=tmp_path)
    assert fingerprint(model, optimizer) == before
    assert verbs == set(VERBS)
    assert {change.tier for change in plan} == {"step", "values", "structure"}


def _noted(verb: Callable[..., Any], name: str, verbs: set[str]) -> Callable[..., Any]:
    def call(*args: Any, **children: Any) -> Any:
        verbs.add(name)
        return verb(*args, **children)

    return call
