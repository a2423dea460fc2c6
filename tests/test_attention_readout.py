"""Attention over the past against plain softmax, and what may depend on what."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from fused_cases import BATCH, HIDDEN, IN, KINDS, LENGTHS, STEPS, assert_same, fused, plain_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnguard.nn import attention_readout
from rnnguard.nn.attention_readout import AttentionReadout
from rnnguard.nn.fused import FUSED, FusedLSTM

# torch says so once per process about its own projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
every_kind = pytest.mark.parametrize("kind", KINDS)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
}
every_form = pytest.mark.parametrize("form", FORMS)


def by_hand(readout: AttentionReadout, way: int, rows: Tensor) -> Tensor:
    """rows (T, n) of one sequence, in the order read: a loop over steps and heads."""
    read, write = readout.read[way].weight, readout.write[way].weight
    query, key, value = (rows @ part.T for part in read.chunk(3))
    width = query.shape[-1] // readout.heads
    seen = []
    for t in range(len(rows)):
        parts = []
        for head in range(readout.heads):
            own = slice(head * width, (head + 1) * width)
            scores = key[: t + 1, own] @ query[t, own] / math.sqrt(width)
            parts.append(scores.softmax(0) @ value[: t + 1, own])
        seen.append(torch.cat(parts))
    return rows + torch.stack(seen) @ write.T


def expected(module: nn.RNNBase, x: Tensor) -> Tensor:
    """The output for one sequence x (T, F)."""
    rows, _ = plain_of(module)(x)
    if not module.bidirectional:
        return by_hand(module.attention, 0, rows)
    forward, reverse = rows.chunk(2, -1)
    turned = by_hand(module.attention, 1, reverse.flip(0)).flip(0)
    return torch.cat([by_hand(module.attention, 0, forward), turned], -1)


@every_kind
@every_form
@pytest.mark.parametrize("heads", [1, 2])
def test_is_attention_over_the_past(kind: str, form: str, heads: int) -> None:
    make = partial(AttentionReadout, width=4, heads=heads)
    module = fused(kind, {"attention": make}, dtype=torch.float64, **FORMS[form])
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    output, state = module(x)
    for index in range(BATCH):
        torch.testing.assert_close(output[:, index], expected(module, x[:, index]))
    assert_same((output, state), (output, plain_of(module)(x)[1]))


@every_form
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequences_attend_within_their_own_steps(form: str, enforce_sorted: bool) -> None:
    module = fused("lstm", {"attention": AttentionReadout}, dtype=torch.float64, **FORMS[form])
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    output, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted))
    rows, found = pad_packed_sequence(output)
    assert found.tolist() == lengths
    for index, length in enumerate(lengths):
        torch.testing.assert_close(rows[:length, index], expected(module, x[:length, index]))


@every_kind
@every_form
def test_starts_as_torchs_own(kind: str, form: str) -> None:
    module = FUSED[KINDS[kind]](IN, HIDDEN, attention=AttentionReadout, **FORMS[form])
    x = torch.randn(STEPS, BATCH, IN)
    assert_same(module(x), plain_of(module)(x))
    module(x)[0].square().sum().backward()
    assert all(bool(linear.weight.grad.any()) for linear in module.attention.write)


def test_the_past_is_one_hop_away_and_the_future_is_not_seen() -> None:
    """With a recurrence that forgets at once, only attention can carry anything."""
    module = fused("rnn", {"attention": AttentionReadout}, dtype=torch.float64)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    x = torch.randn(40, 1, IN, dtype=torch.float64, requires_grad=True)

    def reach(module: nn.RNNBase, step: int) -> Tensor:
        (gradient,) = torch.autograd.grad(module(x)[0][step].sum(), x)
        return gradient.abs().amax((1, 2))

    reached = reach(module, 30)
    assert bool((reached[:31] > 1e-6).all()) and not bool(reached[31:].any())
    assert not bool(reach(plain_of(module), 30)[:30].any())


def test_each_direction_sees_what_it_has_read() -> None:
    module = fused("rnn", {"attention": AttentionReadout}, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_hh_l0_reverse.zero_()
    x = torch.randn(STEPS, 1, IN, dtype=torch.float64, requires_grad=True)
    forward, reverse = module(x)[0][4].sum(0).chunk(2)
    seen = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in (forward, reverse)]
    before, after = (gradient.abs().amax((1, 2)) > 1e-9 for gradient in seen)
    assert before.tolist() == [step <= 4 for step in range(STEPS)]
    assert after.tolist() == [step >= 4 for step in range(STEPS)]


def test_projected_outputs_are_attended_over() -> None:
    module = fused("lstm", {"attention": AttentionReadout}, proj_size=3, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0][:, 1], expected(module, x[:, 1]))
    assert module.attention.write[0].weight.shape[0] == 3


@pytest.mark.parametrize(("size", "width"), [(4, 4), (40, 8), (255, 8), (256, 16)])
def test_its_parameters_lie_in_the_child(size: int, width: int) -> None:
    module = FusedLSTM(IN, size, bidirectional=True, attention=AttentionReadout)
    added = {key: value.shape for key, value in module.state_dict().items() if "attention" in key}
    assert added == {
        f"attention.{part}.{way}.weight": shape
        for way in (0, 1)
        for part, shape in (("read", (3 * width, size)), ("write", (size, width)))
    }


def readout(heads: int) -> AttentionReadout:
    """Of outputs of 6 features, drawn so that it matters."""
    made = AttentionReadout(nn.LSTM(IN, 6, dtype=torch.float64), width=4, heads=heads)
    for part in made.parameters():
        nn.init.normal_(part)
    return made


def run(owner: AttentionReadout, rows: Tensor, read: Tensor, write: Tensor) -> Tensor:
    weights = {"read.0.weight": read, "write.0.weight": write}
    found: Tensor = functional_call(owner, weights, (rows, None))
    return found


def inputs_of(owner: AttentionReadout, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.randn(STEPS, batch, 6, dtype=torch.float64, requires_grad=True)
    read, write = owner.parameters()
    return rows, read, write


def sequence_by_sequence(owner: AttentionReadout, rows: Tensor) -> Tensor:
    return torch.stack([by_hand(owner, 0, each) for each in rows.unbind(1)], 1)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("block", "kept"), [(64, 4), (4, 4), (4, 0), (3, 0)])
def test_however_it_is_cut_the_derivatives_are_right(
    heads: int, block: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that end with the sequence or not, weights kept or made anew."""
    monkeypatch.setattr(attention_readout, "_BLOCK", block)
    monkeypatch.setattr(attention_readout, "_KEPT", kept)
    owner = readout(heads)
    inputs = inputs_of(owner)
    torch.testing.assert_close(run(owner, *inputs), sequence_by_sequence(owner, inputs[0]))
    assert torch.autograd.gradcheck(partial(run, owner), inputs)
    assert torch.autograd.gradgradcheck(partial(run, owner), inputs, fast_mode=True)


