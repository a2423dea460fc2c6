"""Every cell on every device: as near to double precision as torch's own, autocast included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cell_cases import CELLS, DEEP, F64, HIDDEN, IN, LENGTHS, flat, plain_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnguard.nn.sequences import rungs

STEPS, BATCH = 12, 4
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
every_cell = pytest.mark.parametrize("name", CELLS)
every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    """No TF32, which has 10 bits, and a seed."""
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(allow_tf32=False):
        kept = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        yield
        torch.set_float32_matmul_precision(kept)


def gradients(module: nn.RNNBase, x: Tensor, weights: Tensor) -> list[Tensor]:
    """The outputs and every gradient of one pass, in double precision on the CPU."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    output, state = module(x)
    (output * weights).sum().backward()
    found = [*flat(output), *flat(state), x.grad, *(p.grad for p in module.parameters())]
    return [tensor.detach().double().cpu() for tensor in found if tensor is not None]


def error(module: nn.RNNBase, x: Tensor, device: str) -> float:
    """The largest relative error (root mean square) of single precision on the device."""
    weights = torch.randn(STEPS, BATCH, HIDDEN * (2 if module.bidirectional else 1), dtype=F64)
    exact = gradients(module, x, weights)
    single = copy.deepcopy(module).to(device, torch.float32)
    found = gradients(single, x.float().to(device), weights.float().to(device))
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if b.norm() > 0]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@every_device
@every_cell
def test_single_precision_is_as_near_as_torchs_own(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = CELLS[name](IN, HIDDEN, dtype=F64, **DEEP).eval()
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    found = error(module, x, device)
    if name.startswith("layer norm"):
        # Torch has none of these; where a norm divides by little, any order of sums loses much.
        monkeypatch.setattr(rungs, "_followed_by_others", lambda: True)
        other = error(module, x, device)
    else:
        other = error(plain_of(module)(IN, HIDDEN, dtype=F64, **DEEP), x, device)
    assert found <= 4 * max(other, 2e-7)


@every_device
@every_cell
def test_the_fast_rung_runs_there(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    apply = rungs._Fast.apply

    def counted(*args: Any) -> Any:
        taken.append(args[2].device.type)
        return apply(*args)

    monkeypatch.setattr(rungs._Fast, "apply", counted)
    module = CELLS[name](IN, HIDDEN, **DEEP).to(device)
    output, _ = module(torch.randn(STEPS, BATCH, IN, device=device))
    output.sum().backward()
    assert taken == [device] * 4
    assert all(p.grad is not None and p.grad.device.type == device for p in module.parameters())


@every_device
@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_near(name: str, device: str, dtype: torch.dtype) -> None:
    module = CELLS[name](IN, HIDDEN, **DEEP).to(device).eval()
    x = torch.randn(STEPS, BATCH, IN, device=device)
    exact = module(x)[0]
    with torch.autocast(device, dtype):
        output, _ = module(x)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert float((output.float() - exact).detach().norm() / exact.norm().detach()) < 0.1


@every_device
@every_cell
def test_packed_sequences_there(name: str, device: str) -> None:
    module = CELLS[name](IN, HIDDEN, **DEEP).to(device).eval()
    padded = torch.randn(max(LENGTHS), len(LENGTHS), IN, device=device)
    output, state = module(pack_padded_sequence(padded, LENGTHS, enforce_sorted=False))
    rows = nn.utils.rnn.pad_packed_sequence(output)[0]
    for index, length in enumerate(LENGTHS):
        alone, last = module(padded[:length, index])
        assert torch.allclose(rows[:length, index], alone, atol=1e-5)
        for mine, other in zip(flat(state), flat(last), strict=True):
            assert torch.allclose(mine[:, index], other, atol=1e-5)
    torch.stack([part.sum() for part in flat((output, state))]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@every_device
@every_cell
def test_second_derivatives_there(name: str, device: str) -> None:
    module = CELLS[name](IN, HIDDEN, dtype=F64).to(device).eval()
    x = torch.randn(3, 2, IN, device=device, dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    step = torch.randn_like(x)
    step /= step.norm()
    moved = []
    for sign in (1, -1):
        at = (x + sign * 1e-5 * step).detach().requires_grad_()
        (found,) = torch.autograd.grad(module(at)[0].square().sum(), at)
        moved.append(float(found.square().sum()))
    expected = (moved[0] - moved[1]) / 2e-5
    assert float((second * step).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
