"""torch's fused modules in the wiring that users give them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from zoo.specimen import drawn, fixed, floats, native, tokens

FEATURES, HIDDEN, BATCH = 5, 8, 3
LENGTHS = torch.tensor([6, 9, 4])


class LastOutput(nn.Module):
    """outputs[-1] of a bidirectional module: the backward half has seen one step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN, num_layers=2, bidirectional=True)
        self.fc = nn.Linear(2 * HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm.flatten_parameters()
        return self.fc(self.lstm(x)[0][-1])


class SortedTagger(nn.Module):
    """Sort by length, pack, run, pad, sort back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, FEATURES, padding_idx=0)
        self.gru = nn.GRU(FEATURES, HIDDEN, batch_first=True, bidirectional=True)
        self.tag = nn.Linear(2 * HIDDEN, 4)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        ordered, order = lengths.sort(descending=True)
        packed = pack_padded_sequence(self.embed(ids[order]), ordered.tolist(), batch_first=True)
        padded, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.tag(padded[order.argsort()])


class RebuiltPacking(nn.Module):
    """A PackedSequence taken apart and put together by hand around the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURES, HIDDEN)
        self.rnn = nn.LSTM(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        inner = PackedSequence(
            torch.relu(self.project(packed.data)),
            packed.batch_sizes,
            packed.sorted_indices,
            packed.unsorted_indices,
        )
        _, (h_n, _) = self.rnn(inner)
        return h_n[-1]


class OneByOne(nn.Module):
    """A fused GRU called with sequences of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(FEATURES, HIDDEN, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        outputs = []
        for t in range(x.size(1)):
            out, hidden = self.gru(x[:, t : t + 1], hidden)
            outputs.append(out)
        return torch.cat(outputs, dim=1)


class Document(nn.Module):
    """Words to sentences to a document, attention pooling at both levels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, FEATURES)
        self.words = nn.GRU(FEATURES, HIDDEN, batch_first=True, bidirectional=True)
        self.sentences = nn.GRU(2 * HIDDEN, HIDDEN, batch_first=True)
        self.word_score, self.sentence_score = nn.Linear(16, 1), nn.Linear(HIDDEN, 1)

    def forward(self, ids: Tensor) -> Tensor:
        batch, sentences, words = ids.shape
        out, _ = self.words(self.embed(ids.view(-1, words)))
        pooled = (out * self.word_score(out).softmax(1)).sum(1)
        out, _ = self.sentences(pooled.view(batch, sentences, -1))
        return (out * self.sentence_score(out).softmax(1)).sum(1)