def test_scores_beyond_the_exponential() -> None:
    owner = readout(1)
    with torch.no_grad():
        owner.get_parameter("read.0.weight").mul_(1000)
    inputs = inputs_of(owner)
    found = run(owner, *inputs)
    torch.testing.assert_close(found, sequence_by_sequence(owner, inputs[0]))
    gradients = torch.autograd.grad(found.sum(), inputs)
    expected = torch.autograd.grad(sequence_by_sequence(owner, inputs[0]).sum(), inputs)
    torch.testing.assert_close(gradients, expected)


# torch's own forward mode scripts a part of itself, and warns of that.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_under_vmap_and_forward_mode() -> None:
    owner = readout(2)
    rows, read, write = (tensor.detach() for tensor in inputs_of(owner))
    several = torch.stack([rows, -rows])
    mapped = torch.vmap(partial(run, owner), in_dims=(0, None, None))(several, read, write)
    for mine, each in zip(mapped, several, strict=True):
        torch.testing.assert_close(mine, sequence_by_sequence(owner, each))
    along = torch.randn_like(rows)
    slope = torch.func.jvp(lambda rows: run(owner, rows, read, write), (rows,), (along,))[1]
    ahead, behind = (sequence_by_sequence(owner, rows + h * along) for h in (1e-6, -1e-6))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)


def test_of_no_sequence_nothing_is_read() -> None:
    owner = readout(1)
    inputs = inputs_of(owner, batch=0)
    found = run(owner, *inputs)
    assert found.shape == (STEPS, 0, 6)
    assert not any(bool(part.any()) for part in torch.autograd.grad(found.sum(), inputs))


def test_no_second_derivative_is_silently_wrong() -> None:
    """In half precision, where torch's fused kernel runs."""
    module = fused("gru", {"attention": AttentionReadout}, dtype=torch.bfloat16)
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("options", [{"width": 6, "heads": 4}, {"width": 0}])
def test_wrong_options_are_told(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="heads"):
        AttentionReadout(nn.LSTM(IN, HIDDEN), **options)
