"""What stands around a model or an optimizer, and which of it is looked through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel
from wrapping import Accelerated, Lightning, Lookahead, Net, Private, SharpnessAware

import rnnguard
from rnnguard.errors import RefusedError
from rnnguard.inspection.wrappers import copies_weights, opened, stepping
from rnnguard.probe.snapshot import fingerprint
from rnnguard.rewrite.stepguard import guard_of

imports_old_torch = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
X = torch.randn(6, 12, 3, generator=torch.Generator().manual_seed(0))


def said(model: nn.Module) -> list[str]:
    return [str(reason) for reason in opened(model).refusals]


def wrapped(name: str, path: str = "") -> str:
    place, inner = (f"`{path}`: ", f"{path}.module") if path else ("", "module")
    return (
        f"{place}the module is wrapped in {name}. "
        f"Pass `{inner}`, before wrapping: first stabilize, then wrap. (RG901)"
    )


COMPILED = "the module is compiled. Call rnnguard on the plain model, before torch.compile. (RG909)"


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_plain_model_is_itself() -> None:
    model = Net()
    assert opened(model).model is model and opened(model).runs and said(model) == []


@pytest.mark.usefixtures("one_process")
def test_wrappers_around_are_looked_through() -> None:
    model = Net()
    for around in (nn.DataParallel(model), DistributedDataParallel(model)):
        found = opened(around)
        assert found.model is model and found.runs and not found.hopeless
        assert said(around) == [wrapped(type(around).__name__)]


@imports_old_torch
def test_several_around() -> None:
    model = Net()
    around = torch.compile(nn.DataParallel(model), backend="eager")
    assert opened(around).model is model and opened(around).runs
    assert said(around) == [COMPILED, wrapped("DataParallel", "_orig_mod")]


def test_a_wrapper_further_in_is_not_run() -> None:
    model = nn.Sequential(nn.DataParallel(Net()), nn.Sequential(nn.DataParallel(nn.Tanh())))
    found = opened(model)
    assert found.model is model and not found.runs and not found.hopeless
    assert said(model) == [wrapped("DataParallel", "0"), wrapped("DataParallel", "1.0")]


@imports_old_torch
def test_compiled_further_in_is_not_run() -> None:
    inner = nn.Sequential(torch.compile(Net(), backend="eager"))
    assert not opened(inner).runs and said(inner) == [f"`0`: {COMPILED}"]
    in_place = Net()
    in_place.lstm.compile(backend="eager")
    assert not opened(in_place).runs and said(in_place) == [f"`lstm`: {COMPILED}"]


def test_what_keeps_all_that_passes_is_not_run() -> None:
    """As Opacus does, which hooks every layer."""

    class GradSampleModule(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._module = module

    found = opened(GradSampleModule(Net()))
    assert not found.runs and not found.hopeless
    assert "reaches beyond" in said(GradSampleModule(Net()))[0]


def test_statistics_over_processes_are_run_where_there_is_one() -> None:
    assert opened(nn.Sequential(Net(), nn.SyncBatchNorm(2))).runs


def test_an_average_is_refused() -> None:
    (reason,) = opened(AveragedModel(Net())).hopeless
    assert str(reason) == (
        "the module is an AveragedModel, which no gradient trains. Stabilize the plain model that "
        "it averages, and make the average afterwards. (RG901)"
    )


class Taught(nn.Module):
    """A model that keeps an average of itself as its teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Net()
        self.teacher = AveragedModel(self.student)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(x)
        apart: Tensor = self.student(x) - wanted
        return apart


def test_a_model_that_holds_an_average_keeps_to_it() -> None:
    model = Taught()
    optimizer = SGD(model.student.parameters())
    report = rnnguard.stabilize(model, optimizer, inputs=X, memory=12)
    assert {change.tier for change in report.changes} == {"step"}
    assert [(reason.code, reason.path) for reason in report.refusals] == [("RG901", "teacher")]
    pairs = zip(model.student.parameters(), model.teacher.parameters(), strict=True)
    assert all(torch.equal(mine, its) for mine, its in pairs)
    assert "student.lstm" in [site.path for site in report.sites]


