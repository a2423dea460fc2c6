"""Several processes that train together: one plan, one outcome, and training as in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from processes import together
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from wrapping import Net

import rnnguard
from rnnguard.errors import RNNGuardError
from rnnguard.probe.snapshot import fingerprint
from rnnguard.ranks import alike, rank, size, told
from rnnguard.records import Change, Plan
from rnnguard.rewrite.schedule import GuardSettings
from rnnguard.rewrite.stepguard import StepGuard, guard_of

STEPS, BATCH, UPDATES = 12, 8, 6


def a_run() -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = Net().double()
    return model, SGD(model.parameters(), lr=0.5, momentum=0.9)


def batches(seed: int, scale: float = 1e-3) -> list[tuple[Tensor, Tensor]]:
    """Input so faint that a norm is added behind the recurrence."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(BATCH, STEPS, 3, generator=generator, dtype=torch.float64)
        return scale * x, torch.randint(2, (BATCH,), generator=generator)

    return [draw() for _ in range(UPDATES)]


def stabilized(model: nn.Module, optimizer: Optimizer, data: Any, **options: Any) -> Any:
    given = {"loss": nn.CrossEntropyLoss(), "memory": STEPS} | options
    return rnnguard.stabilize(model, optimizer, data, **given)


def train(model: nn.Module, optimizer: Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def half(data: list[tuple[Tensor, Tensor]], number: int) -> list[tuple[Tensor, Tensor]]:
    return [(x.chunk(2)[number], y.chunk(2)[number]) for x, y in data]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def clip(max_norm: float) -> Plan:
    fields = {"tier": "step", "path": None, "scenario": "a test", "why": ""}
    dose = {"max_norm": max_norm}
    return Plan(changes=(Change(remedy="clip_gradient", dose=dose, **fields),))


def raised(work: Any, *arguments: Any, **options: Any) -> tuple[str, str]:
    """The error's class and words."""
    try:
        work(*arguments, **options)
    except RNNGuardError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


# --- what the processes do ---------------------------------------------------------------


def rewrite_wrap_train(number: int) -> dict[str, Any]:
    model, optimizer = a_run()
    report = stabilized(model, optimizer, batches(number))
    found = {
        "plan": report.plan.to_dict(),
        "changes": report.changes,
        "before": report.before["lstm"].output_rms,
        "after": report.after["lstm"].output_rms,
        "rewritten": weights(model),
    }
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, optimizer, half(batches(7, scale=1.0), number))
    return found | {"trained": weights(model)}


def agree(number: int) -> dict[str, Any]:
    """Plans, replayed plans, and failures of one process."""
    from rnnguard import mending

    model, optimizer = a_run()
    fresh = fingerprint(model, optimizer)
    given = {"loss": nn.CrossEntropyLoss(), "memory": STEPS}
    plan = rnnguard.plan(model, optimizer, batches(number), **given)
    found: dict[str, Any] = {"plan alone": plan.to_dict()}
    wide = [(x[..., : 3 - number], y) for x, y in batches(number)]
    found["bad data"] = raised(stabilized, model, optimizer, wide)
    found["talks"] = raised(stabilized, model, optimizer, batches(number), loss=talking)
    mine = mending.replay
    mending.replay = broken  # type: ignore[assignment]
    found["broken"] = raised(stabilized, model, optimizer, batches(number))
    mending.replay = mine
    found["untouched"] = fingerprint(model, optimizer) == fresh
    report = rnnguard.apply(model, optimizer, clip(0.25 * (1 + number)))
    guard = guard_of(optimizer)
    assert guard is not None
    return found | {"applied": report.plan.to_dict(), "max norm": guard.settings.max_norm}


def talking(output: Tensor, target: Tensor) -> Tensor:
    """A loss over the batches of all processes, of which some measure more often."""
    everywhere = [torch.empty_like(output) for _ in range(size())]
    torch.distributed.all_gather(everywhere, output.detach())
    return (output - torch.stack(everywhere).mean(0)).square().sum()


def broken(*_: Any) -> None:
    raise MemoryError("no room")


def on_wrapped(number: int) -> dict[str, Any]:
    """A look at a wrapped model in mid-training, and its guard."""
    data = half(batches(7, scale=1.0), number)
    seen = []
    for looks in (False, True):
        model, optimizer = a_run()
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        train(wrapped, optimizer, data[:2])
        if looks:
            audited = rnnguard.audit(
                wrapped, optimizer, data, loss=nn.CrossEntropyLoss(), memory=STEPS, trial=2
            )
            assert audited.before.run.trial_steps == 2
        train(wrapped, optimizer, data[2:])
        seen.append(weights(model))
    report = stabilized(wrapped, optimizer, data)
    guard = guard_of(optimizer)
    assert guard is not None
    same = all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    joined = nn.Sequential(Net(), nn.SyncBatchNorm(2)).double()
    unrun = stabilized(joined, SGD(joined.parameters()), data)
    return {
        "undisturbed": same,
        "max norm": guard.settings.max_norm,
        "tiers": {change.tier for change in report.changes},
        "refused": [reason.code for reason in report.refusals],
        "statistics over processes": unrun.before.run.basis,
    }


