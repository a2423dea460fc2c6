"""Which loops are recurrences over time, told on small models that do one thing each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import recorded
from torch import Tensor, nn
from torch.nn import functional

from rnnguard.inspection.loops import Loop, find_loops

F, H, T, B = 3, 4, 6, 2


def loops(model: nn.Module, *inputs: Any) -> list[Loop]:
    return find_loops(recorded(model, *inputs).graph)


def kinds(model: nn.Module, *inputs: Any) -> list[tuple[str, int]]:
    return [(loop.kind, loop.steps) for loop in loops(model, *inputs)]


def x() -> Tensor:
    return torch.randn(B, T, F)


class Own(nn.Module):
    """A state (B, H), a map of the input and one of the state, and a read-out."""

    def __init__(self, inputs: int = F) -> None:
        super().__init__()
        self.into = nn.Linear(inputs, H)
        self.state = nn.Linear(H, H, bias=False)
        self.out = nn.Linear(H, F)

    def zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), H)


# --- steps of time


class ByIndex(Own):
    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for t in range(x.shape[1]):
            h = torch.tanh(self.into(x[:, t]) + self.state(h))
        return self.out(h)


class ByUnbind(Own):
    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for now in x.unbind(1):
            h = torch.tanh(self.into(now) + self.state(h))
        return self.out(h)


class BySplit(Own):
    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for now in self.into(x).split(1, 1):
            h = torch.tanh(now.squeeze(1) + self.state(h))
        return self.out(h)


class AddedInPlace(Own):
    def forward(self, x: Tensor) -> Tensor:
        h, given = self.zeros(x), self.into(x)
        for t in range(x.shape[1]):
            a = self.state(h)
            a += given[:, t]
            h = a.tanh_()
        return self.out(h)


class GreedyDecoder(Own):
    """Takes the word that it gave last; only the first state comes from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(F, H)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x[:, 0]))
        word, outputs = torch.zeros(len(x), dtype=torch.long), []
        for _ in range(T):
            h = torch.tanh(self.words(word) + self.state(h))
            outputs.append(self.out(h))
            word = outputs[-1].argmax(-1)
        return torch.stack(outputs, 1)


class Rollout(Own):
    """Predicts step by step from its own state alone, and collects in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Any:
        h, given = torch.tanh(self.into(x[:, 0])), []
        buffer = x.new_zeros(len(x), T, F)
        for t in range(T):
            h = torch.tanh(self.state(h))
            given.append(self.out(h))
            if self.way == "buffer":
                buffer[:, t] = given[-1]
        if self.way == "stack":
            return torch.stack(given, 1)
        if self.way == "cat":
            return torch.cat([g[:, None] for g in given], 1)
        if self.way == "buffer":
            return buffer
        if self.way == "list":
            return given
        return torch.cat(given, -1)


@pytest.mark.parametrize("make", [ByIndex, ByUnbind, BySplit, AddedInPlace, GreedyDecoder])
def test_a_loop_that_takes_something_new_at_each_step_is_time(make: type[nn.Module]) -> None:
    (loop,) = loops(make(), x())
    assert (loop.kind, loop.steps, loop.weights) == ("time", T, ("state.weight",))


@pytest.mark.parametrize("way", ["stack", "cat", "buffer", "list"])
def test_a_loop_whose_steps_are_collected_is_time(way: str) -> None:
    assert kinds(Rollout(way), x()) == [("time", T)]


def test_rounds_side_by_side_in_one_vector_are_no_time() -> None:
    assert kinds(Rollout("features"), x()) == [("iterations", T)]


class Reflected(Own):
    """Each step turns the state by two reflections, which use their vector three times each."""

    def __init__(self) -> None:
        super().__init__()
        self.axes = nn.Parameter(torch.randn(2, H))

    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for now in x.unbind(1):
            for axis in self.axes:
                h = h - 2 * (h @ axis)[:, None] * axis / (axis @ axis)
            h = torch.relu(h + self.into(now))
        return h


class ThereAndBack(Own):
    """The same matrix and its turn in each step."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.zeros(x), self.state.weight
        for now in x.unbind(1):
            h = torch.tanh(torch.tanh(h @ w) @ w.t() + self.into(now))
        return h


class DeltaRule(Own):
    """A matrix as state, written by what it recalled wrongly; read twice in one line."""

    def forward(self, x: Tensor) -> Tensor:
        keys, new = self.into(x).softmax(-1), torch.tanh(self.into(x))
        m = x.new_zeros(len(x), H, H)
        for t in range(x.shape[1]):
            k, v = keys[:, t], new[:, t]
            m = m + torch.einsum("bi,bj->bij", v - torch.einsum("bij,bj->bi", m, k), k)
        return m


