"""torch's contract with children that do nothing, and with children that do."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from fused_cases import (
    AT_WORK,
    BATCH,
    FORMS,
    HIDDEN,
    IDLE,
    IN,
    KINDS,
    LENGTHS,
    STEPS,
    assert_same,
    fused,
    initial_state,
    plain_of,
    states,
)
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnguard
from rnnguard.errors import RefusedError, RNNGuardWarning
from rnnguard.nn.fused import FUSED

# torch says so once per process about its own projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

every_kind = pytest.mark.parametrize("kind", KINDS)
every_idle = pytest.mark.parametrize("idle", IDLE)
every_child = pytest.mark.parametrize("child", AT_WORK)


def idle_module(kind: str, idle: str, **options: Any) -> nn.RNNBase:
    module = FUSED[KINDS[kind]](IN, HIDDEN, **IDLE[idle], **options)
    assert isinstance(module, nn.RNNBase)
    return module


def assert_is_torchs(module: nn.RNNBase, *arguments: Any) -> None:
    """Bit for bit torch's own module, its random numbers for dropout included."""
    plain = plain_of(module)
    torch.manual_seed(3)
    expected = plain(*arguments)
    torch.manual_seed(3)
    assert_same(module(*arguments), expected)


@every_kind
@every_idle
@pytest.mark.parametrize("form", FORMS)
def test_idle_children_leave_torchs_module(kind: str, idle: str, form: str) -> None:
    module = idle_module(kind, idle, **FORMS[form])
    x = torch.randn(STEPS, BATCH, IN)
    assert_is_torchs(module, x)
    assert_is_torchs(module, x, initial_state(module, STEPS if module.batch_first else BATCH))
    assert_is_torchs(module, x[:, 0], initial_state(module))


@every_kind
@every_idle
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_idle_children_leave_the_dtype(kind: str, idle: str, dtype: torch.dtype) -> None:
    module = idle_module(kind, idle, num_layers=2, dtype=dtype)
    assert_is_torchs(module, torch.randn(STEPS, BATCH, IN, dtype=dtype))


@every_kind
@every_idle
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_idle_children_leave_packed_sequences(
    kind: str, idle: str, bidirectional: bool, enforce_sorted: bool
) -> None:
    module = idle_module(kind, idle, num_layers=2, bidirectional=bidirectional)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    x = torch.randn(STEPS, BATCH, IN)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    assert_is_torchs(module, packed)
    assert_is_torchs(module, packed, initial_state(module, BATCH))


@every_idle
def test_idle_children_leave_projections(idle: str) -> None:
    module = idle_module("lstm", idle, num_layers=2, proj_size=3, bidirectional=True)
    assert_is_torchs(module, torch.randn(STEPS, BATCH, IN), initial_state(module, BATCH))


@every_kind
@every_idle
def test_idle_children_leave_the_gradients(kind: str, idle: str) -> None:
    module = idle_module(kind, idle, num_layers=2, bidirectional=True)
    plain = plain_of(module)
    x = torch.randn(STEPS, BATCH, IN)
    for each in (module, plain):
        output, state = each(x)
        (output.square().sum() + sum(part.sum() for part in states(state))).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in module.named_parameters(recurse=False):
        torch.testing.assert_close(parameter.grad, theirs[name].grad)


@every_kind
@every_child
def test_every_child_changes_the_function(kind: str, child: str) -> None:
    module = fused(kind, AT_WORK[child], num_layers=2)
    x = torch.randn(STEPS, BATCH, IN)
    assert not torch.allclose(module(x)[0], plain_of(module)(x)[0], atol=1e-3)


@every_kind
@every_child
@pytest.mark.parametrize("form", [{"num_layers": 2}, {"num_layers": 2, "bidirectional": True}])
def test_packed_equals_each_sequence_alone(kind: str, child: str, form: dict[str, Any]) -> None:
    module = fused(kind, AT_WORK[child], batch_first=True, dtype=torch.float64, **form).eval()
    sequences = [torch.randn(length, IN, dtype=torch.float64) for length in LENGTHS]
    given = states(initial_state(module, BATCH))
    packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    output, state = module(packed, given if isinstance(module, nn.LSTM) else given[0])
    assert isinstance(output, PackedSequence)
    rows, found = pad_packed_sequence(output, batch_first=True)
    assert found.tolist() == LENGTHS
    for index, sequence in enumerate(sequences):
        own = tuple(part[:, index] for part in given)
        alone, last = module(sequence, own if isinstance(module, nn.LSTM) else own[0])
        torch.testing.assert_close(rows[index, : len(sequence)], alone)
        for mine, theirs in zip(states(state), states(last), strict=True):
            torch.testing.assert_close(mine[:, index], theirs)


@every_kind
@every_child
def test_batch_first_is_the_same_network(kind: str, child: str) -> None:
    first = fused(kind, AT_WORK[child], num_layers=2, batch_first=True).eval()
    second = fused(kind, AT_WORK[child], num_layers=2).eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(BATCH, STEPS, IN)
    (output, state), (expected, last) = first(x), second(x.transpose(0, 1))
    assert_same((output.transpose(0, 1), state), (expected, last))


@pytest.mark.parametrize("child", [name for name in AT_WORK if name != "highway"])
def test_gradients_are_right_to_the_second_order(child: str) -> None:
    module = fused("gru", AT_WORK[child], 2, 2, num_layers=2, dtype=torch.float64).eval()
    names = [name for name, _ in module.named_parameters()]
    inputs = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        output, state = functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return output, state

    slow = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    assert torch.autograd.gradcheck(run, (x, *inputs), atol=1e-6)
    with slow:
        assert torch.autograd.gradgradcheck(run, (x, *inputs), atol=1e-5, fast_mode=True)


