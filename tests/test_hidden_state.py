"""Which part of a final state is read: layers, directions and samples on the axes of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import recorded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnguard.inspection.hidden_state import state_index
from rnnguard.inspection.sites import find_sites

B, T, F, H = 5, 7, 3, 4
SOUND = ("sound", None)
Run = Callable[..., Any]


class Net(nn.Module):
    """A GRU, or another recurrence of torch's, with heads that take what `run` gives them."""

    def __init__(self, run: Run, layers: int = 1, ways: int = 1, kind: Any = nn.GRU) -> None:
        super().__init__()
        both = ways == 2
        self.rnn = kind(F, H, num_layers=layers, bidirectional=both, batch_first=True)
        self.head, self.wide = nn.LazyLinear(2), nn.LazyLinear(3)
        self.decoder = nn.GRU(F, H, num_layers=layers * ways, batch_first=True)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def found(
    run: Run, layers: int = 1, ways: int = 1, kind: Any = nn.GRU, batch: int = B
) -> tuple[str, str | None]:
    model, x = Net(run, layers, ways, kind), torch.randn(batch, T, F)
    model(x)
    recording = recorded(model, x)
    (site,) = (s for s in find_sites(model, recording) if s.record.path == "rnn")
    return state_index(site.calls)


def of_state(read: Callable[[Tensor], Tensor]) -> Run:
    """A head on what is read of h_n."""
    return lambda m, x: m.head(read(m.rnn(x)[1]))


def label(read: Callable[[Tensor], Tensor], layers: int = 1, ways: int = 1, batch: int = B) -> str:
    return found(of_state(read), layers, ways, batch=batch)[0]


