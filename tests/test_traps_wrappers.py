"""Traps 21 to 23, 52, 54 and 65 to 71: what stands around a model or an optimizer.

Every test runs a second time against a plausible first implementation, and fails there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import fooled_by
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel
from wrapping import (
    Accelerated,
    Lightning,
    Lookahead,
    Net,
    Private,
    SharpnessAware,
    one_after_the_other,
)

import rnnguard
from rnnguard import request
from rnnguard.errors import RNNGuardError
from rnnguard.inspection import preflight, wrappers
from rnnguard.inspection.wrappers import Opened, opened
from rnnguard.probe.snapshot import fingerprint
from rnnguard.records import Change, Plan
from rnnguard.report.report import Report
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.stepguard import guard_of

STEPS = 12
X = torch.randn(6, STEPS, 3, generator=torch.Generator().manual_seed(0))
FAINT = 1e-3 * X

imports_old_torch = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def mend(model: nn.Module, optimizer: Optimizer | None = None, **options: Any) -> Report:
    given = {"inputs": FAINT, "memory": STEPS} | options
    return rnnguard.stabilize(model, optimizer or SGD(model.parameters(), lr=1.0), **given)


def reasons(work: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
    """All reasons of a refusal; nothing where the work went through."""
    try:
        work(*arguments, **options)
    except RNNGuardError as error:
        return [str(reason) for reason in error.reasons]
    except Exception as error:
        return [f"crashed with {type(error).__name__}"]
    return []


def only_reason(work: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    found = reasons(work, *arguments, **options)
    assert len(found) == 1, found
    return found[0]


def clip(max_norm: float) -> Plan:
    fields: Any = {"tier": "step", "path": None, "scenario": "a test", "why": ""}
    dose: Any = {"max_norm": max_norm}
    return Plan(changes=(Change(remedy="clip_gradient", dose=dose, **fields),))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moved_by(model: nn.Module, step: Callable[[], Any]) -> float:
    before = weights(model)
    step()
    return float((weights(model) - before).norm())


def backward(model: nn.Module) -> Tensor:
    model.zero_grad()
    loss: Tensor = 100 * model(X).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


# --- first implementations that fall into the traps --------------------------------------


def looks_at_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_weights_refused", lambda model: ())


def refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnnguard.pipeline.run_refusals", lambda model: ())


def takes_the_module_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """`model = getattr(model, "module", model)`, and on with it."""

    def inside(model: nn.Module) -> Opened:
        return Opened(opened(model).model, ())

    monkeypatch.setattr("rnnguard.request.opened", inside)


def looks_at_the_root_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "_within", lambda start, model: ())


def takes_the_optimizer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnnguard.request.stepping", lambda optimizer: optimizer)


def clips_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`clip_grad_norm_(model.parameters(), ...)` in the hook."""

    def hook_(self: Any, settings: Any) -> None:
        def before_step(*_: Any) -> None:
            if settings.max_norm is not None:
                nn.utils.clip_grad_norm_(self._model.parameters(), settings.max_norm)

        self._optimizer.register_step_pre_hook(before_step)

    monkeypatch.setattr(Edit, "hook_", hook_)


def asks_for_no_kind_of_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (preflight, request):
        monkeypatch.setattr(module, "optimizer_refusals", lambda model, optimizer: ())


def takes_all_wrappers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(wrappers._AROUND, "FullyShardedDataParallel", "_fsdp_wrapped_module")


def says_nothing_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnnguard.pipeline.about_growth", lambda growth: ())


def decides_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnnguard.pipeline.rank", lambda: 0)


# --- the traps ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@fooled_by(looks_at_no_weight)
def test_trap_21_lazy_and_meta_are_refused() -> None:
    lazy, meta = Net(), Net()
    lazy.head = nn.LazyLinear(2)
    meta.lstm = nn.LSTM(3, 4, batch_first=True, device="meta")
    optimizer = SGD(lazy.lstm.parameters())
    reason = only_reason(mend, lazy, optimizer)
    assert reason.startswith("`head.weight`: the parameter is lazy") and "(RG907)" in reason
    assert isinstance(lazy.head, nn.LazyLinear)
    reason = only_reason(mend, meta)
    assert "meta device" in reason and "`to_empty`" in reason


@imports_old_torch
@fooled_by(refuses_nothing)
def test_trap_22_a_script_module_is_refused() -> None:
    model = torch.jit.script(Net())
    reason = only_reason(mend, model)
    assert reason.endswith("Call rnnguard on the plain model, before torch.jit.script. (RG908)")


