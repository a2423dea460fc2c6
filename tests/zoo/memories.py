"""Recurrences that carry more than a vector: matrices, tapes, stacks, their own past."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.specimen import drawn, floats, native, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class FastWeights(nn.Module):
    """A matrix that decays and learns outer products of states, read by inner steps."""

    def __init__(self) -> None:
        super().__init__()
        self.wx, self.wh = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN)
        A = x.new_zeros(x.size(0), HIDDEN, HIDDEN)
        out = []
        for t in range(x.size(1)):
            A = 0.95 * A + 0.5 * torch.einsum("bi,bj->bij", h, h)
            slow = self.wx(x[:, t]) + self.wh(h)
            h = torch.relu(slow)
            for _ in range(2):
                h = torch.relu(self.norm(slow + torch.bmm(A, h.unsqueeze(2)).squeeze(2)))
            out.append(h)
        return torch.stack(out, dim=1)


class DeltaRule(nn.Module):
    """Linear attention with the delta rule: keys write values, no matrix acts on the state."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.beta = nn.Linear(FEATURES, 3 * HIDDEN), nn.Linear(FEATURES, 1)
        self.recall = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        S, out = torch.zeros(x.size(0), HIDDEN, HIDDEN), []
        for t in range(x.size(1)):
            q, k, v = self.qkv(x[:, t]).chunk(3, -1)
            k = functional.normalize(k, dim=-1)
            S = S * torch.sigmoid(self.recall)[None, :, None]
            error = v - torch.einsum("bk,bkv->bv", k, S)
            S = S + torch.sigmoid(self.beta(x[:, t]))[..., None] * k[..., None] * error[:, None]
            out.append(torch.einsum("bk,bkv->bv", q, S))
        return torch.stack(out, 1)


class Tape(nn.Module):
    """A small neural Turing machine: content addressing, a controller on cat(x, read)."""

    def __init__(self) -> None:
        super().__init__()
        self.controller = nn.Linear(FEATURES + 6 + HIDDEN, HIDDEN)
        self.read_key, self.write_key = nn.Linear(HIDDEN, 6), nn.Linear(HIDDEN, 6)
        self.erase, self.add = nn.Linear(HIDDEN, 6), nn.Linear(HIDDEN, 6)
        self.start = nn.Parameter(torch.randn(1, 4, 6) * 0.1)

    def address(self, key: Tensor, memory: Tensor) -> Tensor:
        return functional.cosine_similarity(key[:, None], memory, dim=-1).mul(3).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.start.repeat(x.size(0), 1, 1)
        h, read, out = torch.zeros(x.size(0), HIDDEN), torch.zeros(x.size(0), 6), []
        for t in range(x.size(1)):
            h = torch.tanh(self.controller(torch.cat([x[:, t], read, h], -1)))
            w = self.address(self.write_key(h), memory).unsqueeze(-1)
            memory = memory * (1 - w * torch.sigmoid(self.erase(h))[:, None])
            memory = memory + w * self.add(h)[:, None]
            read = (self.address(self.read_key(h), memory).unsqueeze(-1) * memory).sum(1)
            out.append(torch.cat([h, read], -1))
        return torch.stack(out, 1)