class LearnedStart(Own):
    """A scan whose first state is a weight."""

    def forward(self, x: Tensor) -> Tensor:
        keep, h = torch.sigmoid(self.into(x)), self.state.weight[0].expand(len(x), H)
        for t in range(x.shape[1]):
            h = keep[:, t] * h + x[:, t, :1]
        return h


class LearnedMatrix(Own):
    """A matrix that starts as a weight and learns from each step by a gradient of its own."""

    def forward(self, x: Tensor) -> Tensor:
        m, keys, new = self.state.weight.expand(len(x), H, H), self.into(x), self.into(x).tanh()
        for t in range(x.shape[1]):
            error = torch.einsum("bij,bj->bi", m, keys[:, t]) - new[:, t]
            m = m - 0.1 * torch.einsum("bi,bj->bij", error, keys[:, t])
        return m


class SolvedPerStep(Own):
    """Several rounds of a solver on each input, as liquid networks take."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for now in self.into(x).unbind(1):
            for _ in range(4):
                h = h + 0.1 * (torch.tanh(self.state(h) + now) - h)
        return h


class Detached(Own):
    """Lets go of its past at every third step."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for t in range(x.shape[1]):
            h = torch.tanh(self.into(x[:, t]) + self.state(h.detach() if t % 3 == 0 else h))
        return h


@pytest.mark.parametrize(
    "make",
    [Reflected, ThereAndBack, DeltaRule, LearnedStart, LearnedMatrix, SolvedPerStep, Detached],
)
def test_steps_are_counted_once_however_a_step_is_spelled(make: type[nn.Module]) -> None:
    found = loops(make(), x())
    assert {loop.kind for loop in found} == {"time"}
    assert {loop.steps for loop in found} == {T}


class TwoLayers(Own):
    """A list of two different cells, the second fed by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.Linear(F + H, H), nn.Linear(2 * H, H)])

    def forward(self, x: Tensor) -> Tensor:
        states = [self.zeros(x), self.zeros(x)]
        for now in x.unbind(1):
            for layer, cell in enumerate(self.cells):
                now = torch.tanh(cell(torch.cat([now, states[layer]], -1)))
                states[layer] = now
        return self.out(now)


def test_stacked_cells_are_loops_of_their_own() -> None:
    found = loops(TwoLayers(), x())
    assert [loop.kind for loop in found] == ["time", "time"]
    assert [loop.steps for loop in found] == [T, T]
    assert [loop.weights for loop in found] == [("cells.0.weight",), ("cells.1.weight",)]


class Reservoir(Own):
    def __init__(self) -> None:
        super().__init__()
        self.state.requires_grad_(False)

    forward = ByIndex.forward


def test_fixed_weights_are_told_apart() -> None:
    assert kinds(Reservoir(), x()) == [("fixed", T)]


SHARED = {"w": torch.randn(H, H, requires_grad=True)}


class Unregistered(Own):
    """Its recurrent weight stands in a dict of the module's file."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for now in x.unbind(1):
            h = torch.tanh(self.into(now) + h @ SHARED["w"])
        return self.out(h)


def test_an_unregistered_weight_still_makes_a_recurrence() -> None:
    (loop,) = loops(Unregistered(), x())
    assert (loop.kind, loop.steps, loop.weights) == ("time", T, ())


# --- no steps of time


class Refined(Own):
    """Comes closer to a fixed point of the same input, and gives every guess."""

    def forward(self, x: Tensor) -> list[Tensor]:
        h, given, guesses = self.zeros(x[:, 0]), self.into(x[:, 0]), []
        for _ in range(T):
            h = torch.tanh(given + self.state(h))
            guesses.append(h)
        return guesses


class RefinedAnew(Own):
    """Maps the same input again in every round."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for _ in range(T):
            h = torch.tanh(self.into(x[:, 0]) + self.state(h))
        return self.out(h)


class Denoised(Own):
    """Takes the number of the round, embedded, and the same condition each time."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds = nn.Embedding(T, H)

    def forward(self, x: Tensor) -> Tensor:
        image, given = torch.randn(len(x), H), self.into(x[:, 0])
        for t in reversed(range(T)):
            at = self.rounds(torch.full((len(x),), t))
            image = image - 0.1 * self.state(torch.tanh(image + at + given))
            image = image + 0.01 * torch.randn_like(image)
        return self.out(image)


