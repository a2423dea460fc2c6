"""The specimens of the zoo are what they say of themselves."""

from __future__ import annotations

import linecache
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached
from torch.overrides import TorchFunctionMode
from zoo import ZOO, Specimen

# A loop's head runs once more than its body.
HEAD = re.compile(r"\s*(for|while) ")
FOLDER = str(Path(__file__).with_name("zoo"))
CELLS = {torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell}
FUSED = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}

# The first LSTM with projections in a process warns that oneDNN has none.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
KEPT_GRAPH = {"rnn-stateful-graph", "state-kept"}

each = partial(pytest.mark.parametrize, "specimen", ids=lambda specimen: specimen.name)
WRITTEN = [s for s in ZOO if s.kind == "written"]
NATIVE = [s for s in ZOO if s.kind == "native"]
CAUSAL = [s for s in ZOO if s.causal]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an output, however deep it nests."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def run(specimen: Specimen, model: nn.Module | None = None, inputs: Any = None) -> list[Tensor]:
    torch.manual_seed(3)
    model = specimen.build() if model is None else model
    return list(tensors_in(model(*(specimen.inputs() if inputs is None else inputs))))


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A random direction through everything that carries a gradient."""
    generator = torch.Generator().manual_seed(5)
    parts = [
        (out * torch.randn(out.shape, generator=generator)).sum()
        for out in outputs
        if out.requires_grad
    ]
    return torch.stack(parts).sum()


def time_of(specimen: Specimen, tensor: Tensor) -> int | None:
    """The axis of time: the only one that is as long as the recurrence."""
    return list(tensor.shape).index(specimen.steps) if specimen.steps in tensor.shape else None


def over_time(specimen: Specimen, tensor: Tensor) -> Tensor:
    """The tensor with time first."""
    axis = time_of(specimen, tensor)
    assert axis is not None, f"no axis of {specimen.steps} steps in {tuple(tensor.shape)}"
    return tensor.movedim(axis, 0)


def test_the_zoo_is_full() -> None:
    kinds = Counter(specimen.kind for specimen in ZOO)
    assert len(ZOO) >= 90
    assert kinds["written"] >= 50
    assert kinds["native"] >= 20
    assert kinds["iterations"] + kinds["tree"] + kinds["none"] >= 12
    assert [name for name, n in Counter(s.name for s in ZOO).items() if n > 1] == []


@each(ZOO)
def test_trains_twice_unless_it_keeps_its_graph(specimen: Specimen) -> None:
    model = specimen.build()
    outputs = run(specimen, model)
    assert all(out.isfinite().all() for out in outputs)
    loss_of(outputs).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    again = loss_of(run(specimen, model))
    if specimen.name in KEPT_GRAPH:
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            again.backward()
    else:
        again.backward()


@each(ZOO)
def test_is_deterministic(specimen: Specimen) -> None:
    one, other = specimen.build(), specimen.build()
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    outputs = zip(run(specimen, one), run(specimen, other), strict=True)
    assert all(torch.equal(a, b) for a, b in outputs)


@each(ZOO)
def test_sizes_tell_time_from_everything_else(specimen: Specimen) -> None:
    state = specimen.build().state_dict()
    assert specimen.steps >= 0
    assert (specimen.steps > 0) == (specimen.kind != "none") == (specimen.sites > 0)
    assert {name for name, value in state.items() if specimen.steps in value.shape} == set()
    over_data = specimen.kind in {"native", "written"}
    assert not over_data or 7 <= specimen.steps <= 14
    for tensor in tensors_in(specimen.inputs()):
        assert list(tensor.shape).count(specimen.steps) <= over_data


class Counting(TorchFunctionMode):
    """Counts the native calls of each set of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: Counter[int] = Counter()
        self.fused: Counter[int] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in CELLS:
            self.cells[id(args[3])] += 1
        elif func in FUSED:
            packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
            self.fused[id(args[3 if packed else 2][1])] += 1
        return func(*args, **(kwargs or {}))


