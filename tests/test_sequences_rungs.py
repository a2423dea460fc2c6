"""The fast rung is never silently wrong: it is right, goes to rung 0, or raises."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from sequence_cases import CASES, Case, Size, rung
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rnnguard.nn.sequences.lstm import lstm_sequence
from rnnguard.nn.sequences.parts import LSTMWeights

# One of each function; the others differ in what is given, not in how they stand in autograd.
SOME = ("lstm normed", "gru normed", "rnn residual", "diagonal tanh", "gated", "gate last")
EACH = pytest.mark.parametrize("name", SOME)


def gradients(case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(case(*case.tensors)[0].square().sum(), case.tensors)


def of_x(case: Case) -> Callable[[Tensor], Tensor]:
    return lambda x: case(x, *(tensor.detach() for tensor in case.tensors[1:]))[0]


@EACH
def test_an_output_may_be_changed_in_place_as_by_a_relu_behind(name: str) -> None:
    case = CASES[name](Size())
    expected = torch.autograd.grad(case(*case.tensors)[0].relu().sum(), case.tensors)
    y = case(*case.tensors)[0].transpose(0, 1).relu_()
    for one, other in zip(torch.autograd.grad(y.sum(), case.tensors), expected, strict=True):
        torch.testing.assert_close(one, other)


@EACH
def test_a_weight_changed_before_the_backward_is_an_error(name: str) -> None:
    case = CASES[name](Size())
    y = case(*case.tensors)[0]
    with torch.no_grad():
        case.tensors[2].mul_(2)
        case.tensors[3].mul_(2)
    if name == "gated":  # works on its own stacked copy
        assert torch.autograd.grad(y.sum(), case.tensors)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EACH
def test_the_last_states_may_be_changed(name: str) -> None:
    case = CASES[name](Size())
    y, *last = case(*case.tensors)
    expected = torch.autograd.grad(y.sum(), case.tensors, retain_graph=True)
    for state in last:
        state.detach().zero_()
    for one, other in zip(torch.autograd.grad(y.sum(), case.tensors), expected, strict=True):
        assert torch.equal(one, other)


@EACH
def test_backward_twice_gives_the_same(name: str) -> None:
    case = CASES[name](Size(steps=40))
    y = case(*case.tensors)[0].square().sum()
    first = torch.autograd.grad(y, case.tensors, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y, case.tensors), strict=True):
        assert torch.equal(one, other)


# torch's own import of its decompositions says so, once.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@EACH
def test_transforms_agree_with_rung_1(name: str) -> None:
    case = CASES[name](Size())
    run, x = of_x(case), case.tensors[0]
    (expected,) = torch.autograd.grad(run(x).sum(), x)
    many = torch.stack((x, 2 * x)).detach()
    found = torch.vmap(run)(many)
    torch.testing.assert_close(found[1], run(many[1]))
    torch.testing.assert_close(torch.func.grad(lambda x: run(x).sum())(x.detach()), expected)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(run, (x.detach(),), (direction,))
    torch.testing.assert_close(tangent.sum(), (expected * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
        again = torch.autograd.forward_ad.unpack_dual(run(dual)).tangent
    torch.testing.assert_close(again, tangent)


@EACH
def test_batched_cotangents_agree_with_single_ones(name: str) -> None:
    case = CASES[name](Size())
    y = case(*case.tensors)[0]
    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)
    found = torch.autograd.grad(
        y, case.tensors, cotangents, is_grads_batched=True, retain_graph=True
    )
    expected = torch.autograd.grad(y, case.tensors, cotangents[1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[1], other)


@EACH
def test_checkpoint_anomaly_and_saved_elsewhere(name: str) -> None:
    case = CASES[name](Size())
    run, x = of_x(case), case.tensors[0]
    (expected,) = torch.autograd.grad(run(x).sum(), x)
    y = checkpoint(run, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = run(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        assert torch.equal(torch.autograd.grad(run(x).sum(), x)[0], expected)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ih, self.hh = (nn.Parameter(torch.randn(12, width)) for width in (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[1], 3)
        return lstm_sequence(x, state, state, LSTMWeights(self.ih, self.hh))[0]


def test_export_and_compile_follow_plain_operations() -> None:
    layer, x = _Layer(), torch.randn(4, 2, 2)
    expected = layer(x)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_make_fx_follows_plain_operations() -> None:
    layer, x = _Layer(), torch.randn(4, 2, 2, requires_grad=True)
    traced = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    torch.testing.assert_close(traced(2 * x), layer(2 * x))


def test_nothing_is_kept_without_gradients() -> None:
    case = CASES["lstm normed"](Size())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), rung(1):
            y = case(*case.tensors)[0]
            assert y.grad_fn is None and not y.requires_grad
            y.mul_(2)  # and so this is allowed


def test_the_graph_holds_no_cycle() -> None:
    case = CASES["gru"](Size())
    y = case(*case.tensors)[0]
    gone = weakref.ref(y.grad_fn)
    y.sum().backward()
    del y
    assert gone() is None


def test_two_threads_do_not_meet() -> None:
    case = CASES["lstm normed"](Size(steps=40, hidden=8))
    expected, found = gradients(case), {}

    def work(name: int) -> None:
        for _ in range(5):
            found[name] = gradients(case)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in range(2):
        assert all(torch.equal(a, b) for a, b in zip(found[name], expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_written(name: str, nan_memory: None) -> None:
    """In deterministic mode torch.empty gives NaN, and every operation used has such a form."""
    assert all(bool(found.isfinite().all()) for found in gradients(CASES[name](Size(steps=4))))