@imports_old_torch
@fooled_by(takes_the_module_inside)
def test_trap_23_a_compiled_module_keeps_values_and_structure() -> None:
    model = torch.compile(Net(), backend="eager")
    optimizer, before = SGD(model.parameters()), weights(model)
    report = mend(model, optimizer)
    assert torch.equal(weights(model), before) and guard_of(optimizer) is not None
    cure = "Call rnnguard on the plain model, before torch.compile. (RG909)"
    assert [str(reason) for reason in report.refusals] == [
        f"the module is compiled, so values and structure stay as they are. {cure}"
    ]
    assert reasons(mend, model, tiers=("values",))[0].endswith(cure)


@imports_old_torch
@pytest.mark.usefixtures("one_process")
@fooled_by(takes_the_optimizer_as_it_is)
def test_trap_52_wrapper_optimizers_are_opened_or_refused() -> None:
    for wrap in (Accelerated, Lightning, Private, Lookahead):
        model = Net()
        inner = SGD(model.parameters(), lr=1.0)
        outer: Any = wrap(inner)
        assert reasons(rnnguard.apply, model, outer, clip(0.1)) == []
        assert guard_of(inner) is not None
        backward(model)
        assert moved_by(model, outer.step) == pytest.approx(0.1, rel=1e-5)
    model = Net()
    sam = SharpnessAware(model.parameters(), lr=1.0, rho=1e-4)
    rnnguard.apply(model, sam, clip(0.1))
    backward(model)
    # Both of its passes belong to one step, which clips the gradient that it moves along.
    assert moved_by(model, lambda: sam.step(lambda: backward(model))) == pytest.approx(
        0.1, rel=1e-3
    )
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Net()
    zero = ZeroRedundancyOptimizer(model.parameters(), SGD, lr=1.0)
    report = mend(model, zero, tiers=("step",))
    assert report.changes == () and guard_of(zero.optim) is None
    assert [str(reason) for reason in report.refusals] == [
        "a ZeRO optimizer sees only the gradients of its own shard. "
        "Clip in the training loop, before `step`. (RG901)"
    ]