FIRST: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "h_n[0]": (2, 1, lambda h: h[0]),
    "of three layers": (3, 1, lambda h: h[0]),
    "select": (2, 1, lambda h: h.select(0, 0)),
    "slice": (2, 1, lambda h: h[:1].squeeze(0)),
    "unbind": (2, 1, lambda h: h.unbind(0)[0]),
    "unpacked": (2, 1, lambda h: next(iter(h))),
    "after a transpose": (2, 1, lambda h: h.transpose(0, 1)[:, 0]),
    "after a dropout": (2, 1, lambda h: torch.dropout(h, 0.5, True)[0]),
    "both directions": (2, 2, lambda h: torch.cat([h[0], h[1]], 1)),
    "mixed layers": (2, 2, lambda h: torch.cat([h[0], h[-1]], 1)),
}
ONE: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "h_n[-1]": (1, 2, lambda h: h[-1]),
    "h_n[0]": (1, 2, lambda h: h[0]),
    "stacked": (2, 2, lambda h: h[-1]),
    "stacked, forward": (2, 2, lambda h: h[-2].relu()),
    "by directions": (2, 2, lambda h: h.view(2, 2, B, H)[-1, 0]),
    "chunk": (1, 2, lambda h: h.chunk(2)[1].squeeze(0)),
}
MIXED: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "view": (1, 2, lambda h: h.view(B, -1)),
    "reshape": (2, 1, lambda h: h.reshape(B, 2 * H)),
    "inferred": (2, 2, lambda h: h.reshape(-1, 4 * H)),
    "batch in front": (1, 2, lambda h: h.view(B, 2, H)),
    "top layer": (2, 2, lambda h: h[-2:].reshape(B, -1)),
    "wrong turn": (1, 2, lambda h: h.transpose(0, 2).reshape(B, -1)),
    "turned back": (1, 2, lambda h: h.mT.contiguous().view(B, -1)),
    "behind tanh": (1, 2, lambda h: h.tanh().view(B, -1) * 2),
    "joined directions": (3, 2, lambda h: h.view(3, B, 2 * H)),
    "beside other features": (1, 2, lambda h: torch.cat([h.view(B, -1), torch.ones(B, 1)], 1)),
}
HEALTHY: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "top layer": (2, 1, lambda h: h[-1]),
    "top layer by number": (3, 1, lambda h: h[2]),
    "all layers": (2, 1, lambda h: torch.cat([h[0], h[1]], 1)),
    "single": (1, 1, lambda h: h[0]),
    "squeezed": (1, 1, lambda h: h.squeeze(0)),
    "single, viewed": (1, 1, lambda h: h.view(B, -1)),
    "both directions": (1, 2, lambda h: torch.cat([h[0], h[1]], 1)),
    "top of both": (2, 2, lambda h: torch.cat([h[-2], h[-1]], 1)),
    "hstack": (2, 2, lambda h: torch.hstack((h[-2], h[-1]))),
    "by directions": (2, 2, lambda h: h.view(2, 2, B, H)[-1].transpose(0, 1).reshape(B, -1)),
    "turned": (2, 1, lambda h: h.transpose(0, 1).reshape(B, -1)),
    "permuted": (1, 2, lambda h: h.permute(1, 0, 2).contiguous().view(B, -1)),
    "flattened": (1, 2, lambda h: h.movedim(1, 0).flatten(1)),
    "summed": (1, 2, lambda h: h.sum(0)),
    "mean over layers": (2, 1, lambda h: h.mean(0)),
    "added": (1, 2, lambda h: h[0] + h[1]),
    "stacked again": (1, 2, lambda h: torch.stack([h[0], h[1]], 1).flatten(1)),
    "whole": (2, 1, lambda h: h),
    "rows": (2, 1, lambda h: h.view(-1, H)),
    "there and back": (1, 2, lambda h: h.view(B, -1).view(2, B, H).transpose(0, 1).flatten(1)),
    "heads": (2, 1, lambda h: h.transpose(0, 1).reshape(B, 2, 2, H // 2)),
    "as many heads as samples": (2, 1, lambda h: h.reshape(2 * B, 1, H).expand(-1, B, -1)),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_layer_is_read(name: str) -> None:
    layers, ways, read = FIRST[name]
    assert label(read, layers, ways) == "first layer"


@pytest.mark.parametrize("name", ONE)
def test_one_direction_is_read(name: str) -> None:
    layers, ways, read = ONE[name]
    assert label(read, layers, ways) == "one direction"


@pytest.mark.parametrize("name", MIXED)
def test_samples_are_put_together(name: str) -> None:
    layers, ways, read = MIXED[name]
    assert label(read, layers, ways) == "mixed axes"


@pytest.mark.parametrize("name", HEALTHY)
def test_a_sound_reading(name: str) -> None:
    layers, ways, read = HEALTHY[name]
    assert found(of_state(read), layers, ways) == SOUND


@pytest.mark.parametrize("batch", [2, 4])
def test_as_many_samples_as_rows(batch: int) -> None:
    assert label(lambda h: h.view(batch, -1), ways=2, batch=batch) == "mixed axes"
    read = lambda h: h.view(2, 2, batch, H)[-1].transpose(0, 1).flatten(1)  # noqa: E731
    assert label(read, 2, 2, batch) == "sound"


def test_a_batch_of_one_is_never_mixed() -> None:
    assert found(of_state(lambda h: h.view(1, -1)), ways=2, batch=1) == SOUND
    assert label(lambda h: h[-1], ways=2, batch=1) == "one direction"


def test_the_place_is_where_the_row_is_taken() -> None:
    def read(m: Net, x: Tensor) -> Any:
        _, h = m.rnn(x)
        h = h.tanh()
        first = h[0]
        return m.head(first)

    line = read.__code__.co_firstlineno + 3
    _, place = found(read, layers=2)
    assert place is not None and place.endswith(f"test_hidden_state.py:{line}")


def test_the_place_is_where_the_view_is_made() -> None:
    def read(m: Net, x: Tensor) -> Any:
        h = m.rnn(x)[1]
        joined = h.view(len(x), -1)
        return m.head(joined.relu())

    line = read.__code__.co_firstlineno + 2
    _, place = found(read, ways=2)
    assert place is not None and place.endswith(f":{line}")


def lstm_states(m: Net, x: Tensor) -> Any:
    _, (h, c) = m.rnn(x)
    return torch.cat([h[0], c[0]], 1)


def lstm_top_of_one(m: Net, x: Tensor) -> Any:
    _, (h, c) = m.rnn(x)
    return torch.cat([h[-1], c[0]], 1)


def test_both_states_of_an_lstm_count() -> None:
    assert found(lambda m, x: m.head(lstm_states(m, x)), 2, 1, nn.LSTM)[0] == "first layer"
    assert found(lambda m, x: m.head(lstm_top_of_one(m, x)), 2, 1, nn.LSTM) == SOUND
    assert found(lambda m, x: m.head(m.rnn(x)[1][1].view(B, -1)), 1, 2, nn.LSTM)[0] == "mixed axes"


def output_beside(m: Net, x: Tensor) -> Any:
    out, h = m.rnn(x)
    scores = out @ m.wide(h[0]).unsqueeze(-1).mean(1, keepdim=True).expand(-1, out.shape[2], 1)
    return m.head((scores.softmax(1) * out).sum(1))


def output_dropped(m: Net, x: Tensor) -> Any:
    out, h = m.rnn(x)
    out.mean(1)
    return m.head(h[0])


def gives_both(m: Net, x: Tensor) -> Any:
    out, h = m.rnn(x)
    return {"score": m.head(h[0]), "states": out}


def test_the_output_counts_only_where_it_is_used() -> None:
    assert found(output_beside, 2) == SOUND
    assert found(gives_both, 2) == SOUND
    assert found(output_dropped, 2)[0] == "first layer"


def into_a_decoder(m: Net, x: Tensor) -> Any:
    return m.head(m.decoder(x, m.rnn(x)[1])[0])


def first_into_a_decoder(m: Net, x: Tensor) -> Any:
    h = m.rnn(x)[1][:1]
    return m.head(m.decoder(x, h.expand(2, -1, -1).contiguous())[0])


def test_a_decoder_may_take_the_whole_state() -> None:
    assert found(into_a_decoder, 2) == SOUND
    assert found(into_a_decoder, 1, 2) == SOUND
    assert found(first_into_a_decoder, 2)[0] == "first layer"


def in_pieces(m: Net, x: Tensor) -> Any:
    state = None
    for piece in torch.split(x, 3, 1):
        _, state = m.rnn(piece, state)
        state = state.detach() if len(piece) == 0 else state
    assert state is not None
    return state


def test_a_state_that_is_handed_on_is_not_read() -> None:
    assert found(lambda m, x: m.head(in_pieces(m, x)[-1]), 2) == SOUND
    assert found(lambda m, x: m.head(in_pieces(m, x)[0]), 2)[0] == "first layer"


def packed(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([4, 7, 5, 7, 2])
    given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, h = m.rnn(given)
    return pad_packed_sequence(out, batch_first=True)[0], h


def sorted_by_hand(m: Net, x: Tensor) -> Any:
    lengths, order = torch.tensor([4, 7, 5, 7, 2]).sort(descending=True)
    _, h = m.rnn(pack_padded_sequence(x.index_select(0, order), lengths, batch_first=True))
    back: Tensor = h.index_select(1, order.argsort())
    return back


def test_packed_sequences() -> None:
    assert found(lambda m, x: m.head(packed(m, x)[1][-1]), 1, 2)[0] == "one direction"
    assert found(lambda m, x: m.head(packed(m, x)[1].view(B, -1)), 1, 2)[0] == "mixed axes"
    joined = lambda m, x: m.head(torch.cat(list(packed(m, x)[1]), 1))  # noqa: E731
    assert found(joined, 1, 2) == SOUND
    assert found(lambda m, x: m.head(packed(m, x)[0].mean(1)), 1, 2) == SOUND
    assert found(lambda m, x: m.head(sorted_by_hand(m, x)[0]), 2)[0] == "first layer"
    turned = lambda m, x: m.head(sorted_by_hand(m, x).transpose(0, 1).flatten(1))  # noqa: E731
    assert found(turned, 2) == SOUND


def test_an_unknown_order_is_no_proof() -> None:
    order = torch.randperm(B)
    assert found(of_state(lambda h: h[:, order][0]), 2) == SOUND
    # A value that nothing is computed from may be turned back by whoever gets it.
    assert found(lambda m, x: m.rnn(x)[1].view(B, -1), 1, 2) == SOUND


def test_cells_have_no_such_axis() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(F, H)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(B, H)
            for x_t in x.unbind(1):
                h = self.cell(x_t, h)
            return h[0]

    model, x = Loop(), torch.randn(B, T, F)
    (site,) = find_sites(model, recorded(model, x))
    assert state_index(site.calls) == SOUND
    assert state_index(()) == SOUND
