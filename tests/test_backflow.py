"""Products with the Jacobians of hand-written recurrences, against exact Jacobians of one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import recorded
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rnnguard.inspection.loops import Loop, find_loops
from rnnguard.probe.backflow import Backflow

F, H, T, B = 3, 4, 7, 5
State = tuple[Tensor, ...]


class Stepped(nn.Module):
    """A recurrence over x (T, B, F) that a subclass spells out as one step."""

    readout = 0

    def __init__(self, hidden: int = H) -> None:
        super().__init__()
        self.hidden = hidden
        generator = torch.Generator().manual_seed(3)
        for name, shape in self.shapes().items():
            value = torch.randn(*shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value / shape[-1] ** 0.5))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"w": (self.hidden, self.hidden), "v": (self.hidden, F)}

    def start(self, batch: int) -> State:
        return (torch.zeros(batch, self.hidden, dtype=torch.float64),)

    def step(self, x: Tensor, *state: Tensor) -> State:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = self.start(x.shape[1]), []
        for now in x:
            state = self.step(now, *state)
            outputs.append(state[self.readout])
        return torch.stack(outputs)


class Tanh(Stepped):
    def step(self, x: Tensor, *state: Tensor) -> State:
        return (torch.tanh(x @ self.v.t() + state[0] @ self.w.t()),)


class Gru(Stepped):
    """Resets the product, as torch does."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"w": (3 * self.hidden, self.hidden), "v": (3 * self.hidden, F)}

    def step(self, x: Tensor, *state: Tensor) -> State:
        (h,) = state
        a, b = (x @ self.v.t()).chunk(3, -1), (h @ self.w.t()).chunk(3, -1)
        r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
        return ((1 - z) * torch.tanh(a[2] + r * b[2]) + z * h,)


class GruResetBefore(Gru):
    """Resets the state before the product, as first published."""

    def step(self, x: Tensor, *state: Tensor) -> State:
        (h,) = state
        a = (x @ self.v.t()).chunk(3, -1)
        u_r, u_z, u_n = self.w.chunk(3)
        r, z = torch.sigmoid(a[0] + h @ u_r.t()), torch.sigmoid(a[1] + h @ u_z.t())
        return ((1 - z) * torch.tanh(a[2] + (r * h) @ u_n.t()) + z * h,)


class Lstm(Stepped):
    """Its state is (c, h), in the order in which a step makes them."""

    readout = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"w": (4 * self.hidden, self.hidden), "v": (4 * self.hidden, F)}

    def start(self, batch: int) -> State:
        return super().start(batch) * 2

    def step(self, x: Tensor, *state: Tensor) -> State:
        c, h = state
        i, f, g, o = (x @ self.v.t() + h @ self.w.t()).chunk(4, -1)
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        return c, torch.sigmoid(o) * torch.tanh(c)


class Peephole(Lstm):
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return super().shapes() | {"peep": (3, self.hidden)}

    def step(self, x: Tensor, *state: Tensor) -> State:
        c, h = state
        i, f, g, o = (x @ self.v.t() + h @ self.w.t()).chunk(4, -1)
        kept = torch.sigmoid(f + self.peep[1] * c) * c
        c = kept + torch.sigmoid(i + self.peep[0] * c) * torch.tanh(g)
        return c, torch.sigmoid(o + self.peep[2] * c) * torch.tanh(c)


class SideBySide(Lstm):
    """One tensor holds h and c, as many differential-equation solvers want it."""

    readout = 0

    def start(self, batch: int) -> State:
        return (torch.zeros(batch, 2 * self.hidden, dtype=torch.float64),)

    def step(self, x: Tensor, *state: Tensor) -> State:
        h, c = state[0].chunk(2, -1)
        c, h = super().step(x, c, h)
        return (torch.cat([h, c], -1) * 0.9,)


class IndRnn(Stepped):
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"u": (self.hidden,), "v": (self.hidden, F)}

    def step(self, x: Tensor, *state: Tensor) -> State:
        return (torch.relu(x @ self.v.t() + self.u * state[0] + 0.5),)


class Antisymmetric(Stepped):
    def step(self, x: Tensor, *state: Tensor) -> State:
        (h,) = state
        damping = 0.1 * torch.eye(self.hidden, dtype=h.dtype)
        a = h @ (self.w - self.w.t() - damping).t()
        return (h + 0.2 * torch.tanh(a + x @ self.v.t()),)


