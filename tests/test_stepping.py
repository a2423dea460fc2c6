"""Every cell tells its own step: what it computes, and the Jacobian of exactly that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cell_cases import BATCH, CELLS, F64, HIDDEN, IN, STEPS, build, carries_cell, close, states_of
from fused_cases import AT_WORK, KINDS, fused
from torch import Tensor, nn

from rnnguard.inspection.gates import GATES, cell_of
from rnnguard.inspection.sites import SiteInput
from rnnguard.probe import lyapunov_exponents, retention
from rnnguard.probe.snapshot import fingerprint
from rnnguard.probe.steps import Trajectory
from rnnguard.probe.trajectory import LayerTrajectory, trajectories

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

every_cell = pytest.mark.parametrize("name", CELLS)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep and both ways": {"num_layers": 2, "bidirectional": True},
    "without bias": {"num_layers": 2, "bias": False},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def runs_of(module: nn.RNNBase, x: Tensor) -> list[LayerTrajectory]:
    """The trajectories over x (T, B, F) from silence."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    hidden = x.new_zeros(count, x.shape[1], module.proj_size or module.hidden_size)
    cell = x.new_zeros(count, x.shape[1], module.hidden_size) if carries_cell(module) else None
    given = SiteInput(x, torch.full((x.shape[1],), len(x)), hidden, cell)
    return trajectories(module, given, sequences=x.shape[1], longest=len(x))


def output_of(runs: list[LayerTrajectory]) -> Tensor:
    """The last layer's outputs in the order of the input."""
    last = [run for run in runs if run.layer == runs[-1].layer]
    ways = [r.trajectory.outputs if r.direction == "forward" else r.trajectory.outputs.flip(0)
            for r in last]  # fmt: skip
    return torch.cat(ways, -1)


@every_cell
@every_form
def test_the_steps_told_are_those_of_the_forward(name: str, form: dict[str, Any]) -> None:
    module, x = build(name, **form), torch.randn(STEPS, BATCH, IN, dtype=F64)
    close(output_of(runs_of(module, x)), module(x)[0])


@pytest.mark.parametrize("name", [name for name in CELLS if name.endswith("lstm")])
def test_a_projection_is_part_of_the_step(name: str) -> None:
    module, x = build(name, proj_size=2, num_layers=2), torch.randn(STEPS, BATCH, IN, dtype=F64)
    runs = runs_of(module, x)
    close(output_of(runs), module(x)[0])
    assert runs[0].trajectory.state_size == 2 + HIDDEN


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", AT_WORK)
def test_what_stands_around_a_kernel_is_followed(kind: str, added: str) -> None:
    children = {k: v for k, v in AT_WORK[added].items() if k != "attention"}  # behind the output
    module = fused(kind, children, IN, IN, num_layers=2, bidirectional=True).double().eval()
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    expected = module(x)[0]
    runs, between = runs_of(module, x), module._modules.get("between")
    found = output_of(runs)
    if between is not None:
        found = between.joined(1, runs[-1].x.flip(0), found, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def state_at(trajectory: Trajectory, time: int) -> tuple[Tensor, ...]:
    return tuple(v[time] for n, v in trajectory.factors.items() if n.startswith("state"))


def jacobians(module: nn.RNNBase, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """(B, n, n) of a step of the module itself, by autograd, each sequence alone."""
    sizes = [s.shape[-1] for s in state]

    def stepped(joint: Tensor, row: int) -> Tensor:
        parts = tuple(part[None, None] for part in joint.split(sizes))
        _, last = module(x[None, row : row + 1], parts if len(parts) > 1 else parts[0])
        return torch.cat([s[0, 0] for s in states_of(last)])

    joint = torch.cat(state, -1)
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda s, r=row: stepped(s, r), joint[row])
         for row in range(len(joint))]
    )  # fmt: skip