class LineReader(nn.Module):
    """Convolutions over an image, columns as time."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 1)))
        self.rnn = nn.LSTM(16, HIDDEN, bidirectional=True)
        self.fc = nn.Linear(2 * HIDDEN, 6)

    def forward(self, image: Tensor) -> Tensor:
        conv = self.cnn(image)
        columns = conv.permute(3, 0, 1, 2).flatten(2)
        return self.fc(self.rnn(columns)[0]).log_softmax(2)


class Pyramid(nn.Module):
    """Pairs of steps joined before the second recurrence, which sees half the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
        self.top = nn.LSTM(2 * HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.bottom(x)
        return self.top(out.reshape(out.size(0), out.size(1) // 2, -1))[0]


class Projected(nn.Module):
    """Two layers with projection, state given as zeros from the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 12, 2, proj_size=6, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h0, c0 = torch.zeros(2, x.size(1), 6), torch.zeros(2, x.size(1), 12)
        return self.lstm(x, (h0, c0))[0]


class Stateful(nn.Module):
    """The state is kept from call to call without its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(FEATURES, HIDDEN, nonlinearity="relu")
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden is None:
            self.hidden = torch.zeros(1, x.size(1), HIDDEN)
        out, hidden = self.rnn(x, self.hidden.detach())
        self.hidden = hidden
        return out


class StatefulGraph(Stateful):
    """The state is kept with its graph: the second backward fails."""

    def forward(self, x: Tensor) -> Tensor:
        out, self.hidden = self.rnn(x, self.hidden)
        return out


class Tower(nn.Module):
    """Residual blocks of recurrence, norm and dropout, time first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, HIDDEN)
        self.rnns = nn.ModuleList(nn.GRU(HIDDEN, HIDDEN) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x.transpose(0, 1))
        for rnn, norm in zip(self.rnns, self.norms, strict=True):
            h = h + rnn(norm(h))[0]
        return h.transpose(0, 1)


class LSTM(nn.LSTM):
    """A subclass of the same name with dropout of its own and only the output returned."""

    def forward(self, x: Tensor, hx: Any = None) -> Tensor:
        return nn.functional.dropout(super().forward(x, hx)[0], 0.1, self.training)


class SubclassUser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, HIDDEN), LSTM(HIDDEN, HIDDEN, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Siamese(nn.Module):
    """Two sentences through the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN, batch_first=True)

    def encode(self, x: Tensor) -> Tensor:
        return self.lstm(x)[1][0].squeeze(0)

    def forward(self, pair: dict[str, Tensor]) -> Tensor:
        return torch.exp(-(self.encode(pair["left"]) - self.encode(pair["right"])).abs().sum(1))


class SharedDirections(nn.Module):
    """One set of weights reads from both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(FEATURES, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        there, _ = self.rnn(x)
        back, _ = self.rnn(x.flip(0))
        return torch.cat([there, back.flip(0)], dim=-1)


class SampleBySample(nn.Module):
    """A list of sequences of unequal lengths, one call without batch for each."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN)
        self.fc = nn.Linear(HIDDEN, 1)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        return torch.stack([self.fc(self.lstm(s)[0].mean(0)) for s in sequences])


class WeightDrop(nn.Module):
    """The recurrent weight is a plain tensor, thinned out anew in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(FEATURES, HIDDEN)
        self.raw = nn.Parameter(self.inner.weight_hh_l0.detach().clone())
        del self.inner.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight_hh_l0 = nn.functional.dropout(self.raw, 0.3, self.training)
        return self.inner(x)[0]


TIME_MAJOR = drawn(floats(11, BATCH, FEATURES))
BATCH_MAJOR = drawn(floats(BATCH, 9, FEATURES))

SPECIMENS = (
    native("bilstm-last-output", LastOutput, TIME_MAJOR, 11, "outputs[-1]", causal=False),
    native(
        "sorted-tagger", SortedTagger, drawn(tokens(BATCH, 9, below=20), fixed(LENGTHS)), 9,
        "packed inside, sorted and sorted back", causal=False,
    ),
    native(
        "rebuilt-packing", RebuiltPacking, drawn(floats(BATCH, 9, FEATURES), fixed(LENGTHS)), 9,
        "PackedSequence by hand", causal=False,
    ),
    native("gru-one-by-one", OneByOne, BATCH_MAJOR, 9, "length one per call"),
    native(
        "document", Document, drawn(tokens(BATCH, 4, 9, below=20)), 9,
        "nine words, then four sentences", sites=2, causal=False,
    ),
    native(
        "line-reader", LineReader, drawn(floats(BATCH, 1, 8, 11)), 11, "columns as time",
        causal=False,
    ),
    native(
        "pyramid", Pyramid, drawn(floats(BATCH, 14, FEATURES)), 14,
        "fourteen steps, then seven", sites=2, causal=False,
    ),
    native("lstm-projected", Projected, TIME_MAJOR, 11, "proj_size, two layers"),
    native("rnn-stateful", Stateful, TIME_MAJOR, 11, "self.hidden kept, detached"),
    native("rnn-stateful-graph", StatefulGraph, TIME_MAJOR, 11, "self.hidden kept with its graph"),
    native("gru-tower", Tower, BATCH_MAJOR, 9, "residual, normed, transposed", sites=3),
    native("lstm-subclass", SubclassUser, TIME_MAJOR, 11, "own forward, same class name"),
    native(
        "siamese", Siamese,
        drawn(lambda g: {"left": floats(BATCH, 9, FEATURES)(g), "right": floats(BATCH, 9, 5)(g)}),
        9, "one module, two calls, a dict of inputs", causal=False,
    ),
    native("shared-directions", SharedDirections, TIME_MAJOR, 11, "one GRU twice", causal=False),
    native(
        "sample-by-sample", SampleBySample,
        drawn(lambda g: [floats(n, FEATURES)(g) for n in (6, 9, 4)]), 9,
        "lists of unequal lengths", causal=False,
    ),
    native("weight-drop", WeightDrop, TIME_MAJOR, 11, "weight_hh_l0 is no parameter"),
)  # fmt: skip
