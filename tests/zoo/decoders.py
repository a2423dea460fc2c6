"""Encoders and decoders: attention, feedback of what was said, input feeding, greedy search."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.specimen import drawn, floats, native, tokens, written

FEATURES, HIDDEN, BATCH, WORDS = 5, 8, 3, 20


class TeacherForced(nn.Module):
    """A fused encoder hands its state to a fused decoder that reads the shifted target."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, FEATURES)
        self.encoder = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
        self.decoder = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
        self.out = nn.Linear(HIDDEN, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.embed(source))
        start = target.new_zeros(target.size(0), 1)
        shifted = torch.cat([start, target[:, :-1]], dim=1)
        return self.out(self.decoder(self.embed(shifted), state)[0])


class Bahdanau(nn.Module):
    """Additive attention by the old state; fused modules, the decoder one step per call."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(FEATURES, HIDDEN, batch_first=True, bidirectional=True)
        self.query, self.key = nn.Linear(HIDDEN, HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.energy = nn.Linear(HIDDEN, 1, bias=False)
        self.embed = nn.Embedding(WORDS, FEATURES)
        self.decoder = nn.GRU(FEATURES + 2 * HIDDEN, HIDDEN, batch_first=True)
        self.out = nn.Linear(HIDDEN, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, _ = self.encoder(source)
        keys, hidden, logits = self.key(memory), torch.zeros(1, source.size(0), HIDDEN), []
        for t in range(target.size(1)):
            score = self.energy(torch.tanh(keys + self.query(hidden[-1]).unsqueeze(1)))
            context = (score.softmax(dim=1) * memory).sum(dim=1, keepdim=True)
            step = torch.cat([self.embed(target[:, t : t + 1]), context], dim=-1)
            output, hidden = self.decoder(step, hidden)
            logits.append(self.out(output))
        return torch.cat(logits, dim=1)


class Luong(nn.Module):
    """Input feeding: the attentional vector goes back into an LSTMCell with the next word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, FEATURES)
        self.cell = nn.LSTMCell(FEATURES + HIDDEN, HIDDEN)
        self.combine = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, memory: Tensor, target: Tensor) -> Tensor:
        h = c = fed = memory.new_zeros(memory.size(0), HIDDEN)
        vectors = []
        for word in self.embed(target).unbind(1):
            h, c = self.cell(torch.cat([word, fed], dim=1), (h, c))
            weights = torch.bmm(memory, h.unsqueeze(2)).softmax(dim=1)
            context = torch.bmm(weights.transpose(1, 2), memory).squeeze(1)
            fed = torch.tanh(self.combine(torch.cat([context, h], dim=1)))
            vectors.append(fed)
        return torch.stack(vectors, dim=1)


class WrittenAttention(nn.Module):
    """Bahdanau's decoder with the GRU spelled out, the context in every gate."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.Linear(2 * HIDDEN, 4)
        self.gates = nn.Linear(FEATURES + 2 * HIDDEN, 2 * HIDDEN)
        self.proposal = nn.Linear(FEATURES + 2 * HIDDEN, HIDDEN)

    def forward(self, memory: Tensor, target: Tensor) -> Tensor:
        s, out = memory.mean(1), []
        for t in range(target.size(1)):
            pairs = torch.cat([memory, s[:, None].expand_as(memory)], -1)
            a = self.attend(pairs).tanh().sum(-1).softmax(-1)
            ctx = torch.einsum("bm,bmh->bh", a, memory)
            r, z = self.gates(torch.cat([target[:, t], s, ctx], -1)).sigmoid().chunk(2, -1)
            s = (1 - z) * s + z * self.proposal(torch.cat([target[:, t], r * s, ctx], -1)).tanh()
            out.append(s)
        return torch.stack(out, 1)


class Greedy(nn.Module):
    """Feeds back the most likely word: no gradient passes through the choice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, FEATURES)
        self.cell = nn.GRUCell(FEATURES, HIDDEN)
        self.out = nn.Linear(HIDDEN, WORDS)

    def forward(self, hidden: Tensor) -> Tensor:
        word = torch.zeros(hidden.size(0), dtype=torch.long)
        logits = []
        for _ in range(9):
            hidden = self.cell(self.embed(word), hidden)
            logits.append(self.out(hidden))
            word = logits[-1].argmax(dim=-1)
        return torch.stack(logits, 1)


