"""The recorded graph: which nodes, what they know, and that recording changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import recorded
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnguard.inspection.recording import Recording, record, tensors_in

F, H, T, B = 3, 4, 5, 2


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(F, F), nn.Tanh())
        self.lstm = nn.LSTM(F, H, batch_first=True)
        self.norm = nn.LayerNorm(H)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(self.encoder(x))
        return self.norm(out[:, -1])


class InPlace(nn.Module):
    """A cell loop that writes each state into a tensor made beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(F, H)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(B, T, H)
        h = x.new_zeros(B, H)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            out[:, t] = h
        return out * 2


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(F, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([2, 5])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0].tanh()


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(F, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn.forward(x)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "normed": Normed,
    "in-place": InPlace,
    "packing": Packing,
    "direct": Direct,
}
every_model = pytest.mark.parametrize("name", MODELS)


def names(recording: Recording) -> list[str]:
    return [node.meta.get("name", node.op) for node in recording.graph.nodes]


def node(recording: Recording, name: str) -> fx.Node:
    (found,) = (n for n in recording.graph.nodes if n.meta.get("name") == name)
    return found


def line(location: str) -> str:
    file, number = location.rsplit(":", 1)
    return Path(file).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip()


@every_model
def test_the_output_is_unchanged(name: str) -> None:
    model, x = MODELS[name](), torch.randn(B, T, F)
    plain = model(x)
    recording = recorded(model, x)
    assert torch.equal(recording.result, plain)
    assert recording.result.grad_fn is not None


@every_model
def test_recording_draws_no_random_number(name: str) -> None:
    model, x = MODELS[name](), torch.randn(B, T, F)
    before = torch.get_rng_state()
    recorded(model, x)
    assert torch.equal(torch.get_rng_state(), before)


@every_model
def test_two_runs_have_the_same_graph(name: str) -> None:
    model, x = MODELS[name](), torch.randn(B, T, F)
    first, second = recorded(model, x), recorded(model, x)
    assert names(first) == names(second)
    assert len(first.order) == len(list(first.graph.nodes))


@every_model
def test_the_graph_is_in_order_and_ends_with_the_output(name: str) -> None:
    recording = recorded(MODELS[name](), torch.randn(B, T, F))
    nodes = list(recording.graph.nodes)
    assert [n.meta["order"] for n in nodes] == list(range(len(nodes)))
    assert (nodes[0].op, nodes[-1].op) == ("placeholder", "output")
    for n in nodes:
        assert all(parent.meta["order"] < n.meta["order"] for parent in n.all_input_nodes)


def test_a_node_knows_its_module_shape_and_line() -> None:
    recording = recorded(Normed(), torch.randn(B, T, F))
    norm = node(recording, "layer_norm")
    assert (norm.meta["module"], norm.meta["shape"]) == ("norm", (B, H))
    assert line(norm.meta["location"]) == "return self.norm(out[:, -1])"
    step = node(recording, "__getitem__")
    assert (step.meta["module"], step.args[1]) == ("", (slice(None), -1))
    assert line(step.meta["location"]) == "return self.norm(out[:, -1])"
    assert node(recording, "linear").meta["module"] == "encoder.0"


def test_values_flow_from_the_input_to_the_output() -> None:
    recording = recorded(Normed(), torch.randn(B, T, F))
    chain = [node(recording, name) for name in ("linear", "tanh", "lstm")]
    assert chain[1].args == (chain[0],)
    assert chain[2].args[0] is chain[1]
    assert chain[0].args[0] is next(iter(recording.graph.nodes))
    (output,) = (n for n in recording.graph.nodes if n.op == "output")
    assert output.args == ((node(recording, "layer_norm"),),)
    weight = chain[0].args[1]
    assert isinstance(weight, fx.Node)
    assert (weight.meta["name"], weight.target) == ("parameter", "encoder.0.weight")


def test_a_native_call_is_kept_with_its_tensors() -> None:
    model = Normed()
    (call,) = recorded(model, torch.randn(B, T, F)).calls
    assert (call.kind, call.module, call.batch_first) == ("lstm", model.lstm, True)
    assert (call.input.shape, call.batch_sizes, len(call.state)) == ((B, T, F), None, 2)
    assert [id(w) for w in call.weights] == [id(p) for p in model.lstm.parameters()]
    assert call.location is not None
    assert line(call.location) == "out, _ = self.lstm(self.encoder(x))"


def test_a_call_past_the_hooks_is_seen() -> None:
    model = Direct()
    fired: list[int] = []
    model.rnn.register_forward_hook(lambda *_: fired.append(1))
    (call,) = recorded(model, torch.randn(T, B, F)).calls
    assert (call.kind, call.module, fired) == ("rnn_tanh", model.rnn, [])


