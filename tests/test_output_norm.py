"""The norm after the recurrence: torch's own contract, then LayerNorm over each step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnguard.errors import RNNGuardWarning
from rnnguard.nn import OutputNormGRU, OutputNormLSTM, OutputNormRNN
from rnnguard.nn.output_norm import EPSILON, OUTPUT_NORMS, output_norm, output_width

# torch says so once per process about its own projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

IN, HIDDEN, STEPS, BATCH = 5, 6, 9, 4

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "deep and bidirectional": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
    "batch first": {"batch_first": True},
}
KINDS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_form = pytest.mark.parametrize("form", FORMS)


def morphed(module: nn.RNNBase) -> nn.RNNBase:
    """The module as the class morph leaves it, its norm drawn so that it is not plain."""
    norm = output_norm(output_width(module)).to(next(module.parameters()).dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    module.__class__ = OUTPUT_NORMS[type(module)]
    module.add_module("output_norm", norm)
    return module


def normed(module: nn.RNNBase, output: Tensor) -> Tensor:
    norm = module.output_norm
    return layer_norm(output, (output.shape[-1],), norm.weight, norm.bias, EPSILON)


def states(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def assert_is_torchs_with_a_norm(module: nn.RNNBase, *arguments: Any) -> None:
    """The output is the norm of torch's, bit for bit, and the states are torch's own."""
    output, state = module(*arguments)
    morphed(module)
    got, got_state = module(*arguments)
    assert torch.equal(got, normed(module, output))
    assert not torch.equal(got, output)
    for mine, theirs in zip(states(got_state), states(state), strict=True):
        assert torch.equal(mine, theirs)


def initial_state(module: nn.RNNBase, *batch: int) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    hidden = torch.randn(count, *batch, module.proj_size or module.hidden_size)
    if not isinstance(module, nn.LSTM):
        return hidden
    return hidden, torch.randn(count, *batch, module.hidden_size)


@every_kind
@every_form
def test_is_the_norm_of_torchs_output(kind: str, form: str) -> None:
    module = KINDS[kind](IN, HIDDEN, **FORMS[form])
    assert_is_torchs_with_a_norm(module, torch.randn(STEPS, BATCH, IN))


@every_kind
def test_a_given_state_is_used(kind: str) -> None:
    module = KINDS[kind](IN, HIDDEN, num_layers=2)
    assert_is_torchs_with_a_norm(
        module, torch.randn(STEPS, BATCH, IN), initial_state(module, BATCH)
    )


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_the_dtype(kind: str, dtype: torch.dtype) -> None:
    module = KINDS[kind](IN, HIDDEN, dtype=dtype)
    assert_is_torchs_with_a_norm(module, torch.randn(STEPS, BATCH, IN, dtype=dtype))
    assert module(torch.randn(STEPS, BATCH, IN, dtype=dtype))[0].dtype == dtype


@every_kind
def test_one_sequence_without_a_batch(kind: str) -> None:
    module = KINDS[kind](IN, HIDDEN, num_layers=2)
    assert_is_torchs_with_a_norm(module, torch.randn(STEPS, IN), initial_state(module))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projected(bidirectional: bool) -> None:
    module = nn.LSTM(IN, HIDDEN, proj_size=2, bidirectional=bidirectional)
    assert output_width(module) == (4 if bidirectional else 2)
    assert_is_torchs_with_a_norm(module, torch.randn(STEPS, BATCH, IN))


@every_kind
def test_batch_first_is_the_same_network(kind: str) -> None:
    first = morphed(KINDS[kind](IN, HIDDEN, batch_first=True))
    second = morphed(KINDS[kind](IN, HIDDEN))
    second.load_state_dict(first.state_dict())
    x = torch.randn(BATCH, STEPS, IN)
    torch.testing.assert_close(first(x)[0], second(x.transpose(0, 1))[0].transpose(0, 1))


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", [{}, {"num_layers": 2, "bidirectional": True}])
def test_packed_equals_each_sequence_alone(
    kind: str, batch_first: bool, form: dict[str, Any]
) -> None:
    module = morphed(KINDS[kind](IN, HIDDEN, batch_first=batch_first, **form))
    lengths = [3, STEPS, 1, 5]
    sequences = [torch.randn(length, IN) for length in lengths]
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=batch_first)
    packed = pack_padded_sequence(padded, lengths, batch_first, enforce_sorted=False)
    output, state = module(packed)
    assert isinstance(output, PackedSequence)
    rows, found = pad_packed_sequence(output, batch_first=True)
    assert found.tolist() == lengths
    for index, sequence in enumerate(sequences):
        alone, last = module(sequence)
        torch.testing.assert_close(rows[index, : len(sequence)], alone)
        for mine, theirs in zip(states(state), states(last), strict=True):
            torch.testing.assert_close(mine[:, index], theirs)


def test_packed_output_keeps_its_order_and_is_normed_bit_for_bit() -> None:
    module = nn.LSTM(IN, HIDDEN)
    packed = pack_padded_sequence(torch.randn(5, 3, IN), [2, 5, 4], enforce_sorted=False)
    plain = module(packed)[0]
    output = morphed(module)(packed)[0]
    assert torch.equal(output.data, normed(module, plain.data))
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, name), getattr(plain, name))


@every_kind
def test_silent_input_passes_a_bounded_gradient(kind: str) -> None:
    """Without biases every output is 0, where a norm without epsilon would divide by zero."""
    module = KINDS[kind](IN, HIDDEN, bias=False)
    x = torch.zeros(STEPS, BATCH, IN, requires_grad=True)
    plain, _ = module(x)
    weights = torch.randn_like(plain)
    # At zero variance the norm centres and divides by sqrt(eps), which is all it may add.
    centred = (weights - weights.mean(-1, keepdim=True)) / EPSILON**0.5
    (expected,) = torch.autograd.grad((plain * centred).sum(), x)
    module = morphed(module)
    nn.init.ones_(module.output_norm.weight)
    nn.init.zeros_(module.output_norm.bias)
    output, _ = module(x)
    assert torch.equal(output, torch.zeros_like(output))
    (gradient,) = torch.autograd.grad((output * weights).sum(), x)
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-2, 1.0, 1e3])
def test_the_norm_never_magnifies_beyond_its_epsilon(scale: float) -> None:
    """The largest singular value of its Jacobian is at most 1 / sqrt(eps)."""
    norm = output_norm(HIDDEN).double()
    row = scale * torch.randn(HIDDEN, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(norm, row)
    gain = float(torch.linalg.matrix_norm(jacobian, 2))
    assert 0 < gain <= EPSILON**-0.5 * (1 + 1e-9)
    if scale == 0:
        assert gain == pytest.approx(EPSILON**-0.5)


@every_kind
def test_a_plain_checkpoint_lacks_the_norms_keys_only(kind: str) -> None:
    plain = KINDS[kind](IN, HIDDEN, num_layers=2)
    module = morphed(KINDS[kind](IN, HIDDEN, num_layers=2))
    kept = module.output_norm.weight.detach().clone()
    older = pytest.warns(RNNGuardWarning, match="from before the rewrite")
    with older, pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(plain.state_dict())
    with older:
        result = module.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == ["output_norm.weight", "output_norm.bias"]
    assert result.unexpected_keys == []
    assert torch.equal(module.output_norm.weight, kept)
    x = torch.randn(STEPS, BATCH, IN)
    assert torch.equal(module(x)[0], normed(module, plain(x)[0]))


def test_a_normed_checkpoint_has_more_than_a_plain_module_takes() -> None:
    state = morphed(nn.GRU(IN, HIDDEN)).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        nn.GRU(IN, HIDDEN).load_state_dict(state)


@every_kind
def test_functional_call_uses_the_given_weights(kind: str) -> None:
    module = morphed(KINDS[kind](IN, HIDDEN))
    x = torch.randn(STEPS, BATCH, IN)
    given = {name: torch.randn_like(value) for name, value in module.named_parameters()}
    before, _ = module(x)
    got, _ = functional_call(module, given, (x,))
    other = morphed(KINDS[kind](IN, HIDDEN))
    other.load_state_dict(given)
    assert torch.equal(got, other(x)[0])
    assert torch.equal(module(x)[0], before)


@every_kind
@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
def test_can_be_exported(kind: str) -> None:
    """For the number of steps that it was exported at, like torch's own modules."""
    module = morphed(KINDS[kind](IN, HIDDEN, batch_first=True)).eval()
    x = torch.randn(BATCH, STEPS, IN)
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x)[0], module(x)[0])
    assert set(program.state_dict) == set(module.state_dict())