class FoldedTree(Own):
    """Joins neighbours pair by pair until one is left."""

    def forward(self, x: Tensor) -> Tensor:
        nodes = [torch.tanh(self.into(now)) for now in [*x.unbind(1), x[:, 0], x[:, 1]]]
        while len(nodes) > 1:
            pairs = zip(nodes[::2], nodes[1::2], strict=True)
            nodes = [torch.tanh(self.state(a) + self.state(b)) for a, b in pairs]
        return self.out(nodes[0])


class Grid(Own):
    """Each cell reads the one to the left and the one above."""

    def forward(self, x: Tensor) -> Tensor:
        above = [self.zeros(x)] * 5
        for now in x.unbind(1):
            left, row = self.zeros(x), []
            for column in range(5):
                left = torch.tanh(self.into(now) + self.state(left + above[column]))
                row.append(left)
            above = row
        return self.out(above[-1])


class DenoisedAndKept(Own):
    """Each image is the one before with something taken away; all are given."""

    def forward(self, x: Tensor) -> Tensor:
        image, given, images = torch.zeros(len(x), H), self.into(x[:, 0]), []
        for t in torch.linspace(1, 0, T):
            image = image - 0.1 * self.state(torch.tanh(image + given + t))
            images.append(image)
        return torch.stack(images)


class InTurns(Own):
    """Goes through the same two inputs again and again."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for t in range(T):
            h = torch.tanh(self.into(x[:, t % 2]) + self.state(h))
        return self.out(h)


class InnerSteps(Own):
    """Descends a loss by gradients that it takes itself, and differentiates through them."""

    def forward(self, x: Tensor) -> Tensor:
        fast, given = self.state.weight, self.into(x[:, 0])
        for _ in range(T):
            loss = (given @ fast).square().mean()
            (slope,) = torch.autograd.grad(loss, fast, create_graph=True)
            fast = fast - 0.1 * slope
        return given @ fast


@pytest.mark.parametrize("make", [Refined, RefinedAnew, Denoised, DenoisedAndKept, InTurns])
def test_rounds_on_the_same_input_are_iterations(make: type[nn.Module]) -> None:
    assert kinds(make(), x()) == [("iterations", T)]


def test_inner_descent_is_no_time() -> None:
    assert not [kind for kind, _ in kinds(InnerSteps(), x()) if kind == "time"]


def test_runs_that_merge_are_a_tree() -> None:
    assert kinds(FoldedTree(), x()) == [("tree", 3)]
    ((kind, steps),) = kinds(Grid(), x())
    assert (kind, steps) == ("tree", T + 4)


class Residual(nn.Module):
    """Forty blocks with weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(F, F) for _ in range(40))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return x


class OneTensorOfLayers(nn.Module):
    """Its layers' weights lie in one parameter, and so do the biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Parameter(torch.randn(5, F, F))
        self.biases = nn.Parameter(torch.zeros(5, F))

    def forward(self, x: Tensor) -> Tensor:
        for layer, bias in zip(range(5), self.biases, strict=True):
            x = torch.relu(x @ self.layers[layer] + bias)
        return x


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(F * (i + 1), F) for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for block in self.blocks:
            found.append(torch.relu(block(torch.cat(found, -1))))
        return torch.cat(found, -1)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv1d(F, F, 3, padding=1) for _ in range(4))
        self.up = nn.ModuleList(nn.Conv1d(2 * F, F, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, kept = x.transpose(1, 2), []
        for layer in self.down:
            x = torch.relu(layer(x))
            kept.append(x)
        for layer in self.up:
            x = torch.relu(layer(torch.cat([x, kept.pop()], 1)))
        return x


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(F, 1, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.encoder(x)
        return found


class PerStep(Own):
    """One linear map for every step by itself, with positions added from one table."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(T, F))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.into(x[:, t] + self.positions[t]) for t in range(T)], 1)


class Siamese(Own):
    """The same encoder for three views, whose distances are compared."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (torch.relu(self.state(self.into(x[:, t]))) for t in range(3))
        return torch.relu((a - b).square().sum() - (a - c).square().sum() + 1)


class RunningLoss(Own):
    """The losses of the steps add up; nothing else goes from step to step."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for now in x.unbind(1):
            total = total + functional.mse_loss(self.out(torch.tanh(self.into(now))), now)
        return total / T


class Pooled(Own):
    """Keeps the largest of what the steps give, one by one."""

    def forward(self, x: Tensor) -> Tensor:
        best = self.zeros(x)
        for now in x.unbind(1):
            best = torch.maximum(best, torch.relu(self.into(now)))
        return self.out(best)