class WrittenGreedy(nn.Module):
    """The same by hand, with the embedding shared by both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(WORDS, HIDDEN) * 0.3)
        self.recur = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.3)

    def forward(self, s: Tensor) -> Tensor:
        logits = []
        word = torch.zeros(s.size(0), dtype=torch.int64)
        for _ in range(9):
            s = torch.tanh(self.words[word] + s @ self.recur)
            logits.append(s @ self.words.t())
            word = logits[-1].max(1)[1]
        return torch.stack(logits, 1)


class SoftFeedback(nn.Module):
    """Feeds back the expected embedding, so that the output is part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, FEATURES)
        self.i2h, self.h2h = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.h2o = nn.Linear(HIDDEN, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        h, said, out = x.new_zeros(x.size(0), HIDDEN), x[:, 0] * 0, []
        for t in range(x.size(1)):
            h = torch.tanh(self.i2h(x[:, t] + said) + self.h2h(h))
            probabilities = functional.gumbel_softmax(self.h2o(h), tau=2.0)
            said = probabilities @ self.embed.weight
            out.append(probabilities)
        return torch.stack(out, 1)


class Scheduled(nn.Module):
    """A coin chooses between the true last value and the predicted one; direct forecast."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(1, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)

    def forward(self, series: Tensor) -> Tensor:
        state, y, ys = None, series[:, :1], []
        coins = torch.rand(series.size(1)) < 0.5
        for t in range(series.size(1)):
            state = self.cell(series[:, t : t + 1] if coins[t] else y, state)
            y = self.out(state[0])
            ys.append(y)
        return torch.cat(ys, 1)


class WrittenSeq2Seq(nn.Module):
    """Encoder and decoder by hand: two loops, the last state hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, FEATURES)
        self.enc = nn.Linear(FEATURES + HIDDEN, HIDDEN)
        self.dec = nn.Linear(FEATURES + HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h = torch.zeros(source.size(0), HIDDEN)
        for t in range(source.size(1)):
            h = self.enc(torch.cat([self.embed(source[:, t]), h], 1)).tanh()
        logits = []
        for t in range(target.size(1)):
            h = self.dec(torch.cat([self.embed(target[:, t]), h], 1)).tanh()
            logits.append(self.out(h))
        return torch.stack(logits, 1)


class Captioner(nn.Module):
    """Attention over image regions; the batch shrinks as captions end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, FEATURES)
        self.init_h, self.init_c = nn.Linear(6, HIDDEN), nn.Linear(6, HIDDEN)
        self.score = nn.Linear(6 + HIDDEN, 1)
        self.cell = nn.LSTMCell(FEATURES + 6, HIDDEN)
        self.fc = nn.Linear(HIDDEN, WORDS)

    def forward(self, regions: Tensor, captions: Tensor) -> Tensor:
        lengths = [captions.size(1), captions.size(1) - 2, 4]
        predictions = torch.zeros(captions.size(0), max(lengths), WORDS)
        h, c = self.init_h(regions.mean(1)), self.init_c(regions.mean(1))
        for t in range(max(lengths)):
            n = sum(length > t for length in lengths)
            pairs = torch.cat([regions[:n], h[:n, None].expand(-1, regions.size(1), -1)], -1)
            seen = (self.score(pairs).softmax(1) * regions[:n]).sum(1)
            h, c = self.cell(torch.cat([self.embed(captions[:n, t]), seen], 1), (h[:n], c[:n]))
            predictions[:n, t, :] = self.fc(h)
        return predictions


class Handwriting(nn.Module):
    """A soft window slides along the text; its position is carried beside the states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(3 + 6, HIDDEN)
        self.window = nn.Linear(HIDDEN, 6)

    def forward(self, strokes: Tensor, text: Tensor) -> Tensor:
        h = c = torch.zeros(strokes.size(0), HIDDEN)
        kappa, seen, out = torch.zeros(strokes.size(0), 2, 1), text[:, 0], []
        places = torch.arange(text.size(1)).view(1, 1, -1)
        for point in strokes.unbind(1):
            h, c = self.lstm(torch.cat([point, seen], 1), (h, c))
            a, b, k = self.window(h).exp().unsqueeze(-1).chunk(3, 1)
            kappa = kappa + 0.1 * k
            phi = (a * torch.exp(-b * (kappa - places) ** 2)).sum(1, keepdim=True)
            seen = torch.bmm(phi, text).squeeze(1)
            out.append(torch.cat([h, seen], 1))
        return torch.stack(out, 1)


PAIR = drawn(tokens(BATCH, 9, below=WORDS), tokens(BATCH, 9, below=WORDS))
START = drawn(floats(BATCH, HIDDEN))

SPECIMENS = (
    native("seq2seq-forced", TeacherForced, PAIR, 9, "fused both", sites=2, causal=False),
    native(
        "bahdanau", Bahdanau, drawn(floats(BATCH, 9, FEATURES), tokens(BATCH, 9, below=WORDS)), 9,
        "additive attention, GRU one step per call", sites=2, causal=False,
    ),
    native(
        "luong", Luong, drawn(floats(BATCH, 6, HIDDEN), tokens(BATCH, 9, below=WORDS)), 9,
        "input feeding: the attentional vector is carried too",
    ),
    written(
        "attention-by-hand", WrittenAttention,
        drawn(floats(BATCH, 6, HIDDEN), floats(BATCH, 9, FEATURES)), 9,
        ("gates.weight", "proposal.weight", "attend.weight"), "state asks, context answers",
    ),
    native("greedy", Greedy, START, 9, "argmax fed back", causal=False),
    written("greedy-by-hand", WrittenGreedy, START, 9, ("recur",), "shared words", causal=False),
    written(
        "soft-feedback", SoftFeedback, drawn(floats(BATCH, 9, FEATURES)), 9,
        ("h2h.weight", "h2o.weight"), "gumbel softmax fed back",
    ),
    native("scheduled", Scheduled, drawn(floats(BATCH, 9)), 9, "sampling by coin"),
    written(
        "seq2seq-by-hand", WrittenSeq2Seq, PAIR, 9, ("enc.weight", "dec.weight"), "two loops",
        sites=2, causal=False,
    ),
    native(
        "captioner", Captioner, drawn(floats(BATCH, 4, 6), tokens(BATCH, 9, below=WORDS)), 9,
        "the batch shrinks",
    ),
    native(
        "handwriting", Handwriting, drawn(floats(BATCH, 11, 3), floats(BATCH, 4, 6)), 11,
        "a sliding window over the text",
    ),
)  # fmt: skip
