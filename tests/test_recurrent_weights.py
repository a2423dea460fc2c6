"""Recurrent weights made at each forward, block by block against plain linear algebra."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from fused_cases import BATCH, HIDDEN, IN, KINDS, STEPS, assert_same, fused, plain_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import dropout

from rnnguard.nn.recurrent_weights import (
    DropConnect,
    Orthogonal,
    RecurrentWeights,
    SpectralBound,
    WeightNorm,
    recurrent_parameters,
)

GATES = {"rnn": 1, "lstm": 4, "gru": 3}
# torch says so once per process about its own projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
every_kind = pytest.mark.parametrize("kind", KINDS)
DEEP: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}


def made(module: nn.RNNBase) -> list[Tensor]:
    recurrent = module.recurrent
    assert isinstance(recurrent, RecurrentWeights)
    return recurrent(recurrent_parameters(module), module.training)


def blocks(kind: str, weights: list[Tensor]) -> list[Tensor]:
    return [block for weight in weights for block in weight.detach().chunk(GATES[kind])]


def assert_kernel_uses(module: nn.RNNBase, weights: list[Tensor]) -> None:
    """The module is torch's own with these recurrent weights written into it."""
    plain = plain_of(module)
    x = torch.randn(STEPS, BATCH, IN, dtype=weights[0].dtype)
    with torch.no_grad():
        for parameter, weight in zip(recurrent_parameters(plain), weights, strict=True):
            parameter.copy_(weight)
        assert_same(module(x), plain(x), rtol=1e-9, atol=1e-9)


@every_kind
def test_drop_connect_draws_one_mask_for_a_forward(kind: str) -> None:
    module = fused(kind, {"recurrent": partial(DropConnect, p=0.4)}, **DEEP)
    torch.manual_seed(1)
    masked = [dropout(weight, 0.4, True) for weight in recurrent_parameters(module)]
    for weight, rest in zip(recurrent_parameters(module), masked, strict=True):
        torch.testing.assert_close(rest[rest != 0], weight[rest != 0] / 0.6)
    plain = plain_of(module)
    with torch.no_grad():
        for parameter, weight in zip(recurrent_parameters(plain), masked, strict=True):
            parameter.copy_(weight)
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    torch.manual_seed(1)
    assert_same(module(x), plain(x))
    assert not torch.equal(module(x)[0], plain(x)[0])


@every_kind
def test_drop_connect_gives_dropped_weights_no_gradient(kind: str) -> None:
    module = fused(kind, {"recurrent": partial(DropConnect, p=0.4)}, **DEEP)
    weights = recurrent_parameters(module)
    torch.manual_seed(2)
    dropped = [dropout(weight, 0.4, True) == 0 for weight in weights]
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    torch.manual_seed(2)
    module(x)[0].square().sum().backward()
    for weight, gone in zip(weights, dropped, strict=True):
        assert weight.grad is not None and 0.2 < float(gone.float().mean()) < 0.6
        assert not bool(weight.grad[gone].any()) and bool(weight.grad[~gone].all())


@every_kind
def test_drop_connect_rests_in_evaluation(kind: str) -> None:
    module = fused(kind, {"recurrent": partial(DropConnect, p=0.9)}, num_layers=2).eval()
    x = torch.randn(STEPS, BATCH, IN)
    assert_same(module(x), plain_of(module)(x))


@every_kind
@pytest.mark.parametrize("over", ["row", "gate"])
def test_weight_norm_starts_as_the_function_it_was_and_then_has_its_gains(
    kind: str, over: str
) -> None:
    module = fused(kind, {}, **DEEP)
    module.add_module("recurrent", WeightNorm(module, over=over))  # type: ignore[arg-type]
    assert_kernel_uses(module, recurrent_parameters(module))
    gain = module.recurrent.gain
    with torch.no_grad():
        gain.uniform_(0.5, 2.0)
        for parameter in recurrent_parameters(module):
            parameter.mul_(3.0)
    got = blocks(kind, made(module))
    for block, gains in zip(got, gain.detach().flatten(0, 1), strict=True):
        norms = block.norm(dim=1, keepdim=True) if over == "row" else block.norm().view(1, 1)
        torch.testing.assert_close(norms, gains)
    assert_kernel_uses(module, made(module))


