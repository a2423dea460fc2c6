"""Ways around a recurrence, and padding at the ends of its sequences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.inspection.pathways import real_lengths

B, T, F, H = 6, 15, 4, 8
Read = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """An LSTM over x; `read(model, x, out)` makes the model's output."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.rnn = nn.LSTM(F, H, batch_first=True)
        self.score = nn.Linear(F, 1)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x, self.rnn(x)[0])


def attended(model: Model, x: Tensor, out: Tensor) -> Tensor:
    weights = model.score(x).softmax(1)
    return torch.cat([out[:, -1], (weights * x).sum(1)], -1)


def by_length(model: Model, x: Tensor, out: Tensor) -> Tensor:
    lengths = (x != 0).any(-1).sum(1)
    return out[torch.arange(len(x)), lengths - 1]


READ: dict[str, tuple[Read, bool]] = {
    "the last step": (lambda m, x, out: out[:, -1], False),
    "and the input's last step": (lambda m, x, out: torch.cat([out[:, -1], x[:, -1]], -1), False),
    "and the input's mean": (lambda m, x, out: torch.cat([out[:, -1], x.mean(1)], -1), True),
    "and attention over the input": (attended, True),
    "a mask of the input": (lambda m, x, out: out[:, -1] * (x != 0).any(1).any(-1, True), False),
    "the step at each length": (by_length, False),
    "a residual at the last step": (lambda m, x, out: (out[..., :F] + x)[:, -1], False),
    "every step beside the input": (lambda m, x, out: torch.cat([out, x], -1), False),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_way_around_the_recurrence(name: str) -> None:
    read, expected = READ[name]
    report = rnnguard.audit(Model(read), inputs=torch.randn(B, T, F))
    assert report["rnn"].bypass is expected
    assert any("without the recurrence" in note for note in report.notes) is expected


def test_a_way_around_leaves_no_more_than_a_risk() -> None:
    x = torch.randn(B, 60, F)
    levels = [rnnguard.audit(Model(READ[name][0]), inputs=x, memory=60).level
              for name in ("the last step", "and the input's mean")]  # fmt: skip
    assert levels == ["vanishing", "at risk: fading"]


def test_a_hand_written_recurrence_with_a_way_around_it() -> None:
    class Own(nn.Module):
        def __init__(self, around: bool) -> None:
            super().__init__()
            self.cell, self.around = nn.Linear(F + H, H), around

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), H)
            for x_t in x.unbind(1):
                h = self.cell(torch.cat([x_t, h], 1)).tanh()
            return torch.cat([h, x.mean(1)], 1) if self.around else h

    found = [rnnguard.audit(Own(around), inputs=torch.randn(B, T, F)) for around in (False, True)]
    assert [report.now.sites[0].bypass for report in found] == [False, True]


def padded(lengths: list[int], pad: float = 0.0) -> Tensor:
    x = torch.randn(T, len(lengths), F)
    for row, length in enumerate(lengths):
        x[length:, row] = pad
    return x


@pytest.mark.parametrize("pad", [0.0, -1.0])
@pytest.mark.parametrize("lengths", [[15, 12, 9, 3], [15, 14, 14, 9, 3]])
def test_padding_is_a_row_that_several_sequences_end_in(pad: float, lengths: list[int]) -> None:
    full = torch.full((len(lengths),), T)
    assert real_lengths(padded(lengths, pad), full).tolist() == lengths


def test_a_sequence_that_ends_in_two_equal_steps_does_not_hide_the_padding() -> None:
    lengths = [T, 12, 9, 3]
    x = padded(lengths)
    x[-2, 0] = x[-1, 0]
    assert real_lengths(x, torch.full((4,), T)).tolist() == lengths
    x[-2:, 1] = 7.0  # two against two is no padding for sure
    assert real_lengths(x, torch.full((4,), T)).tolist() == [T] * 4


def test_a_common_tail_is_no_padding() -> None:
    full = torch.full((4,), T)
    assert real_lengths(padded([10] * 4), full).tolist() == [T] * 4
    assert real_lengths(padded([15, 15, 15, 9]), full).tolist() == [T] * 4
    black = padded([15, 12, 9, 3])
    black[2:4, 1] = 0.0
    assert real_lengths(black, full).tolist() == [T] * 4
    packed = torch.tensor([15, 12, 9, 3])
    assert real_lengths(padded([15, 12, 9, 3]), packed) is packed


def test_a_step_behind_padding_is_told() -> None:
    x = padded([15, 12, 9, 3, 5, 7]).transpose(0, 1)
    last = rnnguard.audit(Model(READ["the last step"][0]), inputs=x)
    assert "RG202" in {finding.code for finding in last.findings}
    assert last["rnn"].padded == pytest.approx(1 - 51 / 90)
    own = rnnguard.audit(Model(by_length), inputs=x)
    assert own["rnn"].picked and "RG202" not in {finding.code for finding in own.findings}
    # Left out of the figures, silent steps do not count as input.
    assert last["rnn"].silent_input and not own["rnn"].silent_input


class WeightDropped(nn.Module):
    """The recurrent weights pass a dropout at every forward, as in AWD-LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(F, 64, batch_first=True)
        own = self.rnn.weight_hh_l0
        del self.rnn._parameters["weight_hh_l0"]
        self.raw = nn.Parameter(own.detach().clone())
        self.rnn.weight_hh_l0 = own.detach()

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.weight_hh_l0 = nn.functional.dropout(self.raw, 0.5, self.training)
        names = self.rnn._flat_weights_names
        self.rnn._flat_weights = [getattr(self.rnn, name) for name in names]
        return self.rnn(x)[0][:, -1]


def test_weight_drop_is_told_with_its_gain() -> None:
    model, x = WeightDropped(), torch.randn(B, 60, F)
    drawn = rnnguard.audit(model, inputs=x)
    assert drawn["rnn"].remade and any("weight drop" in note for note in drawn.notes)
    radius = drawn["rnn"].spectral_radius or 0.0
    whole = rnnguard.audit(model.eval(), inputs=x)["rnn"].spectral_radius or 0.0
    # Inverted scaling: 1 / sqrt(1 - p), up to the spread of one draw of 64 x 64 weights.
    assert radius / whole == pytest.approx(2**0.5, rel=0.12)


def test_weights_that_stay_are_not_told() -> None:
    report = rnnguard.audit(Model(READ["the last step"][0]), inputs=torch.randn(B, T, F))
    assert not report["rnn"].remade


def test_attention_over_its_own_past_is_a_way_around() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(F + 2 * H, H)

        def forward(self, x: Tensor) -> Tensor:
            past = [x.new_zeros(len(x), H)]
            for x_t in x.unbind(1):
                states = torch.stack(past, 1)
                weights = (states * past[-1][:, None]).sum(-1, keepdim=True).softmax(1)
                seen = (weights * states).sum(1)
                past.append(self.cell(torch.cat([x_t, past[-1], seen], 1)).tanh())
            return past[-1]

    report = rnnguard.audit(Remembering(), inputs=torch.randn(B, T, F))
    assert [site.bypass for site in report.now.sites] == [True]
    assert any("its own past" in note for note in report.notes)
