"""Which uses of a weight depend on each other, and what counts as a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import recorded
from torch import Tensor, nn

from rnnguard.inspection.chains import FEWEST, Chain, chains, weightless_chains
from rnnguard.inspection.flow import Flow

H, T, B = 4, 5, 2
Forward = Callable[["Weights", Tensor], Any]


class Weights(nn.Module):
    """A few tensors, and a forward that the test gives."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(H, H))
        self.all = nn.Parameter(torch.randn(3, H, H))
        self.bias = nn.Parameter(torch.zeros(H))
        self.register_buffer("fixed", torch.eye(H))
        self.given = forward

    def forward(self, x: Tensor) -> Any:
        return self.given(self, x)


def flow_of(forward: Forward) -> Flow:
    return Flow(recorded(Weights(forward), torch.randn(T, B, H)).graph)


def found(forward: Forward) -> list[Chain]:
    return chains(flow_of(forward))


def uses_of(forward: Forward) -> dict[str, int]:
    return {chain.weight: len(chain) for chain in found(forward)}


def recur(step: Callable[[Weights, Tensor, Tensor], Tensor]) -> Forward:
    def forward(model: Weights, x: Tensor) -> Tensor:
        h = x.new_zeros(B, H)
        for now in x:
            h = step(model, now, h)
        return h

    return forward