def test_weight_norm_of_a_row_of_zeros_stays_finite() -> None:
    module = nn.GRU(IN, HIDDEN)
    nn.init.zeros_(module.weight_hh_l0[1])
    norm = WeightNorm(module)
    (weight,) = norm([module.weight_hh_l0], True)
    weight.square().sum().backward()
    assert not bool(weight[1].any()) and bool(module.weight_hh_l0.grad.isfinite().all())


def test_weight_norm_follows_a_plain_checkpoint() -> None:
    plain = nn.LSTM(IN, HIDDEN, 2)
    module = fused("lstm", {"recurrent": WeightNorm}, num_layers=2)
    module.load_state_dict(plain.state_dict())
    x = torch.randn(STEPS, BATCH, IN)
    assert_same(module(x), plain(x), rtol=1e-5, atol=1e-6)


def test_weight_norm_takes_no_gains_from_a_checkpoint_that_does_not_fit() -> None:
    module = fused("lstm", {"recurrent": WeightNorm}, num_layers=2)
    wider = nn.LSTM(IN, HIDDEN + 1, 2).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_hh_l0"):
        module.load_state_dict(wider)
    with pytest.raises(RuntimeError, match=r"Missing key.*recurrent\.gain"):
        module.load_state_dict(nn.LSTM(IN, HIDDEN, 1).state_dict())


@every_kind
def test_orthogonal_blocks_are_orthogonal(kind: str) -> None:
    module = fused(kind, {"recurrent": Orthogonal}, **DEEP)
    for block in blocks(kind, made(module)):
        eye = torch.eye(HIDDEN, dtype=torch.float64)
        torch.testing.assert_close(block.T @ block, eye, rtol=0, atol=1e-12)
    assert_kernel_uses(module, made(module))


@every_kind
def test_orthogonal_keeps_what_is_orthogonal(kind: str) -> None:
    module = fused(kind, {"recurrent": Orthogonal}, **DEEP)
    with torch.no_grad():
        for parameter in recurrent_parameters(module):
            for block in parameter.chunk(GATES[kind]):
                nn.init.orthogonal_(block)
    assert_kernel_uses(module, recurrent_parameters(module))


def test_orthogonal_stays_so_in_training_and_learns() -> None:
    module = fused("gru", {"recurrent": Orthogonal}, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    target = torch.randn(STEPS, BATCH, HIDDEN, dtype=torch.float64)
    first = blocks("gru", made(module))
    optimizer = torch.optim.SGD(recurrent_parameters(module), lr=0.5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(x)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for before, block in zip(first, blocks("gru", made(module)), strict=True):
        eye = torch.eye(HIDDEN, dtype=torch.float64)
        torch.testing.assert_close(block.T @ block, eye, rtol=0, atol=1e-12)
        assert not torch.allclose(before, block, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 2)])
def test_orthogonal_has_the_gradient_of_gram_and_schmidt(rows: int, columns: int) -> None:
    """Of several weights at once, each by itself."""
    orthogonal = Orthogonal(nn.GRU(IN, rows))
    weights = [torch.randn(3 * rows, columns, dtype=torch.float64) for _ in range(2)]
    for weight in weights:
        weight.requires_grad_()
    expected = [torch.cat([gram_schmidt(block) for block in w.chunk(3)]) for w in weights]
    got = orthogonal(weights, True)
    torch.testing.assert_close(got, expected)
    along = [torch.randn_like(weight) for weight in weights]
    mine = torch.autograd.grad(got, weights, along)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, weights, along))


def gram_schmidt(block: Tensor) -> Tensor:
    made: list[Tensor] = []
    for column in block.unbind(1):
        rest = column - sum((column @ each) * each for each in made)
        made.append(rest / rest.norm())
    return torch.stack(made, 1)


def test_orthogonal_holds_in_half_precision_too() -> None:
    module = fused("gru", {"recurrent": Orthogonal}, IN, 16, dtype=torch.bfloat16)
    for block in blocks("gru", made(module)):
        assert block.dtype == torch.bfloat16
        assert torch.allclose(block.float().T @ block.float(), torch.eye(16), atol=0.05)


def test_projected_blocks_have_orthonormal_columns() -> None:
    module = fused("lstm", {"recurrent": Orthogonal}, proj_size=3, dtype=torch.float64)
    for block in blocks("lstm", made(module)):
        assert block.shape == (HIDDEN, 3)
        torch.testing.assert_close(block.T @ block, torch.eye(3, dtype=torch.float64))