class Looped(nn.Module):
    """A cell in a loop, which torch compiles, as it does not nn.LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


@imports_old_torch
def test_a_compiled_model_is_not_compiled_anew() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = torch.compile(Looped(), backend=backend)
    optimizer = SGD(model.parameters(), lr=1.0)
    model(X).sum().backward()
    before = len(compiled)
    assert before > 0
    rnnguard.audit(model, optimizer, inputs=X, memory=12)
    rnnguard.stabilize(model, optimizer, inputs=X, memory=12)
    model(X).sum().backward()
    optimizer.step()
    assert len(compiled) == before


def test_a_report_on_a_wrapped_model_is_that_of_the_plain_one() -> None:
    model = Net()
    around = nn.DataParallel(model)
    optimizer = Adam(around.parameters())
    before = fingerprint(around, optimizer)
    plain, seen = (rnnguard.audit(m, optimizer, inputs=X, memory=12) for m in (model, around))
    assert fingerprint(around, optimizer) == before
    assert [site.path for site in seen.sites] == ["lstm"]
    assert seen["lstm"] == plain["lstm"] and seen.findings == plain.findings
    note = "Looked through DataParallel: paths and figures are those of the plain module."
    assert note in seen.notes and note not in plain.notes


def test_the_steps_of_a_wrapped_model_are_guarded_and_no_more() -> None:
    around = nn.DataParallel(Net())
    optimizer = SGD(around.parameters(), lr=1.0)
    values = {name: value.clone() for name, value in around.state_dict().items()}
    report = rnnguard.stabilize(around, optimizer, inputs=X, memory=12)
    assert {change.tier for change in report.changes} == {"step"}
    assert [str(reason) for reason in report.refusals] == [
        "the module is wrapped in DataParallel, so values and structure stay as they are. "
        "Pass `module`, before wrapping: first stabilize, then wrap. (RG901)"
    ]
    assert all(torch.equal(around.state_dict()[name], old) for name, old in values.items())
    only = rnnguard.stabilize(around, optimizer, inputs=X, memory=12, tiers=("step",))
    assert only.refusals == ()


def test_a_plan_of_values_does_not_go_on_a_wrapped_model() -> None:
    model = Net()
    plan = rnnguard.plan(model, Adam(model.parameters()), inputs=X, memory=12)
    assert {change.tier for change in plan} == {"step", "values"}
    around = nn.DataParallel(model)
    with pytest.raises(RefusedError, match=r"wrapped in DataParallel, so values .* \(RG901\)"):
        rnnguard.apply(around, Adam(around.parameters()), plan)
    steps = plan.model_copy(update={"changes": tuple(c for c in plan if c.tier == "step")})
    optimizer = Adam(around.parameters())
    assert len(rnnguard.apply(around, optimizer, steps).changes) == len(steps)
    assert guard_of(optimizer) is not None


def test_what_cannot_be_run_is_guarded_without_a_look() -> None:
    model = nn.Sequential(nn.DataParallel(Net()))
    optimizer = SGD(model.parameters(), lr=1.0)
    before = fingerprint(model)
    report = rnnguard.stabilize(model, optimizer, inputs=X, memory=12)
    assert fingerprint(model) == before and report.sites == ()
    assert report.before.run.basis == "not run"
    assert {change.scenario for change in report.changes} == {"not-run"}
    guard = guard_of(optimizer)
    assert guard is not None and guard.settings.clip == "percentile"
    assert "not run" in str(report) and "0 sites" not in str(report)
    assert "not run" in report.to_html() and "0 sites" not in report.to_html()
    with pytest.raises(RefusedError, match=r"`0`: the module is wrapped in DataParallel"):
        rnnguard.audit(model, inputs=X)


# --- optimizers --------------------------------------------------------------------------


WRAPPERS = [Accelerated, Lightning, Private, Lookahead, lambda inner: Accelerated(Lightning(inner))]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_optimizer_that_steps(wrap: Any) -> None:
    inner = SGD(Net().parameters())
    assert stepping(wrap(inner)) is inner and stepping(inner) is inner
    assert copies_weights(wrap(inner)) is None


def test_the_base_of_a_sharpness_aware_step() -> None:
    optimizer = SharpnessAware(Net().parameters(), lr=0.1)
    assert stepping(optimizer) is optimizer.base_optimizer


def test_an_optimizer_beside_another_is_not_inside_it() -> None:
    """One that leaves some parameters to a second one steps the others itself."""
    model = Net()
    both = SGD(model.parameters())
    both.second = Adam(model.head.parameters())  # type: ignore[attr-defined]
    assert stepping(both) is both and copies_weights(both) is None


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_the_real_ones(name: str) -> None:
    pytest.importorskip(name)
    model = Net()
    inner = SGD(model.parameters(), lr=1.0)
    if name == "accelerate":
        from accelerate import Accelerator

        around, optimizer = Accelerator(cpu=True, mixed_precision="bf16").prepare(model, inner)
    else:
        from lightning.fabric import Fabric

        around, optimizer = Fabric(accelerator="cpu", devices=1).setup(model, inner)
    report = rnnguard.stabilize(around, optimizer, inputs=X, memory=12)
    assert [site.path for site in report.sites] == ["lstm"] and guard_of(inner) is not None
