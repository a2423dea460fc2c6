"""Whether the state behind padding is read, measured by letting the padding grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import subject
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from rnnguard.inspection.recording import record
from rnnguard.inspection.sites import find_sites
from rnnguard.probe.padding import Padding, behind_padding
from rnnguard.probe.snapshot import fingerprint, untouched

F, H, LENGTHS = 5, 16, torch.tensor([13, 11, 9, 8, 7, 6])
B, T = len(LENGTHS), 13
_SEED = torch.Generator().manual_seed(0)
X = pad_sequence([torch.randn(int(n), F, generator=_SEED) for n in LENGTHS], batch_first=True)
IDS = pad_sequence(
    [torch.randint(1, 20, (int(n),), generator=_SEED) for n in LENGTHS], batch_first=True
)
MASK = torch.arange(T) < LENGTHS[:, None]
Read = Callable[..., Any]


class Net(nn.Module):
    rnn: Any
    place: Any

    def __init__(self, read: Read, rnn: nn.Module | None = None, tokens: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, F, padding_idx=0) if tokens else nn.Identity()
        self.rnn = rnn or nn.GRU(F, H, batch_first=True, bidirectional=False)
        self.head, self.read = nn.Linear(H, 3), read

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        logits: Tensor = self.head(self.read(self, self.embed(x), other))
        return logits


def measured(model: nn.Module, *inputs: Tensor, **options: Any) -> Padding:
    given = inputs[0] if len(inputs) == 1 else inputs
    asked = subject(model, [(given, torch.zeros(B, dtype=torch.long))] * 2, **options)
    before = fingerprint(model)
    with untouched(model):
        recording = record(lambda: model(*inputs), model, inputs)
        (site,) = find_sites(model, recording)
        found = behind_padding(asked, site.record)
    assert fingerprint(model) == before
    return found


def last(net: Any, x: Tensor, _: Any) -> Any:
    return net.rnn(x)[0][:, -1]


def final(net: Any, x: Tensor, _: Any) -> Any:
    return net.rnn(x)[1][-1]


def own_ends(net: Any, x: Tensor, lengths: Tensor) -> Any:
    return net.rnn(x)[0][torch.arange(len(x)), lengths - 1]


def packed(net: Any, x: Tensor, lengths: Tensor) -> Any:
    return net.rnn(pack_padded_sequence(x, lengths, batch_first=True))[1][-1]


def held_by_mask(net: Any, x: Tensor, mask: Tensor) -> Tensor:
    """A loop that keeps the state where the mask says that a sequence has ended."""
    h = x.new_zeros(len(x), H)
    for t in range(x.shape[1]):
        h = torch.where(mask[:, t, None], net.rnn(x[:, t], h), h)
    return h


@pytest.mark.parametrize("read", [last, final])
@pytest.mark.parametrize("tokens", [False, True])
def test_the_step_behind_the_padding(read: Read, tokens: bool) -> None:
    assert measured(Net(read, tokens=tokens), IDS if tokens else X) == "measured"


def test_time_first_and_several_layers() -> None:
    net = Net(lambda net, x, _: net.rnn(x)[0][-1], nn.LSTM(F, H, 2, dropout=0.5))
    assert measured(net, X.transpose(0, 1).contiguous()) == "measured"


def test_padding_so_long_that_it_has_worn_out_every_difference() -> None:
    net = Net(last)
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(0.01)
        net.rnn.bias_hh_l0[H : 2 * H] = -9.0  # the state is renewed in every step
    assert measured(net, X) == "measured"


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("read", [own_ends, packed])
def test_lengths_that_are_respected(read: Read, tokens: bool) -> None:
    assert measured(Net(read, tokens=tokens), IDS if tokens else X, LENGTHS) == "no"


def test_a_mask_goes_on_as_in_the_padding() -> None:
    assert measured(Net(held_by_mask, nn.GRUCell(F, H)), X, MASK) == "no"


def test_lengths_counted_from_the_tokens() -> None:
    class Counts(Net):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
            return super().forward(x, (x != 0).sum(1))

    assert measured(Counts(own_ends, tokens=True), IDS) == "no"


def test_without_padding_there_is_nothing_behind_it() -> None:
    assert measured(Net(last), torch.randn(B, T, F)) == "no"


def test_what_cannot_be_made_longer_is_only_seen() -> None:
    def positions(net: Any, x: Tensor, _: Any) -> Any:
        return last(net, x + net.place, _)

    net = Net(positions)
    net.place = nn.Parameter(torch.zeros(T, F))
    assert measured(net, X) == "seen"


def test_noise_that_cannot_be_turned_off_proves_nothing() -> None:
    def noisy(net: Any, x: Tensor, _: Any) -> Any:
        return nn.functional.dropout(last(net, x, _), 0.5)

    assert measured(Net(noisy), X) == "seen"


def test_the_users_own_step() -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    assert measured(Net(last), X, step=step) == "measured"