class Delayed(Stepped):
    """Reads its state of two steps ago."""

    readout = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return super().shapes() | {"u": (self.hidden, self.hidden)}

    def start(self, batch: int) -> State:
        return super().start(batch) * 2

    def step(self, x: Tensor, *state: Tensor) -> State:
        before, now = state
        return now, torch.tanh(now @ self.u.t() + before @ self.w.t() + x @ self.v.t())


class Convolutional(Stepped):
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"w": (2, 2, 3), "v": (2, F)}

    def start(self, batch: int) -> State:
        return (torch.zeros(batch, 2, 6, dtype=torch.float64),)

    def step(self, x: Tensor, *state: Tensor) -> State:
        seen = (x @ self.v.t())[..., None]
        return (torch.tanh(functional.conv1d(state[0], self.w, padding=1) + seen),)


class Stacked(Stepped):
    """Two layers in one tensor (layers, batch, hidden)."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return super().shapes() | {"between": (self.hidden, self.hidden)}

    def start(self, batch: int) -> State:
        return (torch.zeros(2, batch, self.hidden, dtype=torch.float64),)

    def step(self, x: Tensor, *state: Tensor) -> State:
        (both,) = state
        low = torch.tanh(x @ self.v.t() + both[0] @ self.w.t())
        high = torch.tanh(low @ self.between.t() + both[1] @ self.w.t())
        return (torch.stack([low, high]) * 0.9,)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 1]


class TopDown(Stacked):
    """The lower layer reads the upper one, and not the other way round."""

    def step(self, x: Tensor, *state: Tensor) -> State:
        (both,) = state
        low = torch.tanh(x @ self.v.t() + both[0] @ self.w.t() + both[1] @ self.between.t())
        return (torch.stack([low, torch.tanh(both[1] @ self.w.t() + 0.5)]) * 0.9,)


class BatchSecond(Stepped):
    """Its state is (hidden, batch)."""

    def start(self, batch: int) -> State:
        return (torch.zeros(self.hidden, batch, dtype=torch.float64),)

    def step(self, x: Tensor, *state: Tensor) -> State:
        return (torch.tanh(self.v @ x.t() + self.w @ state[0]),)


class BatchNormed(Stepped):
    """Every sequence reads the statistics of all of them."""

    def step(self, x: Tensor, *state: Tensor) -> State:
        a = state[0] @ self.w.t()
        return (torch.tanh(functional.batch_norm(a, None, None, training=True) + x @ self.v.t()),)


def time_loop(model: nn.Module, *inputs: Any) -> Loop:
    (loop,) = find_loops(recorded(model, *inputs).graph)
    assert loop.kind == "time"
    return loop


def flow_of(model: nn.Module, *inputs: Any) -> Backflow:
    return Backflow(time_loop(model, *inputs).carried.states)


def data(steps: int = T, batch: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, batch, F, generator=generator, dtype=torch.float64)


def whole_jacobians(model: Stepped, x: Tensor, axes: State | Any) -> list[Tensor]:
    """(B, n, B, n) between the joint states behind each step and the next, by reverse mode.

    `axes` has the axis of the batch in each part of the state.
    """
    state, found = model.start(x.shape[1]), []

    def flat(parts: State) -> Tensor:
        apart = [p.movedim(a, 0).flatten(1) for p, a in zip(parts, axes, strict=True)]
        return torch.cat(apart, 1)

    def unflat(joint: Tensor, like: State) -> State:
        parts, start = [], 0
        for part, axis in zip(like, axes, strict=True):
            moved = part.movedim(axis, 0)
            width = moved[0].numel()
            parts.append(joint[:, start : start + width].reshape(moved.shape).movedim(0, axis))
            start += width
        return tuple(parts)

    for position, now in enumerate(x):
        if position:
            before = state
            found.append(
                torch.func.jacrev(
                    lambda s, now=now, like=before: flat(model.step(now, *unflat(s, like)))
                )(flat(before)).detach()
            )
        state = tuple(part.detach() for part in model.step(now, *state))
    return found


def pulled(flow: Backflow, step: int) -> Tensor:
    """The Jacobian of every sequence (B, n, n'), by pulling each unit vector."""
    unit = torch.eye(flow.width, dtype=torch.float64).expand(flow.sequences, -1, -1)
    return flow.pull(step, unit)


CELLS: dict[str, tuple[Callable[[], Stepped], tuple[int, ...]]] = {
    "tanh": (Tanh, (0,)),
    "gru": (Gru, (0,)),
    "gru-reset-before": (GruResetBefore, (0,)),
    "lstm": (Lstm, (0, 0)),
    "peephole": (Peephole, (0, 0)),
    "side-by-side": (SideBySide, (0,)),
    "indrnn": (IndRnn, (0,)),
    "antisymmetric": (Antisymmetric, (0,)),
    "delayed": (Delayed, (0, 0)),
    "convolutional": (Convolutional, (0,)),
    "stacked": (Stacked, (1,)),
    "top-down": (TopDown, (1,)),
    "batch-second": (BatchSecond, (1,)),
    "batch-is-hidden": (lambda: Tanh(B), (0,)),
}


@pytest.mark.parametrize("name", CELLS)
def test_pull_is_the_exact_jacobian(name: str) -> None:
    make, axes = CELLS[name]
    model, x = make(), data()
    flow = flow_of(model, x)
    oracle = whole_jacobians(model, x, axes)
    assert (flow.sequences, flow.steps, len(oracle)) == (B, T, T - 1)
    rows = torch.arange(B)
    for step, exact in enumerate(oracle, 1):
        own = exact[rows, :, rows]
        found = pulled(flow, step)
        # What is still as it was given before the first step is no state of the loop yet.
        own = own[..., -found.shape[-1] :]
        assert own.abs().max() > 1e-3
        assert found.shape[-1] == flow.width or (name, step) == ("delayed", 1)
        assert torch.allclose(found, own, rtol=0, atol=1e-10)


def test_sequences_that_read_each_other_are_one() -> None:
    model, x = BatchNormed(), data()
    flow = flow_of(model, x)
    assert (flow.sequences, flow.width) == (1, B * H)
    for step, exact in enumerate(whole_jacobians(model, x, (0,)), 1):
        found = pulled(flow, step)[0].reshape(B, H, B, H)
        assert torch.allclose(found, exact, rtol=0, atol=1e-10)


def test_one_sequence_alone_is_one() -> None:
    model, x = Tanh(), data(batch=1)
    flow = flow_of(model, x)
    assert (flow.sequences, flow.width) == (1, H)
    for step, exact in enumerate(whole_jacobians(model, x, (0,)), 1):
        assert torch.allclose(pulled(flow, step), exact[:, :, 0], rtol=0, atol=1e-10)


class ComplexDiagonal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        angle = torch.rand(H, generator=generator, dtype=torch.float64)
        self.decay = nn.Parameter(torch.polar(torch.full_like(angle, 0.9), 6 * angle))
        self.v = nn.Parameter(torch.randn(H, F, generator=generator, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros(x.shape[1], H, dtype=torch.complex128), []
        for now in x.to(torch.complex128):
            h = self.decay * h + now @ self.v.t()
            outputs.append(h.real)
        return torch.stack(outputs)


def test_complex_numbers_count_as_two() -> None:
    model = ComplexDiagonal()
    flow = flow_of(model, data())
    decay = model.decay.detach()
    exact = torch.zeros(2 * H, 2 * H, dtype=torch.float64)
    for unit, value in enumerate(decay.tolist()):
        turn = torch.tensor([[value.real, -value.imag], [value.imag, value.real]])
        exact[2 * unit : 2 * unit + 2, 2 * unit : 2 * unit + 2] = turn
    assert (flow.sequences, flow.width) == (B, 2 * H)
    assert torch.allclose(pulled(flow, 3), exact.expand(B, -1, -1), rtol=0, atol=1e-7)


class Packed(Tanh):
    """Steps through packed data; sequences that have ended drop out of the batch."""

    def forward(self, x: Any) -> Tensor:
        packed: PackedSequence = x
        (state,), outputs, start = self.start(int(packed.batch_sizes[0])), [], 0
        for size in packed.batch_sizes.tolist():
            (state,) = self.step(packed.data[start : start + size], state[:size])
            outputs.append(state)
            start += size
        return torch.cat(outputs)


def test_sequences_that_have_ended_drop_out() -> None:
    model, x, lengths = Packed(), data(), [7, 6, 4, 4, 4]
    packed = pack_sequence([x[:n, b] for b, n in enumerate(lengths)])
    flow = flow_of(model, packed)
    assert (flow.sequences, flow.width) == (1, H)  # the longest goes on alone
    for step in range(1, T):
        alive = sum(n > step for n in lengths)
        part = whole_jacobians(model, x[:, :alive], (0,))[step - 1]
        rows = torch.arange(alive)
        unit = torch.eye(H, dtype=torch.float64).expand(max(alive, flow.sequences), -1, -1)
        found = flow.pull(step, unit)
        own = part[rows, :, rows]
        assert torch.allclose(found[:alive], own, rtol=0, atol=1e-10)


class Cut(Tanh):
    """Lets go of the past every three steps, in one of the ways that there are."""

    def __init__(self, way: Callable[[Tensor], Tensor], every: int = 3) -> None:
        super().__init__()
        self.way, self.every = way, every

    def forward(self, x: Tensor) -> Tensor:
        (h,), outputs = self.start(x.shape[1]), []
        for position, now in enumerate(x):
            if position and position % self.every == 0:
                h = self.way(h)
            (h,) = self.step(now, h)
            outputs.append(h)
        return torch.stack(outputs)


def copied_without_gradient(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h * 1.0


@pytest.mark.parametrize("way", [Tensor.detach, lambda h: h.data, copied_without_gradient])
def test_pieces_end_where_no_gradient_passes(way: Callable[[Tensor], Tensor]) -> None:
    flow = flow_of(Cut(way), data())
    assert flow.pieces == [range(1, 4), range(4, 7), range(7, 8)]
    last = flow.within(flow.pieces[1])
    assert (last.steps, last.sequences) == (3, B)
    assert torch.equal(pulled(last, 1), pulled(flow, 4))


def test_without_a_cut_there_is_one_piece() -> None:
    assert flow_of(Tanh(), data()).pieces == [range(1, T + 1)]


class BurnIn(Tanh):
    """Warms its state up on the first four steps, without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = self.start(x.shape[1]), []
        with torch.no_grad():
            for now in x[:4]:
                state = self.step(now, *state)
        for now in x[4:]:
            state = self.step(now, *state)
            outputs.append(state[0])
        return torch.stack(outputs)


def test_a_burn_in_is_no_part_of_the_last_piece() -> None:
    flow = flow_of(BurnIn(), data())
    assert flow.pieces[-1] == range(5, T + 1)
    assert flow.steps == T


class NoBatchOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (g,) = gradients
        (y,) = ctx.saved_tensors
        return g * (1 - y**2) if float(g.detach().abs().sum()) >= 0 else g


class Unbatched(Tanh):
    def step(self, x: Tensor, *state: Tensor) -> State:
        a = x @ self.v.t() + state[0] @ self.w.t()
        found: Tensor = NoBatchOfGradients.apply(a)
        return (found,)


def test_calls_without_batches_of_gradients_are_pulled_one_by_one() -> None:
    plain, other = flow_of(Tanh(), data()), flow_of(Unbatched(), data())
    assert other.sequences == B
    for step in range(1, T):
        assert torch.allclose(pulled(other, step), pulled(plain, step), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["lstm", "delayed", "stacked"])
def test_the_graph_serves_a_training_step_afterwards(name: str) -> None:
    """Bitwise the gradients of a model that was never probed: no hook, no freed buffer is left."""
    make, _ = CELLS[name]
    untouched, probed = make(), make()
    untouched(data()).square().sum().backward()
    recording = recorded(probed, data())
    (loop,) = find_loops(recording.graph)
    flow = Backflow(loop.carried.states)
    for step in range(1, flow.steps):
        pulled(flow, step)
    assert all(parameter.grad is None for parameter in probed.parameters())
    recording.result.square().sum().backward()
    for one, other in zip(untouched.parameters(), probed.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_hooks_are_gone_when_a_product_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recorded(Tanh(), data())
    (loop,) = find_loops(recording.graph)
    flow, plain = Backflow(loop.carried.states), Tanh()
    before = pulled(flow, 2)

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", fail)
        with pytest.raises(MemoryError):
            pulled(flow, 2)
    assert torch.equal(pulled(flow, 2), before)
    recording.result.sum().backward()
    plain(data()).sum().backward()
    for one in plain.parameters():
        assert one.grad is not None and one.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_are_kept_in_single_precision_or_better(dtype: torch.dtype) -> None:
    flow = flow_of(Low(dtype), data().to(dtype))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert flow.like.dtype == kept
    unit = torch.eye(H, dtype=kept).expand(B, -1, -1)
    exact = flow_of(Tanh(), data()).pull(2, unit.double())
    found = flow.pull(2, unit)
    assert found.dtype == kept
    assert torch.allclose(found.double(), exact, rtol=0, atol=20 * torch.finfo(dtype).eps)


class Low(Tanh):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.to(dtype)

    def start(self, batch: int) -> State:
        return (torch.zeros(batch, self.hidden, dtype=self.w.dtype),)