@every_kind
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("bound", [0.2, 0.6])
def test_no_block_exceeds_its_bound(kind: str, proj_size: int, bound: float) -> None:
    options = DEEP | ({"proj_size": proj_size} if kind == "lstm" and proj_size else {})
    module = fused(kind, {"recurrent": partial(SpectralBound, bound=bound)}, **options)
    given = blocks(kind, recurrent_parameters(module))
    for before, block in zip(given, blocks(kind, made(module)), strict=True):
        norm = float(torch.linalg.matrix_norm(before, 2))
        share = min(1.0, bound / norm)
        torch.testing.assert_close(block, share * before, rtol=1e-4, atol=1e-6)
        assert float(torch.linalg.matrix_norm(block, 2)) <= bound * (1 + 1e-5)
    assert_kernel_uses(module, made(module))


def test_only_blocks_above_the_bound_change() -> None:
    module = fused("lstm", {"recurrent": partial(SpectralBound, bound=0.5)})
    with torch.no_grad():
        for index, block in enumerate(module.weight_hh_l0.chunk(4)):
            block.copy_((0.2 + 0.2 * index) * nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN)))
    for index, (before, block) in enumerate(
        zip(blocks("lstm", [module.weight_hh_l0]), blocks("lstm", made(module)), strict=True)
    ):
        assert torch.equal(before, block) == (index < 2)


@pytest.mark.parametrize("size", [16, 96])
def test_the_bound_holds_right_after_large_steps(size: int) -> None:
    """In float32, against new weights of a close spectrum at every forward."""
    module = fused("gru", {"recurrent": SpectralBound}, IN, size)
    for _ in range(5):
        with torch.no_grad():
            module.weight_hh_l0.copy_(torch.randn(3 * size, size))
        for block in blocks("gru", made(module)):
            assert float(torch.linalg.matrix_norm(block, 2)) == pytest.approx(1.0, abs=1e-3)


def test_the_iteration_goes_on_in_training_and_rests_in_evaluation() -> None:
    module = fused("gru", {"recurrent": SpectralBound}, IN, 16)
    start = module.recurrent.vectors.clone()
    module.eval()(torch.randn(STEPS, BATCH, IN))
    assert torch.equal(module.recurrent.vectors, start)
    module.train()(torch.randn(STEPS, BATCH, IN))
    vectors = module.recurrent.vectors
    assert not torch.equal(vectors, start) and not vectors.requires_grad
    for block, found in zip(module.weight_hh_l0.detach().chunk(3), vectors[0], strict=True):
        leading = torch.linalg.svd(block)[2][0]
        assert float((found.T @ leading).norm()) == pytest.approx(1.0, abs=1e-4)


def test_the_gradient_of_a_bounded_block_cannot_lengthen_it() -> None:
    """The function does not see the norm above the bound, so its gradient is across."""
    module = fused("rnn", {"recurrent": partial(SpectralBound, bound=0.3)}, dtype=torch.float64)
    module(torch.randn(STEPS, BATCH, IN, dtype=torch.float64))[0].square().sum().backward()
    weight = module.weight_hh_l0
    assert float(weight.grad.abs().max()) > 1e-3
    assert (weight.grad * weight).sum().item() == pytest.approx(0.0, abs=1e-9)


def test_many_models_under_vmap() -> None:
    module = fused("gru", {"recurrent": partial(SpectralBound, bound=0.3)}).eval()
    x = torch.randn(STEPS, BATCH, IN)
    recurrent = module.recurrent
    several = torch.stack([module.weight_hh_l0.detach(), 2 * module.weight_hh_l0.detach()])
    mapped = torch.vmap(lambda weight: recurrent([weight], False)[0])(several)
    for weight, got in zip(several, mapped, strict=True):
        torch.testing.assert_close(got, recurrent([weight], False)[0], rtol=1e-4, atol=1e-5)
    assert functional_call(module, {"weight_hh_l0": several[0]}, (x,))[0].shape[-1] == HIDDEN


@pytest.mark.parametrize(
    ("make", "options"),
    [(DropConnect, {"p": 1.0}), (SpectralBound, {"bound": 0.0}), (WeightNorm, {"over": "all"})],
)
def test_wrong_options_are_told(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        make(nn.LSTM(IN, HIDDEN), **options)