def test_a_packed_call_is_kept_with_its_sizes() -> None:
    (call,) = recorded(Packing(), torch.randn(B, T, F)).calls
    assert (call.kind, call.batch_first) == ("gru", False)
    assert call.batch_sizes is not None
    assert call.batch_sizes.tolist() == [2, 2, 1, 1, 1]
    assert call.input.shape == (7, F)


def test_every_turn_of_a_loop_is_a_call() -> None:
    model = InPlace()
    calls = recorded(model, torch.randn(B, T, F)).calls
    assert [call.kind for call in calls] == ["gru_cell"] * T
    assert all(call.module is model.cell for call in calls)
    assert [call.order for call in calls] == sorted(call.order for call in calls)
    assert {call.location for call in calls} == {calls[0].location}


def test_a_write_in_place_stands_between_what_was_written_and_what_is_read() -> None:
    recording = recorded(InPlace(), torch.randn(B, T, F))
    writes = [n for n in recording.graph.nodes if n.meta.get("name") == "__setitem__"]
    assert len(writes) == T
    assert [write.args[2] for write in writes] == [call.node for call in recording.calls]
    for earlier, later in pairwise(writes):
        assert later.args[0] is earlier
    assert node(recording, "mul").args[0] is writes[-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x.__iadd__(1),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.relu_(x),
        lambda x: x.__setitem__(0, 5.0),
    ],
)
def test_what_is_read_after_a_change_in_place_is_the_change(
    change: Callable[[Tensor], object],
) -> None:
    def run() -> Tensor:
        x = torch.ones(3)
        change(x)
        return x * 2

    recording = record(run, nn.Identity())
    read = node(recording, "mul").args[0]
    assert isinstance(read, fx.Node)
    assert read.meta["name"] not in ("ones", "constant")


def test_several_results_are_parts() -> None:
    recording = record(lambda: torch.ones(4, 2).split(3), nn.Identity())
    parts = [n for n in recording.graph.nodes if n.meta.get("name") == "item"]
    assert [(p.meta["part"], p.meta["shape"]) for p in parts] == [(0, (3, 2)), (1, (1, 2))]
    assert all(p.args[0] is node(recording, "split") for p in parts)


def test_questions_of_shape_are_no_nodes() -> None:
    def run() -> int:
        x = torch.ones(4, 2)
        return x.size(0) + x.dim() + len(x) + x.shape[1] + x.numel() + int(x.requires_grad)

    recording = record(run, nn.Identity())
    assert recording.result == 4 + 2 + 4 + 2 + 8
    assert names(recording) == ["ones", "output"]


def test_a_node_knows_whether_gradient_passes() -> None:
    def run() -> Tensor:
        with torch.no_grad():
            x = torch.ones(2).exp()
        return x.tanh()

    recording = record(run, nn.Identity())
    assert not node(recording, "exp").meta["grad"]
    assert node(recording, "tanh").meta["grad"]


def test_an_error_passes_through_and_the_recorder_is_gone() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        record(fail, nn.Identity())
    assert torch.overrides._get_current_function_mode() is None


def test_no_tensor_is_held_afterwards() -> None:
    """A state made in the run and let go by it must be freed, or memory doubles."""
    import gc
    import weakref

    seen: list[Any] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            between = x * 2
            seen.append(weakref.ref(between))
            return (between + 1).detach()

    recording = recorded(Watched(), torch.ones(2))
    gc.collect()
    assert seen[0]() is None
    assert recording.result.tolist() == [3.0, 3.0]


@dataclass
class Output:
    logits: Tensor
    extra: dict[str, list[Tensor]]


def test_tensors_are_found_in_nests() -> None:
    a, b, c, d = (torch.zeros(n) for n in range(4))
    nest = (a, {"x": [b]}, Output(c, {"y": [d]}), "text", 3, None)
    assert [len(t) for t in tensors_in(nest)] == [0, 1, 2, 3]
    assert list(tensors_in("none")) == []


def test_outputs_in_nests_reach_the_output_node() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x.exp(), {"y": [x.tanh()]})

    recording = recorded(Nested(), torch.ones(2))
    (output,) = (n for n in recording.graph.nodes if n.op == "output")
    assert [n.meta["name"] for n in output.all_input_nodes] == ["exp", "tanh"]


# --- places in the autograd graph


def real_nodes(recording: Recording) -> list[fx.Node]:
    return [n for n in recording.graph.nodes if n.meta.get("real")]