@each(NATIVE)
def test_native_calls_are_as_many_as_claimed(specimen: Specimen) -> None:
    inputs = specimen.inputs()
    with Counting() as counting, cached():
        run(specimen, inputs=inputs)
    assert len(counting.cells) + len(counting.fused) == specimen.sites
    assert all(calls == specimen.steps for calls in counting.cells.values())
    assert all(1 <= calls <= specimen.steps for calls in counting.fused.values())
    assert counting.cells or any(specimen.steps in t.shape for t in tensors_in(inputs))


def lines_run(action: Callable[[], object]) -> set[int]:
    """How often lines of the zoo ran, in all and within one call of their function."""
    counts: Counter[tuple[object, ...]] = Counter()
    frames: list[FrameType] = []  # kept, so that no two have the same id

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "call":
            frames.append(frame)
        elif event == "line" and not HEAD.match(
            linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        ):
            counts[frame.f_code, frame.f_lineno] += 1
            counts[id(frame), frame.f_lineno] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return set(counts.values())


@each([s for s in ZOO if s.kind in {"written", "iterations", "tree"}])
def test_a_line_runs_once_per_step(specimen: Specimen) -> None:
    model, inputs = specimen.build(), specimen.inputs()
    counts = lines_run(lambda: run(specimen, model, inputs))
    assert {specimen.steps, specimen.steps * specimen.sites} & counts


@each(WRITTEN)
def test_named_weights_get_gradient(specimen: Specimen) -> None:
    model = specimen.build()
    with Counting() as counting:
        loss_of(run(specimen, model)).backward()
    by_hand = specimen.sites - len(counting.cells) - len(counting.fused)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert 1 <= by_hand <= len(set(specimen.weights))
    assert set(specimen.weights) <= {*parameters, *buffers}
    for name in set(specimen.weights) - set(buffers):
        gradient = parameters[name].grad
        assert gradient is not None, f"{name}: no gradient"
        assert gradient.abs().max() > 0, f"{name}: gradient is zero"


@each(CAUSAL)
def test_does_not_look_ahead(specimen: Specimen) -> None:
    cut = specimen.steps // 2
    inputs = specimen.inputs()
    changed = specimen.inputs()
    for tensor in tensors_in(changed):
        if time_of(specimen, tensor) is not None and tensor.is_floating_point():
            over_time(specimen, tensor)[cut:] += 0.5
        elif time_of(specimen, tensor) is not None:
            later = over_time(specimen, tensor)[cut:]
            later.copy_((later + 1) % (later.max() + 1))
    before = over_time(specimen, run(specimen, inputs=inputs)[0])
    after = over_time(specimen, run(specimen, inputs=changed)[0])
    assert torch.equal(before[:cut], after[:cut])
    assert not torch.equal(before[cut:], after[cut:])


def timed_leaves(specimen: Specimen, model: nn.Module, inputs: Any) -> list[Tensor]:
    """What enters step by step: the inputs, or what embeddings make of ids during the run."""
    timed = [
        tensor.requires_grad_()
        for tensor in tensors_in(inputs)
        if time_of(specimen, tensor) is not None and tensor.is_floating_point()
    ]
    if not timed:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda _module, _ids, out: timed.append(out))
    return timed


def reach(specimen: Specimen, step: int) -> int:
    """From how many steps back the output of one step gets gradient."""
    model, inputs = specimen.build(), specimen.inputs()
    timed = timed_leaves(specimen, model, inputs)
    output = over_time(specimen, run(specimen, model, inputs)[0])[step]
    gradients = torch.autograd.grad(output.square().sum(), timed, allow_unused=True)
    felt = [torch.zeros_like(t) if g is None else g for t, g in zip(timed, gradients, strict=True)]
    if time_of(specimen, felt[0]) is None:  # one look-up per step
        amounts = torch.stack([gradient.abs().sum() for gradient in felt])
    else:
        amounts = sum(over_time(specimen, gradient).flatten(1).abs().sum(1) for gradient in felt)
    assert len(amounts) == specimen.steps
    reached = amounts.nonzero()
    return step + 1 - int(reached.min()) if len(reached) else 0


@each(CAUSAL)
def test_gradient_passes_the_claimed_window(specimen: Specimen) -> None:
    if specimen.window is None:
        assert reach(specimen, specimen.steps - 1) == specimen.steps
    else:
        reaches = [reach(specimen, step) for step in range(specimen.steps)]
        assert max(reaches) == specimen.window
