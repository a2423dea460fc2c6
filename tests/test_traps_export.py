"""Traps 27 and 28: transforms and tracing of a rewritten model.

Every test runs a second time against a plausible first implementation, and fails there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from naive import fooled_by
from rewritten import HIDDEN, IN, Net
from torch import Tensor, fx, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import layer_norm

import rnnguard
from rnnguard.nn import OutputNormLSTM

STEPS = 12


class LastStep(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, -1]


def stabilized() -> nn.Module:
    """A model that has been given a norm, by the one line that users write."""
    model = LastStep(nn.LSTM(IN, HIDDEN, batch_first=True))
    optimizer = torch.optim.Adam(model.parameters())
    rnnguard.stabilize(model, optimizer, inputs=1e-3 * torch.randn(6, STEPS, IN), memory=STEPS)
    assert type(model.rnn) is OutputNormLSTM
    return model


def norm_keeps_the_tensors_of_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        output, state = nn.LSTM.forward(self, input, hx)
        norm = vars(self).setdefault("_norm", dict(self.output_norm.named_parameters()))
        return layer_norm(output, (HIDDEN,), norm["weight"], norm["bias"], 1e-3), state

    monkeypatch.setattr(OutputNormLSTM, "forward", forward)


@fooled_by(norm_keeps_the_tensors_of_its_first_call)
def test_trap_27_functional_call_and_vmap_still_work() -> None:
    """Three norms and heads over one recurrence at once, and gradients at weights from outside."""
    model = stabilized().double()
    x = torch.randn(4, STEPS, IN, dtype=torch.float64)
    own = model(x)
    given = {n: v.detach() + torch.rand_like(v) for n, v in model.named_parameters()}
    # torch's kernels take no batch of weights, so that these are shared.
    shared = {n: v for n, v in given.items() if n.startswith("rnn.") and "_norm" not in n}
    drawn = {n: torch.randn(3, *v.shape).double() for n, v in given.items() if n not in shared}

    def loss(free: dict[str, Tensor]) -> Tensor:
        total: Tensor = functional_call(model, {**shared, **free}, (x,)).square().sum()
        return total

    got = vmap(grad_and_value(loss))(drawn)
    for index in range(3):
        free = {n: v[index].clone().requires_grad_() for n, v in drawn.items()}
        expected = by_hand({**shared, **free}, x).square().sum()
        expected.backward()
        torch.testing.assert_close(got[1][index], expected.detach())
        for name, value in free.items():
            torch.testing.assert_close(got[0][name][index], value.grad)
    assert torch.equal(model(x), own)


def by_hand(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """torch's LSTM, the norm of its last output, the head."""
    lstm = nn.LSTM(IN, HIDDEN, batch_first=True, dtype=x.dtype)
    for name, value in lstm.named_parameters():
        value.data = weights[f"rnn.{name}"]
    norm = (weights["rnn.output_norm.weight"], weights["rnn.output_norm.bias"])
    rows = layer_norm(lstm(x)[0][:, -1], (HIDDEN,), *norm, 1e-3)
    return rows @ weights["head.weight"].T + weights["head.bias"]


def knows_torchs_leaves_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rnnguard.nn.Tracer, "is_leaf_module", fx.Tracer.is_leaf_module)


@fooled_by(knows_torchs_leaves_only, fails_with=fx.proxy.TraceError)
def test_trap_28_fx_of_a_rewritten_model_by_rnnguards_tracer() -> None:
    model = stabilized()
    graph = rnnguard.nn.Tracer().trace(model)
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    assert calls == ["rnn", "head"]
    traced, x = fx.GraphModule(model, graph), torch.randn(2, STEPS + 5, IN)
    assert torch.equal(traced(x), model(x))
    assert traced.rnn is model.rnn
