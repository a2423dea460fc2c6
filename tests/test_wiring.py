"""Which places of which weights the state enters, and which biases open its gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from rnnguard.inspection.loops import find_loops
from rnnguard.inspection.recording import record
from rnnguard.inspection.wiring import Entry, Gate, GateBias, Wiring, wiring_of

IN, H, T, B = 5, 8, 9, 3


class Loop(nn.Module):
    """Steps `cell(parts, x_t, h, c)` through time; `parts` are its layers and weights."""

    def __init__(self, step: Callable[[Loop, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]):
        super().__init__()
        self.x, self.h = nn.Linear(IN, 4 * H), nn.Linear(H, 4 * H)
        self.joint = nn.Linear(IN + H, 4 * H)
        self.w, self.b = nn.Parameter(torch.randn(H, H)), nn.Parameter(torch.zeros(H))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(len(x), H), x.new_zeros(len(x), H)
        for x_t in x.unbind(1):
            h, c = self.step(self, x_t, h, c)
        return h


def wired(step: Callable[[Loop, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Wiring:
    torch.manual_seed(0)
    model, x = Loop(step), torch.randn(B, T, IN)
    (loop,) = find_loops(record(lambda: model(x), model, x).graph)
    return wiring_of(loop)


def lstm(order: str) -> Callable[[Loop, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(m: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gate = dict(zip(order, (m.x(x) + m.h(h)).chunk(4, -1), strict=True))
        c = gate["f"].sigmoid() * c + gate["i"].sigmoid() * gate["g"].tanh()
        return gate["o"].sigmoid() * c.tanh(), c

    return step


def block(order: str, name: str) -> tuple[int, int]:
    start = order.index(name) * H
    return start, start + H


@pytest.mark.parametrize("order", ["ifgo", "fiog", "ogif", "gofi"])
def test_an_lstm_is_understood_in_any_order_of_its_gates(order: str) -> None:
    found = wired(lstm(order))
    assert found.entries == (Entry("h.weight", 1, 0, H),)
    keep = tuple(GateBias(n, *block(order, "f"), 1) for n in ("x.bias", "h.bias"))
    write = tuple(GateBias(n, *block(order, "i"), 1) for n in ("x.bias", "h.bias"))
    assert found.gates == (Gate(keep, write),)


def test_the_state_beside_the_input_has_its_own_places() -> None:
    def step(m: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = m.joint(torch.cat((h, x), 1)).split(H, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    found = wired(step)
    assert found.entries == (Entry("joint.weight", 1, 0, H),)
    assert found.gates == (
        Gate((GateBias("joint.bias", H, 2 * H, 1),), (GateBias("joint.bias", 0, H, 1),)),
    )


@pytest.mark.parametrize(
    ("update", "sign"),
    [
        (lambda z, h, n: z * h + (1 - z) * n, 1),
        (lambda z, h, n: (1 - z) * h + z * n, -1),
        (lambda z, h, n: n + z * (h - n), 1),
        (lambda z, h, n: h + z * (n - h), -1),
        (lambda z, h, n: torch.lerp(h, n, z), -1),
        (lambda z, h, n: torch.lerp(n, h, 1 - z), None),
    ],
    ids=["z keeps", "z writes", "leak to h", "leak to n", "lerp", "lerp turned"],
)
def test_the_sign_of_a_keep_gate(
    update: Callable[[Tensor, Tensor, Tensor], Tensor], sign: int | None
) -> None:
    def step(m: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        z, n, _, _ = (m.x(x) + m.h(h)).chunk(4, -1)
        return update(z.sigmoid(), h, n.tanh()), c

    places = [(b.start, b.stop, b.sign) for g in wired(step).gates for b in g.keep]
    assert places == ([] if sign is None else [(0, H, sign)] * 2)


@pytest.mark.parametrize(
    "step_of",
    [
        lambda p: p.unbind(1),
        lambda p: [p[:, t] for t in range(p.shape[1])],
        lambda p: [p[:, t, :] for t in range(p.shape[1])],
        lambda p: p.transpose(0, 1).contiguous(),
        lambda p: [p.select(1, t) for t in range(p.shape[1])],
        lambda p: [part.squeeze(1) for part in p.split(1, 1)],
    ],
    ids=["unbind", "index", "slice", "turned", "select", "split"],
)
def test_an_input_projected_for_all_steps_at_once(
    step_of: Callable[[Tensor], Iterable[Tensor]],
) -> None:
    class Hoisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input = nn.Linear(3, 2 * H)
            self.recurrent = nn.Linear(H, 2 * H, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), H)
            for projected in step_of(self.input(x)):
                candidate, keep = (projected + self.recurrent(h)).chunk(2, -1)
                h = keep.sigmoid() * h + (1 - keep.sigmoid()) * candidate.tanh()
            return h

    model, x = Hoisted(), torch.randn(2, 6, 3)
    (loop,) = find_loops(record(lambda: model(x), model, (x,)).graph)
    places = [gate.keep for gate in wiring_of(loop).gates]
    assert places == [(GateBias("input.bias", H, 2 * H, 1),)]


def test_a_reset_gate_keeps_nothing() -> None:
    def step(m: Loop, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        r = torch.sigmoid(m.x(x)[:, :H])
        return torch.tanh((r * h) @ m.w + m.b), c

    found = wired(step)
    assert found == Wiring((Entry("w", 0, 0, H),), ())


def test_a_plain_recurrence_has_entries_and_no_gate() -> None:
    assert wired(lambda m, x, h, c: (torch.tanh(m.x(x)[:, :H] + h @ m.w.T), c)) == Wiring(
        (Entry("w", 1, 0, H),), ()
    )


# What the specimens' own code says of their keep gates: bias, first place, sign.
KEEPS = {
    "lstm-wide": ("bias", 8, 1),
    "lstm-twelve": ("b_f", 0, 1),
    "lstm-peephole": ("wx.bias", 8, 1),
    "gru-reset-before": ("update.bias", 0, -1),
    "gru-reset-after": ("ih.bias", 8, 1),
    "mgu": ("Wf.bias", 0, -1),
    "janet": ("x.bias", 0, 1),
    "own-lstmcell": ("cell.ln.bias", 8, 1),
    "lstm-layernorm": ("nx.bias", 8, 1),
    "two-linears": None,
    "char-rnn": None,
}


@pytest.mark.parametrize("name", KEEPS)
def test_keep_gates_of_models_as_users_write_them(name: str) -> None:
    specimen = next(s for s in ZOO if s.name == name)
    model, inputs = specimen.build(), specimen.inputs()
    loops = find_loops(record(lambda: model(*inputs), model, inputs).graph)
    (loop,) = (found for found in loops if found.kind == "time")
    keep = [(b.bias, b.start, b.sign) for gate in wiring_of(loop).gates for b in gate.keep]
    assert keep[:1] == ([] if KEEPS[name] is None else [KEEPS[name]])


def test_every_specimen_can_be_read() -> None:
    for specimen in ZOO:
        if specimen.kind != "written":
            continue
        model, inputs = specimen.build(), specimen.inputs()
        known = dict(model.named_parameters())
        graph = record(lambda m=model, i=inputs: m(*i), model, inputs).graph
        for loop in find_loops(graph):
            if len(loop.carried.states) > 1:
                wiring = wiring_of(loop)
                for entry in wiring.entries:
                    assert entry.weight in loop.weights
                    size = known[entry.weight].shape if entry.weight in known else None
                    assert size is None or 0 <= entry.start < entry.stop <= size[entry.axis]
                for bias in (b for gate in wiring.gates for b in (*gate.keep, *gate.write)):
                    assert 0 <= bias.start < bias.stop <= len(known[bias.bias])