class TwoSteps(Own):
    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for t in range(2):
            h = torch.tanh(self.into(x[:, t]) + self.state(h))
        return self.out(h)


class Tied(nn.Module):
    """An autoencoder whose decoder turns the weights of its encoder round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H, F))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.relu(functional.linear(x, self.weight)), self.weight.t())


class Pyramid(nn.Module):
    """From the coarsest map down, each finer one is added to the one above, enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv1d(F, F, 3, 2, 1) for _ in range(4))
        self.side = nn.ModuleList(nn.Conv1d(F, H, 1) for _ in range(4))
        self.smooth = nn.Conv1d(H, H, 3, padding=1)
        self.head = nn.Conv1d(H, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = torch.cat([x.transpose(1, 2)] * 4, -1)[..., :16], []
        for layer in self.down:
            x = torch.relu(layer(x))
            maps.append(x)
        above = self.side[3](maps[3])
        found = [self.head(above)]
        for layer, seen in zip([*self.side][2::-1], maps[2::-1], strict=True):
            above = layer(seen) + functional.interpolate(above, scale_factor=2)
            above = self.after(above)
            found.append(self.head(above))
        return found

    def after(self, x: Tensor) -> Tensor:
        return x


class SmoothedPyramid(Pyramid):
    """One convolution for all maps, on the way from each to the next."""

    def after(self, x: Tensor) -> Tensor:
        found: Tensor = self.smooth(x)
        return found


class SharedNorm(nn.Module):
    """One normalisation and one slope for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(F, F) for _ in range(6))
        self.norm, self.slope = nn.LayerNorm(F), nn.PReLU()

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for block in self.blocks:
            x = x + self.slope(block(self.norm(x)))
            found.append(x)
        return found


class OneLongLine(Own):
    """Four factors in a row, each from the data; no loop at all."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.sigmoid(self.into(x)), torch.tanh(self.into(x))
        return a * torch.exp(-b) * a.cumsum(1) * b.abs() * torch.sigmoid(x.sum()) + b


class BrokenStick(Own):
    """What is left of a stick is broken again and again: a running product."""

    def forward(self, x: Tensor) -> Tensor:
        left, parts = x.new_ones(len(x)), []
        for share in torch.sigmoid(self.into(x[:, 0])).unbind(-1):
            parts.append(left * share)
            left = left * (1 - share)
        return torch.stack(parts, -1)


class BeamScores(nn.Module):
    """The best scores of paths so far, whose states are not carried."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(F, 4)

    def forward(self, x: Tensor) -> Tensor:
        best = x.new_zeros(len(x), 3)
        for now in x.unbind(1):
            new = self.score(now).log_softmax(-1)
            best = (best[:, :, None] + new[:, None]).flatten(1).topk(3).values
        return best


NONE: list[type[nn.Module]] = [
    Residual, OneTensorOfLayers, Dense, UNet, Transformer, PerStep, Siamese, RunningLoss, Pooled,
    TwoSteps, Tied, Pyramid, SmoothedPyramid, SharedNorm, BeamScores, OneLongLine, BrokenStick,
]  # fmt: skip


@pytest.mark.parametrize("make", NONE)
def test_no_loop_is_seen_where_none_is(make: type[nn.Module]) -> None:
    assert kinds(make(), x()) == []


def test_an_unmoved_value_counts_once() -> None:
    """The same slice of the same data is nothing new, however often it is taken."""

    class Slices(Own):
        def __init__(self, moving: bool) -> None:
            super().__init__()
            self.moving = moving

        def forward(self, x: Tensor) -> Tensor:
            h = self.zeros(x)
            for t in range(T):
                h = torch.tanh(self.into(x[:, t if self.moving else 0]) + self.state(h))
            return self.out(h)

    assert kinds(Slices(True), x()) == [("time", T)]
    assert kinds(Slices(False), x()) == [("iterations", T)]


def test_a_loop_knows_where_it_stands() -> None:
    (loop,) = loops(ByIndex(), x())
    assert loop.location is not None
    assert "test_loops.py:" in loop.location
    assert len({use.meta["location"] for use in loop.uses}) == 1


def test_calls_of_torchs_cells_are_kept_apart() -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(F, H)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), H)
            for now in x.unbind(1):
                h = self.cell(now, h)
            return h

    (loop,) = loops(Cells(), x())
    assert (loop.kind, len(loop.native)) == ("time", T)