@pytest.mark.parametrize(
    ("plain", "cls"),
    [(nn.RNN, OutputNormRNN), (nn.LSTM, OutputNormLSTM), (nn.GRU, OutputNormGRU)],
)
def test_each_kind_has_its_class(plain: type[nn.Module], cls: type[nn.Module]) -> None:
    assert OUTPUT_NORMS[plain] is cls
    assert issubclass(cls, plain)


@pytest.mark.parametrize("kind", list(KINDS))
def test_can_be_built_like_torchs_own(kind: str) -> None:
    built = OUTPUT_NORMS[KINDS[kind]](IN, HIDDEN, bidirectional=True, dtype=torch.float64)
    assert {p.dtype for p in built.parameters()} == {torch.float64}
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    assert built(x)[0].shape == (STEPS, BATCH, 2 * HIDDEN)


@pytest.mark.parametrize("kind", list(OUTPUT_NORMS.values()))
def test_a_reset_leaves_a_plain_norm(kind: type[nn.RNNBase]) -> None:
    module = kind(3, 4)
    before = module.weight_hh_l0.detach().clone()
    with torch.no_grad():
        module.output_norm.weight.fill_(7.0)
        module.output_norm.bias.fill_(7.0)
    module.reset_parameters()
    assert not torch.equal(module.weight_hh_l0, before)
    assert module.output_norm.weight.eq(1).all() and module.output_norm.bias.eq(0).all()