@every_cell
def test_products_are_those_with_the_jacobian_of_a_step(name: str) -> None:
    module, x = build(name), torch.randn(STEPS, BATCH, IN, dtype=F64)
    (run,) = runs_of(module, x)
    trajectory = run.trajectory
    size = trajectory.state_size
    every = torch.eye(size, dtype=F64).expand(BATCH, -1, -1)
    for time in (0, STEPS // 2, STEPS - 1):
        factors = trajectory.factors_at(torch.full((BATCH,), time))
        expected = jacobians(module, x[time], state_at(trajectory, time))
        # Row k is J e_k, a column of J; transposed, a row.
        close(trajectory.push(every, factors).mT, expected)
        close(trajectory.pull(every, factors), expected)


@every_cell
def test_gates_are_those_that_make_the_state(name: str) -> None:
    module, x = build(name), torch.randn(STEPS, BATCH, IN, dtype=F64)
    trajectory = runs_of(module, x)[0].trajectory
    cell = cell_of(module)
    assert cell is not None
    assert set(trajectory.gates) == (set(GATES[cell].blocks) if GATES[cell].gated else set())
    if not trajectory.gates:
        return
    gates, states = (
        trajectory.gates,
        torch.stack([state_at(trajectory, t)[-1] for t in range(STEPS)]),
    )
    before, after = states[:-1], states[1:]
    if cell == "lstm":
        made = gates["f"][:-1] * before + gates["i"][:-1] * gates["g"][:-1]
    else:
        made = gates["z"][:-1] * before + (1 - gates["z"][:-1]) * gates["n"][:-1]
    kept = getattr(getattr(module, "zoneout", None), "cell" if cell == "lstm" else "hidden", 0.0)
    close(kept * before + (1 - kept) * made, after)


def switched_off(name: str) -> nn.RNNBase:
    off: dict[str, dict[str, Any]] = {
        "zoneout lstm": {"zoneout_hidden": 0.0, "zoneout_cell": 0.0},
        "zoneout gru": {"zoneout_hidden": 0.0},
        "bounded rnn": {"bound": float("inf"), "nonlinearity": "tanh", "activation": "tanh"},
    }
    module = build(name, num_layers=2, **off.get(name, {}))
    with torch.no_grad():
        for child in module.children():
            if hasattr(child, "active"):
                child.active = False
            if name == "residual rnn":
                child.carry.zero_()
                child.scale.fill_(1.0)
    return module


@pytest.mark.parametrize(
    "name", [n for n in CELLS if n not in ("indrnn", "gated rnn", "gate-last gru")]
)
def test_switched_off_it_reads_as_torchs_own(name: str) -> None:
    module = switched_off(name)
    plain = next(c for c in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, c))
    same = plain(IN, HIDDEN, num_layers=2, dtype=F64)
    held = {k: v for k, v in module.state_dict().items() if k in same.state_dict()}
    same.load_state_dict(held)
    x = torch.randn(30, BATCH, IN, dtype=F64)
    curves = [retention(m, x).curve.log10 for m in (module, same)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    spectra = [lyapunov_exponents(m, x, k=4, warmup=5).entries for m in (module, same)]
    mine, theirs = ([entry.value for entry in found] for found in spectra)
    assert mine == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("u", [0.5, 0.9])
def test_a_diagonal_recurrence_has_the_logarithm_of_its_entry(u: float) -> None:
    module = build("indrnn", activation="relu")
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.diag(torch.full((HIDDEN,), u, dtype=F64)))
        module.bias_ih_l0.fill_(40.0)  # every unit stays on
    found = lyapunov_exponents(module, torch.randn(20, BATCH, IN, dtype=F64), k=3, warmup=2)
    expected = float(torch.tensor(u, dtype=F64).log())
    assert [e.value for e in found.entries] == pytest.approx([expected] * 3, abs=1e-9)


@every_cell
def test_measuring_leaves_no_trace(name: str) -> None:
    module, x = build(name, num_layers=2).train(), torch.randn(STEPS, BATCH, IN, dtype=F64)
    before = fingerprint(module)  # the random state among it
    runs_of(module, x)
    retention(module, x)
    assert fingerprint(module) == before and module.training
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_half_precision_is_measured_in_single() -> None:
    module = build("layer norm lstm", dtype=torch.bfloat16)
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.bfloat16)
    (run,) = runs_of(module, x.float())
    assert run.trajectory.outputs.dtype == torch.float32
    assert module.weight_hh_l0.dtype == torch.bfloat16
