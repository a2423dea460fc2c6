"""Traps 31 to 33: how initial values are drawn.

Every test runs a second time against a plausible first implementation, and fails there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from naive import FAILED, fooled_by
from torch import Tensor, nn
from torch.optim import Adam

import rnnguard
from rnnguard.errors import RNNGuardError
from rnnguard.remedies.chrono_bias import CHRONO_BIAS
from rnnguard.remedies.orthogonal import ORTHOGONAL
from rnnguard.remedies.remedy import Remedy, each_weights
from rnnguard.report.report import Report
from rnnguard.rewrite.edit import Edit

IN, HIDDEN, STEPS, BATCH = 4, 8, 12, 6
WIDE = 16  # rounded to half precision, fewer values do not show that they are untrained
CELLS: dict[str, tuple[Callable[..., nn.RNNBase], int]] = {
    "lstm": (nn.LSTM, 4),
    "gru": (nn.GRU, 3),
}


CHANGE = {"remedy": "orthogonal", "path": "rnn", "tier": "values", "scenario": "a test", "why": ""}
PLAN = {"changes": [CHANGE | {"dose": {"gain": 1.0, "seed": 7}}]}


class Net(nn.Module):
    """A recurrence whose last step a head reads."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def noise() -> Tensor:
    return torch.randn(BATCH, STEPS, IN, generator=torch.Generator().manual_seed(1))


def row(folder: Path, remedy: str, dose: str) -> str:
    """A rule folder that gives every gated recurrence this remedy."""
    text = (
        'schema = 1\n[[scenario]]\nid = "own"\nwhy = "A test."\nrefs = ["a test"]\n'
        f'when = {{ cell = ["lstm", "gru"] }}\napply = ["{remedy}"]\n'
        f"dose = {{ {remedy} = {dose} }}\n"
    )
    (folder / "scenarios.toml").write_text(text, encoding="utf-8")
    return str(folder)


def mend(model: nn.Module, **options: Any) -> Report:
    optimizer = Adam(model.parameters())
    given = {"inputs": noise(), "memory": STEPS, "tiers": ("values",)} | options
    return rnnguard.stabilize(model, optimizer, **given)


def applied(report: Report) -> set[str]:
    return {change.remedy for change in report.changes if change.outcome == "applied"}


def instead(remedy: Remedy, apply: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setitem(vars(remedy), "apply", apply)


def whole_stack(edit: Edit, module: nn.Module, dose: Any) -> None:
    """One orthogonal draw for all gates together."""
    for weights in each_weights(module):
        fresh = torch.empty(weights.hh.shape)
        generator = torch.Generator().manual_seed(int(dose["seed"]))
        nn.init.orthogonal_(fresh, float(dose["gain"]), generator=generator)
        edit.write_(weights.hh, fresh)


@fooled_by(instead(ORTHOGONAL, whole_stack))
@pytest.mark.parametrize("cell", CELLS)
def test_trap_31_each_gate_is_orthogonal_by_itself(cell: str) -> None:
    build, gates = CELLS[cell]
    model = Net(build(IN, HIDDEN, num_layers=2, batch_first=True, bias=False))
    assert applied(rnnguard.apply(model, Adam(model.parameters()), PLAN)) == {"orthogonal"}
    for weight in (model.rnn.weight_hh_l0, model.rnn.weight_hh_l1):
        blocks = weight.detach().double().view(gates, HIDDEN, HIDDEN)
        identity = torch.eye(HIDDEN, dtype=torch.float64).expand(gates, -1, -1)
        torch.testing.assert_close(blocks @ blocks.mT, identity, rtol=0, atol=1e-5)
        # Of one stack of independent draws, no gate is another's copy.
        assert float((blocks[0] - blocks[1]).abs().max()) > 0.1


def in_its_own_dtype(edit: Edit, module: nn.Module, dose: Any) -> None:
    """Drawn gate by gate, but in the dtype of the weights."""
    generator = torch.Generator().manual_seed(int(dose["seed"]))
    for weights in each_weights(module):
        blocks = weights.hh.detach().clone().split(weights.hidden_size)
        for block in blocks:
            nn.init.orthogonal_(block, float(dose["gain"]), generator=generator)
        edit.write_(weights.hh, torch.cat(blocks))


@fooled_by(instead(ORTHOGONAL, in_its_own_dtype), fails_with=(*FAILED, RNNGuardError))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap_32_half_precision_is_drawn_in_full(dtype: torch.dtype) -> None:
    """Bit for bit the double-precision draw of the same seed, rounded once."""
    half = Net(nn.LSTM(IN, WIDE, batch_first=True, bias=False)).to(dtype)
    full = Net(nn.LSTM(IN, WIDE, batch_first=True, bias=False)).double()
    for model in (half, full):
        assert applied(rnnguard.apply(model, Adam(model.parameters()), PLAN)) == {"orthogonal"}
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert torch.equal(half.rnn.weight_hh_l0, full.rnn.weight_hh_l0.to(dtype))


def drawn_globally(edit: Edit, module: nn.Module, dose: Any) -> None:
    for weights in each_weights(module):
        fresh = torch.empty(weights.hh.shape)
        for block in fresh.split(HIDDEN):
            nn.init.orthogonal_(block)
        edit.write_(weights.hh, fresh)


def numpy_drawn(edit: Edit, module: nn.Module, dose: Any) -> None:
    for weights in each_weights(module):
        assert weights.bias_ih is not None
        keep = numpy.log(numpy.random.uniform(1, dose["t_max"] - 1, HIDDEN))
        fresh = torch.zeros_like(weights.bias_ih)
        fresh[HIDDEN : 2 * HIDDEN] = torch.from_numpy(keep)
        edit.write_(weights.bias_ih, fresh)


def draws_globally(monkeypatch: pytest.MonkeyPatch) -> None:
    instead(ORTHOGONAL, drawn_globally)(monkeypatch)
    instead(CHRONO_BIAS, numpy_drawn)(monkeypatch)


@fooled_by(draws_globally)
@pytest.mark.parametrize(
    ("remedy", "dose"),
    [("orthogonal", "{ gain = 1.0 }"), ("chrono_bias", '{ t_max = "memory_needed" }')],
)
def test_trap_33_global_random_state_is_unchanged(tmp_path: Path, remedy: str, dose: str) -> None:
    """What the user draws next is as if rnnguard had not been there; the same seed repeats."""
    rules = row(tmp_path, remedy, dose)
    kinds = {"bias": remedy == "chrono_bias", "dropout": 0.5, "num_layers": 2}
    first, second = (Net(nn.GRU(IN, HIDDEN, batch_first=True, **kinds)) for _ in range(2))
    second.load_state_dict(first.state_dict())

    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), repr(numpy.random.get_state()), random.getstate()

    before = state()
    assert remedy in applied(mend(first, rules=rules, seed=3))
    assert state() == before
    torch.rand(5)
    assert remedy in applied(mend(second, rules=rules, seed=3))
    same = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
