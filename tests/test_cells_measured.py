"""A cell of rnnguard.nn is a site like torch's own: one call, every layer read along its steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.overrides import TorchFunctionMode

import rnnguard
from rnnguard.errors import RefusedError
from rnnguard.inspection.recording import record
from rnnguard.measurements import SiteReadings
from rnnguard.nn import AttentionReadout, BetweenLayers, DropConnect, Orthogonal
from rnnguard.probe.nonfinite import Search, named_inputs, named_parameters

STEPS, IN, HIDDEN = 12, 3, 6
CELLS = [
    "LayerNormLSTM", "LayerNormGRU", "LayerNormRNN", "ZoneoutLSTM", "ZoneoutGRU", "ResidualRNN",
    "BoundedRNN", "IndRNN", "GatedRNN", "GateLastGRU",
]  # fmt: skip
every_cell = pytest.mark.parametrize("name", CELLS)


class Net(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(HIDDEN * (2 if rnn.bidirectional else 1), 2)

    def forward(self, x: Any) -> Tensor:
        output, _ = self.rnn(x)
        if isinstance(output, PackedSequence):
            output = nn.utils.rnn.pad_packed_sequence(output)[0]
        out: Tensor = self.head(output[-1])
        return out


def readings(rnn: nn.RNNBase, x: Any = None) -> SiteReadings:
    torch.manual_seed(1)
    given = torch.randn(STEPS, 4, IN) if x is None else x
    report = rnnguard.audit(Net(rnn), inputs=given, memory=STEPS)
    (site,) = report.sites
    assert site.path == "rnn" and site.form == "fused" and site.module == type(rnn).__name__
    return report["rnn"]


@every_cell
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True], ids=["one way", "both ways"])
def test_all_layers_and_directions_are_one_site(name: str, layers: int, both: bool) -> None:
    rnn = getattr(rnnguard.nn, name)(IN, HIDDEN, num_layers=layers, bidirectional=both)
    found = readings(rnn)
    assert len(found.layer_readings) == layers * (2 if both else 1)
    assert found.retention[0] == 0 and len(found.retention) == STEPS + 1
    assert found.layers == layers and found.bidirectional == both
    if found.cell in ("lstm", "gru"):
        assert found.forget_gate is not None and 0 < found.forget_gate < 1


@every_cell
def test_a_forward_is_recorded_as_one_native_call(name: str) -> None:
    net = Net(getattr(rnnguard.nn, name)(IN, HIDDEN, num_layers=2))
    x = torch.randn(STEPS, 4, IN)
    recording = record(lambda: net(x), net, x)
    (call,) = recording.calls
    assert call.module is net.rnn and call.node.meta["module"] == "rnn"
    assert call.input.shape == x.shape and call.batch_sizes is None
    assert torch.equal(recording.result, net(x)) or name.startswith("Zoneout")


@every_cell
def test_packed_sequences_are_read_by_their_lengths(name: str) -> None:
    rnn = getattr(rnnguard.nn, name)(IN, HIDDEN)
    packed = pack_sequence([torch.randn(n, IN) for n in (5, STEPS, 7)], enforce_sorted=False)
    found = readings(rnn, (packed,))
    assert found.packed and found.steps == STEPS and found.batch == 3


def test_a_mode_of_the_users_own_changes_nothing() -> None:
    class Counting(TorchFunctionMode):
        seen = 0

        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            Counting.seen += 1
            return func(*args, **(kwargs or {}))

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            with Counting():
                return super().forward(x)

    net, x = Watched(rnnguard.nn.LayerNormGRU(IN, HIDDEN)), torch.randn(STEPS, 4, IN)
    expected = net(x)
    alone, Counting.seen = Counting.seen, 0
    recording = record(lambda: net(x), net, x)
    assert len(recording.calls) == 1 and torch.equal(recording.result, expected)
    assert alone > STEPS and Counting.seen > 0


def test_layers_with_a_norm_between_them_are_read_together() -> None:
    between = partial(BetweenLayers, norm=True)
    found = readings(rnnguard.nn.FusedLSTM(IN, HIDDEN, num_layers=2, between=between))
    plain = readings(nn.LSTM(IN, HIDDEN, num_layers=2))
    assert [layer.layer for layer in found.layer_readings] == [0, 1]
    # The upper layer is fed what the norm gives: as loud as its gain.
    assert found.layer_readings[1].output_rms > plain.layer_readings[1].output_rms


def test_recurrent_weights_are_read_as_they_are_made() -> None:
    rnn = rnnguard.nn.FusedRNN(IN, HIDDEN, recurrent=Orthogonal)
    assert readings(rnn).spectral_radius == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(0.1)  # the orthogonal factor stays
    assert readings(rnn).spectral_radius == pytest.approx(1.0, abs=1e-5)


def test_dropped_weights_are_read_without_dropping() -> None:
    rnn = rnnguard.nn.FusedLSTM(IN, HIDDEN, recurrent=partial(DropConnect, p=0.9))
    plain = nn.LSTM(IN, HIDDEN)
    plain.load_state_dict(rnn.state_dict())
    assert readings(rnn).retention == pytest.approx(readings(plain).retention)


def test_attention_over_the_past_reads_every_step() -> None:
    for rnn, readout in (
        (nn.LSTM(IN, HIDDEN), "last_step"),
        (rnnguard.nn.FusedLSTM(IN, HIDDEN, attention=AttentionReadout), "pooled"),
    ):
        assert readings(rnn).readout == readout


def test_a_norm_takes_a_loud_input_down() -> None:
    loud = 50 * torch.randn(STEPS, 4, IN)
    drives = [readings(make(IN, HIDDEN), loud).input_drive
              for make in (nn.LSTM, rnnguard.nn.LayerNormLSTM)]  # fmt: skip
    assert drives[0] is not None and drives[0] > 10
    assert drives[1] is not None and drives[1] < 2


@pytest.mark.parametrize("name", ["LayerNormLSTM", "LayerNormGRU"])
def test_the_keep_bias_of_a_normed_cell_lies_in_its_shift(name: str) -> None:
    found = readings(getattr(rnnguard.nn, name)(IN, HIDDEN, forget=1.5))
    assert found.forget_bias == pytest.approx(1.5)


def test_a_value_that_is_not_finite_is_found_at_its_step() -> None:
    rnn = rnnguard.nn.BoundedRNN(IN, HIDDEN, activation="relu", bound=float("inf"), bias=False)
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(1.0)
        rnn.weight_hh_l0.copy_(2 * torch.eye(HIDDEN))
    net, x = Net(rnn), torch.zeros(200, 1, IN)
    x[0] = 1 / IN
    inputs, parameters = named_inputs((x,), {}, ()), named_parameters(net, ())
    place = Search(net, inputs, parameters, 0, 0).run(lambda: net(x).mean())
    # 2^t overflows float32 at t = 128.
    assert place is not None and (place.operation, place.time) == ("rnn_relu", 128)


def test_a_kernel_that_the_user_calls_layer_by_layer_is_refused_in_words() -> None:
    class LayerByLayer(nn.LSTM):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            zero = x.new_zeros(1, x.shape[1], HIDDEN)
            for layer in range(2):
                held = self._flat_weights[4 * layer : 4 * layer + 4]
                x, h, c = torch._VF.lstm(x, (zero, zero), held, True, 1, 0.0, False, False, False)
            return x, (h, c)

    with pytest.raises(RefusedError, match="calls the kernel layer by layer"):
        rnnguard.audit(Net(LayerByLayer(IN, HIDDEN, 2)), inputs=torch.randn(STEPS, 4, IN))