@every_kind
@every_child
def test_copies_and_files_give_the_same(kind: str, child: str) -> None:
    module = fused(kind, AT_WORK[child], num_layers=2).eval()
    x = torch.randn(STEPS, BATCH, IN)
    expected = module(x)
    assert_same(copy.deepcopy(module)(x), expected)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = fused(kind, AT_WORK[child], num_layers=2).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(other(x), expected, rtol=1e-5, atol=1e-5)


@every_kind
@every_child
def test_functional_call_uses_the_given_weights(kind: str, child: str) -> None:
    module = fused(kind, AT_WORK[child], num_layers=2).eval()
    other = fused(kind, AT_WORK[child], num_layers=2).eval()
    x = torch.randn(STEPS, BATCH, IN)
    before = module(x)
    assert_same(functional_call(module, dict(other.named_parameters()), (x,)), other(x))
    assert_same(module(x), before)


@every_child
@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
def test_can_be_exported(child: str) -> None:
    module = fused("lstm", AT_WORK[child], num_layers=2, bidirectional=True).eval()
    x = torch.randn(STEPS, BATCH, IN)
    program = torch.export.export(module, (x,))
    assert_same(program.module()(x), module(x), rtol=1e-4, atol=1e-4)


@every_kind
@every_child
def test_autocast_gives_nearly_the_same(kind: str, child: str) -> None:
    module = fused(kind, AT_WORK[child], num_layers=2).eval()
    x = torch.randn(STEPS, BATCH, IN)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x)
    output.float().sum().backward()
    torch.testing.assert_close(output.float(), module(x)[0], atol=0.1, rtol=0.1)
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)


@every_kind
@every_child
def test_trains_in_half_precision(kind: str, child: str) -> None:
    module = fused(kind, AT_WORK[child], num_layers=2, dtype=torch.bfloat16)
    output, _ = module(torch.randn(STEPS, BATCH, IN, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all())
        for name, p in module.named_parameters()
        if not name.startswith("weight_hh") or p.grad is not None
    )


# Those without parameters, and the one whose parameters follow from the plain weights.
FROM_PLAIN = {"residual", "weight norm", "orthogonal", "spectral bound"}


@every_child
def test_a_plain_checkpoint(child: str) -> None:
    """Loads where it says all that the children need; else torch's error and its cause."""
    plain = nn.LSTM(IN, HIDDEN, 2)
    module = fused("lstm", AT_WORK[child], num_layers=2)
    if child in FROM_PLAIN:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module.load_state_dict(plain.state_dict())
    else:
        older = pytest.warns(RNNGuardWarning, match="from before the rewrite")
        with older, pytest.raises(RuntimeError, match="Missing key"):
            module.load_state_dict(plain.state_dict())
        with older:
            module.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in plain.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict(module.state_dict())


@every_kind
def test_a_morph_keeps_the_parameters(kind: str) -> None:
    module = KINDS[kind](IN, HIDDEN, 2)
    before = dict(module.named_parameters())
    module.__class__ = FUSED[KINDS[kind]]
    x = torch.randn(STEPS, BATCH, IN)
    assert_is_torchs(module, x)
    for name, make in AT_WORK["all"].items():
        module.add_module(name, make(module))
    assert all(module.get_parameter(name) is parameter for name, parameter in before.items())
    assert module(x)[0].shape == (STEPS, BATCH, HIDDEN)


@every_kind
def test_resetting_draws_torchs_parameters_as_torch_does(kind: str) -> None:
    module = fused(kind, AT_WORK["all"], num_layers=2)
    plain = plain_of(module)
    for each in (module, plain):
        torch.manual_seed(5)
        each.reset_parameters()
    for name, parameter in plain.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter)
    assert not bool(module.attention.write[0].weight.any())
    assert torch.equal(module.between.norms["0"].weight, torch.ones(HIDDEN))


@pytest.mark.parametrize(
    ("shape", "hidden"),
    [((STEPS,), None), ((STEPS, BATCH, IN + 1), None), ((STEPS, BATCH, IN), (1, BATCH, 3)),
     ((STEPS, BATCH, IN), (2, 3, HIDDEN)), ((STEPS, BATCH, IN), (2, HIDDEN)),
     ((STEPS, IN), (2, 1, HIDDEN))],
)  # fmt: skip
@every_kind
def test_wrong_sizes_raise_what_torch_raises(
    kind: str, shape: tuple[int, ...], hidden: tuple[int, ...] | None
) -> None:
    module = idle_module(kind, "between", num_layers=2)
    hx: Any = None if hidden is None else torch.zeros(hidden)
    if hx is not None and kind == "lstm":
        hx = (hx, hx)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        plain_of(module)(torch.zeros(shape), hx)
    with pytest.raises(type(theirs.value)):
        module(torch.zeros(shape), hx)


def test_baking_tells_of_the_module_and_not_of_its_parts() -> None:
    model = nn.Sequential(fused("lstm", AT_WORK["all"], num_layers=2))
    with pytest.warns(RNNGuardWarning, match="works around each call of its kernel"):
        baked = rnnguard.bake(model)
    assert [refusal.path for refusal in baked.refusals] == ["0"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_is_refused_with_the_cure() -> None:
    with pytest.raises(RefusedError, match="cannot compile this FusedLSTM"):
        torch.jit.script(idle_module("lstm", "between"))