STEPS: dict[str, tuple[Callable[[Weights, Tensor, Tensor], Tensor], dict[str, int]]] = {
    "matrix": (lambda m, x, h: torch.tanh(x + h @ m.w), {"w": T}),
    "turned": (lambda m, x, h: torch.tanh(x + h @ m.w.t()), {"w": T}),
    "scaled": (lambda m, x, h: torch.tanh(x + h @ (0.5 * m.w)), {"w": T}),
    "made antisymmetric": (lambda m, x, h: h + torch.tanh(x + h @ (m.w - m.w.t())), {"w": T}),
    "masked": (lambda m, x, h: torch.tanh(x + h @ (m.w * m.w.new_ones(H, H))), {"w": T}),
    "two in one": (lambda m, x, h: torch.tanh(x + h @ (m.w @ m.all[0])), {"w": T, "all": T}),
    "on the input only": (lambda m, x, h: 0.5 * h + x @ m.w, {}),
    "a bias in the state": (lambda m, x, h: torch.tanh(x + h + m.bias), {"bias": T}),
    "a buffer": (lambda m, x, h: torch.tanh(x + h @ m.fixed), {"fixed": T}),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_weight_whose_uses_depend_on_each_other(name: str) -> None:
    step, expected = STEPS[name]
    assert uses_of(recur(step)) == expected


def test_the_uses_are_in_order_and_behind_each_other() -> None:
    flow = flow_of(recur(lambda m, x, h: torch.tanh(x + h @ m.w)))
    (chain,) = chains(flow)
    assert len({flow.place(use) for use in chain.uses}) == 1
    assert list(chain.uses) == sorted(chain.uses)
    for rank, use in enumerate(chain.uses, 1):
        assert chain.behind[use] == rank
        assert chain.ahead[use] == (T if rank < T else 0)
        assert chain.is_inside(use)
    assert not chain.merges
    assert not any(chain.is_inside(i) for i in range(chain.uses[0]))


def test_parts_of_one_tensor_are_weights_of_their_own() -> None:
    """Its last part meets a state that the first two have met already in the same step."""

    def step(m: Weights, x: Tensor, h: Tensor) -> Tensor:
        r, z = torch.sigmoid(h @ m.all[0]), torch.sigmoid(h @ m.all[1])
        return (1 - z) * torch.tanh(x + (r * h) @ m.all[2]) + z * h

    parts = found(recur(step))
    assert [(chain.weight, len(chain), chain.merges) for chain in parts] == [("all", T, False)] * 3


@pytest.mark.parametrize(
    "take",
    [
        lambda all: list(all),
        lambda all: all.unbind(0),
        lambda all: [part[0] for part in all.chunk(3)],
        lambda all: [part.squeeze(0) for part in all.split(1, dim=0)],
        lambda all: [all.select(0, i) for i in range(3)],
        lambda all: [all.narrow(0, i, 1)[0] for i in range(3)],
        lambda all: [all[i] for i in range(3)],
        lambda all: [all[i : i + 1].squeeze(0) for i in range(3)],
    ],
)
def test_layers_in_one_tensor_make_no_chain(take: Callable[[Tensor], list[Tensor]]) -> None:
    def forward(model: Weights, x: Tensor) -> Tensor:
        for layer in take(model.all):
            x = torch.relu(x @ layer)
        return x

    assert found(forward) == []


@pytest.mark.parametrize("rounds", range(1, FEWEST + 2))
def test_a_chain_has_at_least_three_uses(rounds: int) -> None:
    def forward(model: Weights, x: Tensor) -> Tensor:
        for _ in range(rounds):
            x = torch.tanh(x @ model.w)
        return x

    assert [len(chain) for chain in found(forward)] == ([rounds] if rounds >= FEWEST else [])


def test_integers_carry_no_state() -> None:
    """The word that was chosen does not hand on the weight that chose it."""

    def forward(model: Weights, x: Tensor) -> Tensor:
        word = torch.zeros(B, dtype=torch.long)
        for now in x:
            word = (now[word % B] @ model.w).argmax(-1)
        return word

    assert found(forward) == []


def test_uses_side_by_side_are_no_chain() -> None:
    assert found(lambda m, x: torch.stack([now @ m.w for now in x]).sum(0) @ m.w) == []


def test_two_runs_that_meet_are_a_merge() -> None:
    def forward(model: Weights, x: Tensor) -> Tensor:
        def run(h: Tensor) -> Tensor:
            for _ in range(3):
                h = torch.tanh(h @ model.w)
            return h

        return (run(x[0]) + run(x[1])) @ model.w

    (chain,) = found(forward)
    assert (len(chain), chain.merges) == (4, True)


def test_one_run_beside_another_does_not_merge() -> None:
    """The same cell in both directions, whose ends stand side by side."""

    def forward(model: Weights, x: Tensor) -> Tensor:
        ends = []
        for steps in (x, x.flip(0)):
            h = torch.zeros(B, H)
            for now in steps:
                h = torch.tanh(now + h @ model.w)
            ends.append(h)
        return torch.cat(ends, -1)

    (chain,) = found(forward)
    assert (len(chain), chain.merges) == (T, False)


def test_a_product_with_zeros_is_the_first_step() -> None:
    (chain,) = found(recur(lambda m, x, h: torch.tanh(x + h @ m.w)))
    assert len(chain) == T


def test_what_a_product_scales() -> None:
    flow = flow_of(recur(lambda m, x, h: torch.tanh(torch.addmm(m.bias, h, m.w) + x)))
    (use,) = {use for chain in chains(flow) if chain.weight == "w" for use in chain.uses[-1:]}
    assert flow.multiplies(use, "w")
    assert not flow.multiplies(use, "bias")
    assert flow.is_trainable("w")
    assert not flow.is_trainable("fixed")


# --- chains without a weight


def weightless(forward: Forward) -> list[int]:
    flow = flow_of(forward)
    return [len(chain) for chain in weightless_chains(flow, chains(flow))]


def test_a_scan_by_what_the_data_say_is_a_chain_without_a_weight() -> None:
    def forward(model: Weights, x: Tensor) -> Tensor:
        keep, new, h = torch.sigmoid(x @ model.w), x @ model.all[0], torch.zeros(B, H)
        for step in range(T):
            h = keep[step] * h + (1 - keep[step]) * new[step]
        return h

    assert set(weightless(forward)) == {T}


@pytest.mark.parametrize(
    "join",
    [
        lambda total, now: total + now,
        lambda total, now: total - now,
        lambda total, now: torch.maximum(total, now),
        lambda total, now: torch.logaddexp(total, now),
        lambda total, now: torch.cat([total, now]),
    ],
)
def test_sums_are_no_chain(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    def forward(model: Weights, x: Tensor) -> Tensor:
        total = x[0] @ model.w
        for now in x[1:]:
            total = join(total, now @ model.w)
        return total

    assert weightless(forward) == []


def test_a_chain_with_a_weight_inside_is_not_found_twice() -> None:
    assert weightless(recur(lambda m, x, h: torch.tanh(x + 0.5 * (h @ m.w)))) == []


def test_without_gradient_no_weightless_chain_is_looked_for() -> None:
    def forward(model: Weights, x: Tensor) -> Tensor:
        total = x[0]
        for now in x:
            total = 0.9 * total + now
        return total @ model.w

    assert weightless(forward) == []