def test_a_value_knows_its_place_in_the_autograd_graph() -> None:
    """The gradient at that place is the gradient of the value, also behind changes in place."""
    weight = torch.tensor(2.0, requires_grad=True)

    def run() -> Tensor:
        first = weight.exp()
        second = first * 0.1
        second.add_(0.1)
        second.tanh_()
        return second.sin()

    recording = record(run, nn.Identity())
    edge = node(recording, "exp").meta["edge"]
    (found,) = torch.autograd.grad(recording.result, [edge])
    second = (0.1 * weight.detach().exp() + 0.1).tanh()
    exact = second.cos() * (1 - second**2) * 0.1
    assert float(found) == pytest.approx(float(exact), rel=1e-6)


def test_no_gradient_no_place() -> None:
    weight = torch.ones(2, requires_grad=True)

    def run() -> Tensor:
        with torch.no_grad():
            hidden = weight.exp()
        return weight.tanh().detach() + hidden

    recording = record(run, nn.Identity())
    assert "edge" in node(recording, "tanh").meta
    for name in ("exp", "detach", "add"):
        assert "edge" not in node(recording, name).meta


def test_real_values_are_told_from_ids_and_masks() -> None:
    def run() -> Tensor:
        x = torch.ones(3)
        return x[(x > 0).nonzero().squeeze(1)] + x.to(torch.complex64)

    recording = record(run, nn.Identity())
    assert {n.meta["name"] for n in real_nodes(recording)} == {"ones", "__getitem__", "to", "add"}


def test_inputs_have_their_shape() -> None:
    recording = recorded(nn.Identity(), torch.ones(4, 2))
    first = next(iter(recording.graph.nodes))
    assert (first.op, first.meta["shape"], first.meta["real"]) == ("placeholder", (4, 2), True)


# --- calls that bypass the recorder


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * x * w

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return 2 * gradients[0] * x * w, (gradients[0] * x * x).sum(0)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def scripted_square(x: Tensor, w: Tensor) -> Tensor:
        return x * x * w


class Unseen(nn.Module):
    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.w = nn.Linear(F, H), nn.Parameter(torch.ones(H))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        given = self.into(x)
        found = self.call(given, self.w)
        return found.tanh()


@pytest.mark.parametrize("call", [Square.apply, scripted_square], ids=["custom", "scripted"])
def test_a_call_that_is_not_seen_is_joined_on(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    recording = recorded(Unseen(call), torch.randn(B, F))
    unseen = node(recording, "unrecorded")
    sources = {str(n.target) if n.op == "get_attr" else n.meta["name"]
               for n in unseen.all_input_nodes}  # fmt: skip
    assert sources == {"linear", "w"}
    assert node(recording, "tanh").args[0] is unseen
    assert unseen.meta["shape"] == (B, H)
    assert "edge" in unseen.meta


def test_an_unseen_call_stands_where_its_latest_source_does() -> None:
    """And not where its result is read, which may be far behind the loop that made it."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(F))

        def forward(self, x: Tensor) -> Tensor:
            found = []
            for now in x:
                moved = now * self.w
                found.append(Square.apply(moved, self.w))
            return torch.stack(found)

    recording = recorded(Kept(), torch.randn(T, F))
    unseen = [n for n in recording.graph.nodes if n.meta.get("name") == "unrecorded"]
    assert len(unseen) == T
    assert {line(n.meta["location"]) for n in unseen} == {"moved = now * self.w"}


def test_an_unseen_call_is_joined_to_the_one_part_that_it_reads() -> None:
    def run() -> Tensor:
        parts = (torch.ones(T, F, requires_grad=True) * 2).unbind(0)
        found: Tensor = Square.apply(parts[1], torch.ones(F, requires_grad=True))
        return found.tanh()

    recording = record(run, nn.Identity())
    parts = [n.meta["part"] for n in node(recording, "unrecorded").all_input_nodes
             if n.meta["name"] == "item"]  # fmt: skip
    assert parts == [1]


# --- writing into views


@pytest.mark.parametrize(
    "write",
    [
        lambda buffer, value: buffer[1].copy_(value),
        lambda buffer, value: buffer.select(0, 1).add_(value),
        lambda buffer, value: buffer[1][:].copy_(value),
        lambda buffer, value: buffer.view(-1)[F : 2 * F].copy_(value),
    ],
)
def test_what_is_written_into_a_view_stands_in_its_base(
    write: Callable[[Tensor, Tensor], object],
) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            buffer = torch.zeros(2, F)
            write(buffer, x.exp())
            return buffer * 2

    recording = recorded(Writes(), torch.ones(F))
    read = node(recording, "mul").args[0]
    assert isinstance(read, fx.Node)
    assert (read.meta["name"], read.meta["shape"]) == ("written", (2, F))
    pending, behind = [read], set[Any]()
    while pending:
        reached = pending.pop()
        behind.add(reached.meta.get("name"))
        pending += reached.all_input_nodes
    assert {"exp", "zeros"} <= behind
