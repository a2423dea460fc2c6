"""One simple recurrence, stepped and gathered in every way that Python offers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor, nn

from zoo.specimen import drawn, floats, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class Loop(nn.Module):
    """x2h and h2h; each way of looping below has its own forward over (T, B, F)."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h = nn.Linear(FEATURES, HIDDEN)
        self.h2h = nn.Linear(HIDDEN, HIDDEN)

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.size(1), HIDDEN)

    def step(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.x2h(x) + self.h2h(h))


class Preallocated(Loop):
    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.zeros(x.size(0), x.size(1), HIDDEN)
        h = self.start(x)
        for t in range(x.size(0)):
            h = self.step(h, x[t])
            outputs[t] = h
        return outputs


class GrowingCat(Loop):
    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        outputs = torch.empty(0, x.size(1), HIDDEN)
        for x_t in x:
            h = self.step(h, x_t)
            outputs = torch.cat([outputs, h[None]], dim=0)
        return outputs


class Comprehension(Loop):
    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        return torch.stack([h := self.step(h, x_t) for x_t in x])


class Accumulated(Loop):
    def forward(self, x: Tensor) -> Tensor:
        states = accumulate(x.unbind(0), self.step, initial=self.start(x))
        return torch.stack(list(states)[1:])


class Reduced(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return reduce(self.step, x.unbind(0), self.start(x))


class Recursive(Loop):
    def states(self, x: Tensor) -> list[Tensor]:
        if len(x) == 0:
            return [self.start(x)]
        before = self.states(x[:-1])
        return [*before, self.step(before[-1], x[-1])]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.states(x)[1:])


class While(Loop):
    def forward(self, x: Tensor) -> Tensor:
        h, t, outputs = self.start(x), 0, []
        while t < x.shape[0]:
            h = self.step(h, x[t, :, :])
            outputs.append(h)
            t += 1
        return torch.stack(outputs, dim=0)


class Generated(Loop):
    def unroll(self, x: Tensor) -> Iterator[Tensor]:
        h = self.start(x)
        for x_t in x:
            h = self.step(h, x_t)
            yield h

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(tuple(self.unroll(x)))


class ByIndex(Loop):
    """The state before is looked up in the list of all states."""

    def forward(self, x: Tensor) -> Tensor:
        hs = {-1: self.start(x)}
        for t in range(x.size(0)):
            hs[t] = self.step(hs[t - 1], x[t])
        return torch.stack([hs[t] for t in range(x.size(0))])


class InPlace(Loop):
    """A leaky state updated in place on a copy."""

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = self.start(x), []
        for x_t in x:
            new = self.step(h, x_t)
            h = h.clone()
            h.mul_(0.5).add_(0.5 * new)
            outputs.append(h)
        return torch.stack(outputs)


class IntoSlice(Loop):
    """h[:] = ... on a fresh tensor; samples that are done keep their state."""

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = self.start(x), []
        for x_t in x:
            new = state.clone()
            new[:2] = self.step(state[:2], x_t[:2])
            new[2:] = self.step(state[2:], x_t[2:])
            state = new
            outputs.append(state)
        return torch.stack(outputs)


class Queue(Loop):
    """A deque of the last two states, of which the older one is read as well."""

    def forward(self, x: Tensor) -> Tensor:
        past = deque([self.start(x), self.start(x)], maxlen=2)
        outputs = []
        for x_t in x:
            past.append(self.step(past[-1] + 0.5 * past[0], x_t))
            outputs.append(past[-1])
        return torch.stack(outputs)


class FromTheEnd(Loop):
    """Only backward in time."""

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = self.start(x), [torch.empty(0)] * len(x)
        for t in reversed(range(len(x))):
            h = self.step(h, x[t])
            outputs[t] = h
        return torch.stack(outputs)


def lstm_step(params: nn.ParameterDict, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple:
    """A free function that gets its parameters handed in."""
    h, c = state
    i, f, g, o = (
        x @ params[f"w_{name}"] + h @ params[f"u_{name}"] + params[f"b_{name}"] for name in "ifgo"
    )
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class FreeFunction(nn.Module):
    """Parameters in a ParameterDict, the step at module level."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"w": (FEATURES, HIDDEN), "u": (HIDDEN, HIDDEN), "b": (HIDDEN,)}
        self.params = nn.ParameterDict(
            {
                f"{k}_{g}": nn.Parameter(torch.randn(s) * 0.2)
                for g in "ifgo"
                for k, s in shapes.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        state, out = (torch.zeros(x.size(1), HIDDEN),) * 2, []
        for x_t in x:
            state = lstm_step(self.params, x_t, state)
            out.append(state[0])
        return torch.stack(out)


class Listed(nn.Module):
    """A ParameterList unpacked before the loop."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(FEATURES, HIDDEN), (HIDDEN, HIDDEN), (1, HIDDEN)]
        self.params = nn.ParameterList(nn.Parameter(torch.randn(s) * 0.3) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        wx, wh, b = self.params
        h, out = b.expand(x.size(1), -1), []
        for driven in x @ wx + b:
            h = torch.sin(driven + h @ wh)
            out.append(h)
        return torch.stack(out)


class Cell(torch.autograd.Function):
    """tanh(a + h W) with the backward written out."""

    @staticmethod
    def forward(ctx, a: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        out = torch.tanh(a + h @ weight)
        ctx.save_for_backward(h, weight, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, weight, out = ctx.saved_tensors
        inner = grad * (1 - out * out)
        return inner, inner @ weight.t(), h.t() @ inner


class OwnBackward(nn.Module):
    """The step is a custom autograd.Function."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(FEATURES, HIDDEN)
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for a in self.lin(x):
            h = Cell.apply(a, h, self.weight)
            out.append(h)
        return torch.stack(out)


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))
H2H = ("h2h.weight",)
GATES = tuple(f"params.u_{gate}" for gate in "ifgo")

SPECIMENS = (
    written("preallocated", Preallocated, TIME_MAJOR, 11, H2H, "outputs[t] = h"),
    written("growing-cat", GrowingCat, TIME_MAJOR, 11, H2H, "outputs grow by cat"),
    written("comprehension", Comprehension, TIME_MAJOR, 11, H2H, "walrus in a comprehension"),
    written("accumulate", Accumulated, TIME_MAJOR, 11, H2H, "itertools.accumulate"),
    written("reduce", Reduced, TIME_MAJOR, 11, H2H, "functools.reduce", causal=False),
    written("recursion", Recursive, TIME_MAJOR, 11, H2H, "no loop at all"),
    written("while", While, TIME_MAJOR, 11, H2H, "a while loop"),
    written("generator", Generated, TIME_MAJOR, 11, H2H, "states are yielded"),
    written("states-by-index", ByIndex, TIME_MAJOR, 11, H2H, "hs[t - 1]"),
    written("in-place", InPlace, TIME_MAJOR, 11, H2H, "mul_ and add_ on a copy"),
    written("into-slices", IntoSlice, TIME_MAJOR, 11, H2H, "new[:2] = step(state[:2])"),
    written("queue", Queue, TIME_MAJOR, 11, H2H, "a deque of two states"),
    written("from-the-end", FromTheEnd, TIME_MAJOR, 11, H2H, "backward in time", causal=False),
    written("free-function", FreeFunction, TIME_MAJOR, 11, GATES, "step(params, x, state)"),
    written("parameter-list", Listed, TIME_MAJOR, 11, ("params.1",), "wx, wh, b = params; sine"),
    written("own-backward", OwnBackward, TIME_MAJOR, 11, ("weight",), "autograd.Function"),
)  # fmt: skip