class TapeWithCell(Tape):
    """The same tape under an LSTMCell."""

    def __init__(self) -> None:
        super().__init__()
        self.controller = nn.LSTMCell(FEATURES + 6, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.start.repeat(x.size(0), 1, 1)
        h = c = torch.zeros(x.size(0), HIDDEN)
        read, out = torch.zeros(x.size(0), 6), []
        for t in range(x.size(1)):
            h, c = self.controller(torch.cat([x[:, t], read], -1), (h, c))
            w = self.address(self.write_key(h), memory).unsqueeze(-1)
            memory = memory + w * (self.add(h)[:, None] - memory * self.erase(h).sigmoid()[:, None])
            read = (self.address(self.read_key(h), memory).unsqueeze(-1) * memory).sum(1)
            out.append(torch.cat([h, read], -1))
        return torch.stack(out, 1)


class Stack(nn.Module):
    """A neural stack: push and pop are blended, the top goes back into the controller."""

    def __init__(self) -> None:
        super().__init__()
        self.control = nn.Linear(FEATURES + 2 * HIDDEN, HIDDEN)
        self.action, self.value = nn.Linear(HIDDEN, 3), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h, stack, out = x.new_zeros(x.size(0), HIDDEN), x.new_zeros(x.size(0), 6, HIDDEN), []
        for t in range(x.size(1)):
            h = torch.tanh(self.control(torch.cat([x[:, t], h, stack[:, 0]], 1)))
            push, pop, stay = self.action(h).softmax(1)[..., None, None].unbind(1)
            pushed = torch.cat([self.value(h).unsqueeze(1), stack[:, :-1]], 1)
            popped = torch.cat([stack[:, 1:], torch.zeros_like(stack[:, :1])], 1)
            stack = push * pushed + pop * popped + stay * stack
            out.append(h)
        return torch.stack(out, 1)


class OwnPast(nn.Module):
    """Attention over all earlier states of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(FEATURES + 2 * HIDDEN, HIDDEN)
        self.score = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        past = [x.new_zeros(x.size(0), HIDDEN)]
        for t in range(x.size(1)):
            tape = torch.stack(past, dim=1)
            a = torch.softmax((tape * self.score(past[-1]).unsqueeze(1)).sum(-1), dim=1)
            summary = (a.unsqueeze(-1) * tape).sum(1)
            past.append(torch.tanh(self.cell(torch.cat([x[:, t], past[-1], summary], 1))))
        return torch.stack(past[1:], dim=1)


class Relational(nn.Module):
    """Memory slots attend to each other and to the input; gated like an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.qkv = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.attend = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.gate = nn.Linear(2 * HIDDEN, 2 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        slots, out = torch.eye(4, HIDDEN).expand(x.size(0), -1, -1), []
        for x_t in self.inp(x).unbind(1):
            both = torch.cat([slots, x_t.unsqueeze(1)], 1)
            q, k, v = self.qkv(both).chunk(3, -1)
            new, _ = self.attend(q[:, :4], k, v, need_weights=False)
            i, f = self.gate(torch.cat([slots, new], -1)).sigmoid().chunk(2, -1)
            slots = f * slots + i * torch.tanh(new)
            out.append(slots.flatten(1))
        return torch.stack(out, 1)


class BlockTransformer(nn.Module):
    """A transformer layer over a block, its summary tokens handed to the next block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, HIDDEN)
        self.layer = nn.TransformerEncoderLayer(HIDDEN, 2, 16, 0.0, batch_first=True)
        self.memory = nn.Parameter(torch.randn(1, 2, HIDDEN) * 0.3)

    def forward(self, blocks: Tensor) -> Tensor:
        memory, out = self.memory.expand(blocks.size(0), -1, -1), []
        for block in self.embed(blocks).unbind(1):
            both = self.layer(torch.cat([memory, block], 1))
            memory = both[:, :2]
            out.append(both[:, 2:].mean(1))
        return torch.stack(out, 1)


BATCH_MAJOR = drawn(floats(BATCH, 9, FEATURES))

SPECIMENS = (
    written("fast-weights", FastWeights, BATCH_MAJOR, 9, ("wh.weight",), "iterations inside time"),
    written("delta-rule", DeltaRule, BATCH_MAJOR, 9, ("recall",), "matrix state, linear"),
    written(
        "turing-tape", Tape, BATCH_MAJOR, 9,
        ("controller.weight", "erase.weight", "write_key.weight"), "content addressing",
    ),
    native("turing-tape-cell", TapeWithCell, BATCH_MAJOR, 9, "a tape beside an LSTMCell"),
    written(
        "neural-stack", Stack, BATCH_MAJOR, 9, ("control.weight", "action.weight"), "push and pop"
    ),
    written(
        "own-past", OwnPast, BATCH_MAJOR, 9, ("cell.weight", "score.weight"), "attention to h[<t]"
    ),
    written("memory-slots", Relational, BATCH_MAJOR, 9, ("qkv.weight", "gate.weight"), "slots"),
    written(
        "block-transformer", BlockTransformer, drawn(floats(BATCH, 9, 4, FEATURES)), 9,
        ("layer.self_attn.in_proj_weight", "layer.linear1.weight"), "tokens carried over blocks",
    ),
)  # fmt: skip
