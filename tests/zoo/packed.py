"""Hand-written recurrences over sequences of unequal length, episodes, and cut gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from zoo.specimen import drawn, fixed, floats, mask, tokens, written

FEATURES, HIDDEN, BATCH = 5, 8, 3
LENGTHS = torch.tensor([9, 6, 4])


class Step(nn.Module):
    """A gated step that the models below share; w is what acts on the state."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(FEATURES, 2 * HIDDEN)
        self.w = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z, n = (self.x(x) + self.w(h)).chunk(2, dim=-1)
        return torch.lerp(h, torch.tanh(n), torch.sigmoid(z))


class Masked(nn.Module):
    """h = m * new + (1 - m) * h."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, FEATURES, padding_idx=0)
        self.step = Step()

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        m = (torch.arange(ids.size(1))[None] < lengths[:, None]).float()
        h, out = torch.zeros(ids.size(0), HIDDEN), []
        for t in range(ids.size(1)):
            new = self.step(x[:, t], h)
            h = m[:, t, None] * new + (1 - m[:, t, None]) * h
            out.append(h)
        return torch.stack(out, dim=1), h


class Where(nn.Module):
    """The same choice by torch.where, after which the last state is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), HIDDEN)
        for t, x_t in enumerate(x.transpose(0, 1)):
            h = torch.where((t < lengths).unsqueeze(1), self.step(x_t, h), h)
        return self.head(h)


class BatchSizes(nn.Module):
    """Walks a PackedSequence by its batch sizes; finished rows drop out."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def over(self, packed: PackedSequence) -> PackedSequence:
        start, out = 0, []
        h = packed.data.new_zeros(int(packed.batch_sizes[0]), HIDDEN)
        for size in packed.batch_sizes.tolist():
            h = self.step(packed.data[start : start + size], h[:size])
            out.append(h)
            start += size
        return PackedSequence(torch.cat(out), packed.batch_sizes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return pad_packed_sequence(self.over(packed), batch_first=True)[0]


class PerSample(nn.Module):
    """A Python loop over the sentences, inside it one over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def read(self, sentence: Tensor) -> Tensor:
        h = torch.zeros(HIDDEN)
        for word in sentence:
            h = self.step(word, h)
        return h

    def forward(self, sentences: list[Tensor]) -> Tensor:
        return torch.stack([self.read(sentence) for sentence in sentences])


class GatherLast(nn.Module):
    """All steps run over the padding, the state of the last real one is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h, states = torch.zeros(x.size(0), HIDDEN), []
        for x_t in x.unbind(1):
            h = self.step(x_t, h)
            states.append(h)
        index = (lengths - 1).view(-1, 1, 1).expand(-1, 1, HIDDEN)
        return torch.stack(states, 1).gather(1, index).squeeze(1)


class Episodes(nn.Module):
    """Recurrent policy over a rollout: the state is reset behind each end of an episode."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()
        self.pi, self.v = nn.Linear(HIDDEN, 4), nn.Linear(HIDDEN, 1)

    def forward(self, obs: Tensor, alive: Tensor, core: Tensor) -> dict[str, Tensor]:
        features = []
        for t in range(obs.shape[0]):
            core = core * alive[t].unsqueeze(-1)
            core = self.step(obs[t], core)
            features.append(core)
        h = torch.stack(features)
        return {"logits": self.pi(h), "value": self.v(h).squeeze(-1), "core": core}


class Cut(nn.Module):
    """Truncated: the graph is cut every `every` steps inside one forward."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.step, self.every = Step(), every

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for t, x_t in enumerate(x):
            if t % self.every == 0:
                h = h.detach()
            h = self.step(x_t, h)
            out.append(h)
        return torch.stack(out)


class BurnIn(nn.Module):
    """The first four steps only warm the state up, without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for t in range(len(x)):
            with torch.set_grad_enabled(t >= 4):
                h = self.step(x[t], h)
            out.append(h)
        return torch.stack(out)


class DataCut(nn.Module):
    """h.data: cut at every step, in the old way."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            h = self.step(x_t, h.data)
            out.append(h)
        return torch.stack(out)


class Windows(nn.Module):
    """Chunks of five steps through an inner loop; the state crosses them detached."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def chunk(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for x_t in x:
            h = self.step(x_t, h)
            out.append(h)
        return torch.stack(out), h

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for piece in x.split(5):
            states, h = self.chunk(piece, h.detach())
            out.append(states)
        return torch.cat(out)


class Shuttered(nn.Module):
    """The gradient into the state is scaled down by a hook, not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.size(1), HIDDEN), []
        for x_t in x:
            h = self.step(x_t, h)
            if h.requires_grad:
                h.register_hook(lambda grad: grad.clamp(-1, 1) * 0.8)
            out.append(h)
        return torch.stack(out)


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))
PADDED = drawn(floats(BATCH, 9, FEATURES), fixed(LENGTHS))
W = ("step.w.weight",)

SPECIMENS = (
    written("masked", Masked, drawn(tokens(BATCH, 9, below=20), fixed(LENGTHS)), 9, W, "m and 1-m"),
    written("where", Where, PADDED, 9, W, "torch.where keeps the state", causal=False),
    written("batch-sizes", BatchSizes, PADDED, 9, W, "walks a PackedSequence"),
    written(
        "per-sample",
        PerSample,
        drawn(lambda g: [floats(n, FEATURES)(g) for n in (4, 9)]),
        9,
        W,
        "one sequence after the other, four and nine steps",
        causal=False,
    ),
    written("gather-last", GatherLast, PADDED, 9, W, "gather by length", causal=False),
    written(
        "episodes",
        Episodes,
        drawn(floats(11, BATCH, FEATURES), mask(11, BATCH), floats(BATCH, HIDDEN)),
        11,
        W,
        "done-mask resets, dict of outputs",
    ),
    written("cut-every-4", lambda: Cut(4), TIME_MAJOR, 11, W, "detach every 4", window=4),
    written("burn-in", BurnIn, TIME_MAJOR, 11, W, "no_grad for 4 steps", window=7),
    written("cut-by-data", DataCut, TIME_MAJOR, 11, W, "h.data each step", window=1),
    written("windows", Windows, TIME_MAJOR, 11, W, "chunks of 5, detached", window=5),
    written("shuttered", Shuttered, TIME_MAJOR, 11, W, "a hook scales the gradient"),
)