def sharded(number: int) -> list[dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = []
    for settings in SHARDED_GUARDS:
        model, _ = a_run()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
        report = stabilized(model, optimizer, batches(number))
        assert report.before.run.basis == "not run" and len(report.changes) == 2
        guard = guard_of(optimizer)
        assert guard is not None
        guard.settings = settings
        train(model, optimizer, half(LONGER, number))
        found.append({name: value.full_tensor() for name, value in weights(model).items()})
    return found


def everything(number: int) -> dict[str, Any]:
    """All in one go, since each new process has to import torch."""
    assert (rank(), size()) == (number, 2)
    found = rewrite_wrap_train(number) | agree(number)
    return found | {"wrapped": on_wrapped(number), "sharded": sharded(number)}


# The adaptive forms look at new norms every 16 steps only.
LONGER = 6 * batches(7, scale=1.0)
SHARDED_GUARDS = (
    GuardSettings(max_norm=0.1),
    GuardSettings(clip="percentile", percentile=50.0, window=2),
    GuardSettings(clip="value", max_value=0.01),
    GuardSettings(clip="group", max_norm=0.1, on_nonfinite="skip"),
    GuardSettings(clip="z_score", z_score=0.1, window=2),
)


# --- what must hold ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(everything, tmp_path_factory.mktemp("ranks"))


def test_different_data_give_one_plan(both: list[dict[str, Any]]) -> None:
    first, second = both
    assert first["before"] != second["before"] and first["after"] != second["after"]
    assert first["plan"] == second["plan"] and first["changes"] == second["changes"]
    assert first["plan alone"] == second["plan alone"] == first["plan"]
    assert {change.tier for change in second["changes"]} == {"step", "values", "structure"}
    assert same(first["rewritten"], second["rewritten"], 0.0)


def test_training_after_a_rewrite_equals_one_process(both: list[dict[str, Any]]) -> None:
    """New parameters of a norm too: unsynchronised, the two halves would drift apart."""
    model, optimizer = a_run()
    rnnguard.apply(model, optimizer, both[0]["plan"])
    train(model, optimizer, batches(7, scale=1.0))
    alone = weights(model)
    assert any("norm" in name for name in alone)
    assert same(both[0]["trained"], both[1]["trained"], 0.0)
    assert same(both[0]["trained"], alone, 1e-6)
    assert not same(both[0]["trained"], both[0]["rewritten"], 1e-3)


def test_what_one_process_refuses_all_refuse(both: list[dict[str, Any]]) -> None:
    kind, words = both[0]["bad data"]
    assert kind == "RefusedError" and "RG912" in words
    assert both[1]["bad data"] == (kind, words)


def test_a_loss_that_waits_for_others_is_refused(both: list[dict[str, Any]]) -> None:
    kind, words = both[0]["talks"]
    assert kind == "RefusedError" and both[1]["talks"] == (kind, words)
    assert words.startswith("the run talks to other processes (c10d.allgather_")
    assert words.endswith("replay its plan in all with `rnnguard.apply`. (RG912)")


def test_a_failure_of_one_process_restores_all(both: list[dict[str, Any]]) -> None:
    words = "process 1 raised MemoryError: no room. The model and optimizer were restored. (RG916)"
    assert both[0]["broken"] == ("RewriteError", words)
    assert both[1]["broken"][0] == "RewriteError" and "no room" in both[1]["broken"][1]
    assert both[0]["untouched"] and both[1]["untouched"]


def test_a_replayed_plan_is_that_of_process_0(both: list[dict[str, Any]]) -> None:
    assert [found["max norm"] for found in both] == [0.25, 0.25]
    assert both[0]["applied"] == both[1]["applied"]


def test_a_look_at_a_wrapped_model_leaves_its_reducer_alone(both: list[dict[str, Any]]) -> None:
    assert all(found["wrapped"]["undisturbed"] for found in both)


def test_a_wrapped_model_is_clipped_alike(both: list[dict[str, Any]]) -> None:
    first, second = (found["wrapped"] for found in both)
    assert first["max norm"] == second["max norm"] is not None
    for found in (first, second):
        assert found["tiers"] == {"step"} and found["refused"][0] == "RG901"


def test_statistics_over_processes_are_not_run(both: list[dict[str, Any]]) -> None:
    """Their forward would wait for a process that measures something else at that time."""
    bases = [found["wrapped"]["statistics over processes"] for found in both]
    assert bases == ["not run", "not run"]


def test_a_sharded_model_is_clipped_by_its_global_norm(both: list[dict[str, Any]]) -> None:
    for settings, *found in zip(SHARDED_GUARDS, *(b["sharded"] for b in both), strict=True):
        model, optimizer = a_run()
        free = copy.deepcopy(model)
        StepGuard(settings).install(optimizer)
        train(model, optimizer, LONGER)
        train(free, SGD(free.parameters(), lr=0.5, momentum=0.9), LONGER)
        assert same(found[0], found[1], 0.0) and same(found[0], weights(model), 1e-6)
        assert not same(weights(free), weights(model), 1e-3)


def test_alone_nothing_is_asked() -> None:
    assert (rank(), size(), told("word")) == (0, 1, "word")
    with pytest.raises(ValueError, match="own"), alike():
        raise ValueError("own")


def same(first: dict[str, Tensor], second: dict[str, Tensor], within: float) -> bool:
    assert first.keys() == second.keys()
    return all(float((first[name] - second[name]).abs().max()) <= within for name in first)