class Gan(nn.Module):
    """A generator of sequences, and a judge that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.LSTM(3, 3, batch_first=True)
        self.judge = Net()

    def forward(self, x: Tensor) -> Tensor:
        verdict: Tensor = self.judge(self.generator(x)[0])
        return verdict


@fooled_by(clips_the_whole_model)
def test_trap_54_only_the_given_optimizer_is_guarded() -> None:
    model = Gan()
    judging = SGD(model.judge.parameters(), lr=1.0)
    generating = SGD(model.generator.parameters(), lr=1.0)
    others = weights(model.generator)
    report = mend(model, judging)
    assert torch.equal(weights(model.generator), others)
    assert {change.path for change in report.changes} == {None, "judge.lstm"}
    assert guard_of(generating) is None
    rnnguard.apply(model, judging, clip(0.1))
    backward(model)
    theirs = [p.grad.clone() for p in model.generator.parameters() if p.grad is not None]
    assert moved_by(model.judge, judging.step) == pytest.approx(0.1, rel=1e-5)
    for p, gradient in zip(model.generator.parameters(), theirs, strict=True):
        assert p.grad is not None and torch.equal(p.grad, gradient)
    norm = float(nn.utils.get_total_norm(theirs))
    assert norm > 1.0
    assert moved_by(model.generator, generating.step) == pytest.approx(norm, rel=1e-5)


@pytest.mark.usefixtures("one_process")
@fooled_by(takes_the_module_inside)
def test_trap_65_ddp_outside_keeps_values_and_structure() -> None:
    model = DistributedDataParallel(Net())
    optimizer, before = SGD(model.parameters(), lr=1.0), weights(model)
    report = mend(model, optimizer)
    assert torch.equal(weights(model), before) and type(model.module.lstm) is nn.LSTM
    assert {change.tier for change in report.changes} == {"step"}
    (refusal,) = report.refusals
    assert refusal.code == "RG901" and "first stabilize, then wrap" in refusal.cure
    for tiers in (("values",), ("structure",), ("values", "structure")):
        assert [text[-7:] for text in reasons(mend, model, tiers=tiers)] == ["(RG901)"]
    rnnguard.apply(model, optimizer, clip(0.1))
    backward(model)
    assert moved_by(model, optimizer.step) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.usefixtures("one_process")
@fooled_by(looks_at_the_root_only)
def test_trap_66_ddp_nested_inside_keeps_them_too() -> None:
    model = nn.Sequential(DistributedDataParallel(Net()), nn.Linear(2, 2))
    optimizer, before = SGD(model.parameters(), lr=1.0), fingerprint(model)
    assert [text[-7:] for text in reasons(mend, model, tiers=("values",))] == ["(RG901)"]
    assert [text[:4] for text in reasons(rnnguard.audit, model, inputs=X)] == ["`0`:"]
    report = mend(model, optimizer)
    # Not even a look: it would tell the reducer of a backward pass that never comes.
    assert report.before.run.basis == "not run" and fingerprint(model) == before
    assert {change.tier for change in report.changes} == {"step"}
    backward(model)
    optimizer.step()


@pytest.mark.usefixtures("one_process")
@fooled_by(looks_at_the_root_only)
def test_trap_67_fsdp2_gets_the_step_tier_only() -> None:
    model, optimizer = sharded(Net())
    assert [text[-7:] for text in reasons(mend, model, optimizer, tiers=("values",))] == ["(RG901)"]
    before = own_part(model)
    report = mend(model, optimizer)
    assert report.before.run.basis == "not run" and guard_of(optimizer) is not None
    assert {change.tier for change in report.changes} == {"step"}
    assert torch.equal(own_part(model), before)
    rnnguard.apply(model, optimizer, clip(0.1))
    backward(model)
    optimizer.step()
    moved = float((own_part(model) - before).norm())
    assert moved == pytest.approx(0.1, rel=1e-5)


@pytest.mark.usefixtures("one_process")
@fooled_by(asks_for_no_kind_of_parameter)
def test_trap_68_sharded_and_plain_parameters_are_refused_in_the_plan() -> None:
    model = Net()
    _, _ = sharded(model.lstm)
    reason = only_reason(rnnguard.plan, model, SGD(model.parameters()), inputs=X)
    assert reason.startswith("`optimizer`: holds sharded and plain parameters")
    assert reason.endswith("give each kind an optimizer of its own. (RG925)")
    model = Net()
    early = SGD(model.parameters())
    sharded(model)
    reason = only_reason(rnnguard.plan, model, early, inputs=X)
    assert reason.endswith("makes new parameters: build the optimizer after it. (RG904)")


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.filterwarnings("ignore:The `NO_SHARD` sharding strategy:FutureWarning")
@pytest.mark.usefixtures("one_process")
@fooled_by(takes_all_wrappers_alike)
def test_trap_69_fsdp1_is_refused_with_its_own_clip() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    optimizer = SGD(model.parameters())
    for tiers in (("step",), ("step", "values", "structure")):
        reason = only_reason(mend, model, optimizer, tiers=tiers)
        assert "`fsdp_root.clip_grad_norm_(max_norm)`" in reason and "(RG901)" in reason
    assert guard_of(optimizer) is None


@fooled_by(says_nothing_of_copies)
def test_trap_70_copies_must_be_made_again() -> None:
    model = Net()
    copies = AveragedModel(model)
    report = mend(model)
    assert any(change.tier == "structure" for change in report.changes)
    assert len(list(copies.module.parameters())) < len(list(model.parameters()))
    told = [note for note in report.notes if "EMA copies (AveragedModel) again" in note]
    assert [note.startswith("Parameters were added at `lstm`") for note in told] == [True]
    report = mend(Net(), tiers=("step", "values"))
    assert report.changes and not any("again" in note for note in report.notes)
    reason = only_reason(mend, copies)
    assert "which no gradient trains. Stabilize the plain model that it averages" in reason


@fooled_by(decides_in_every_process)
def test_trap_71_ranks_agree_on_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(scale: float) -> Callable[[], tuple[Report, Tensor]]:
        def run() -> tuple[Report, Tensor]:
            torch.manual_seed(0)
            model = Net()
            report = mend(model, Adam(model.parameters()), inputs=scale * X)
            return report, weights(model)

        return run

    (first, theirs), (second, mine) = one_after_the_other(monkeypatch, process(1e-3), process(1.0))
    assert first.before["lstm"].input_rms != second.before["lstm"].input_rms
    assert "structure" in {change.tier for change in first.changes}
    assert second.plan == first.plan and second.changes == first.changes
    assert torch.equal(mine, theirs)


def own_part(model: nn.Module) -> Tensor:
    """A copy of what this process holds of all parameters."""
    parts: list[Any] = [p.detach() for p in model.parameters()]
    return torch.cat([part.to_local().flatten() for part in parts])


def sharded(model: nn.Module) -> tuple[Any, SGD]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model, SGD(model.parameters(), lr=1.0)
