"""The GRU whose reset gate acts on the output: its equation, its states, torch's with r = 1."""

from __future__ import annotations

import pytest
import torch
from cell_cases import (
    BATCH,
    DEEP,
    F64,
    FORMS,
    HIDDEN,
    IN,
    STEPS,
    assert_is_torchs,
    build,
    close,
    of_sequence,
    ragged,
    with_weights_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence


def open_reset(module: nn.RNNBase) -> nn.RNNBase:
    """The module with r = 1 whatever comes in."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter[:HIDDEN] = 20.0 if "bias" in name else 0.0
    return module


@pytest.mark.parametrize("form", [form for form in FORMS if form != "without bias"])
def test_with_its_reset_gate_open_it_is_torchs(form: str) -> None:
    """There alone the two cells are one: sigma(40) is 1 in float64."""
    module = open_reset(build("gate-last gru", **FORMS[form]))
    assert_is_torchs(module, with_weights_of(module))


def by_hand(module: nn.RNNBase, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outputs = []
    for now in x:
        fed = now @ module.weight_ih_l0.t() + module.bias_ih_l0
        r, z, n = (fed + h @ module.weight_hh_l0.t() + module.bias_hh_l0).chunk(3, -1)
        c = z.sigmoid() * c + (1 - z.sigmoid()) * n.tanh()
        h = r.sigmoid() * c
        outputs.append(h)
    return torch.stack(outputs), h, c


def test_its_equation() -> None:
    module = build("gate-last gru")
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    h, c = torch.randn(2, BATCH, HIDDEN, dtype=F64)
    y, last_h, last_c = by_hand(module, x, h, c)
    close(module(x, (h[None], c[None])), (y, (last_h[None], last_c[None])))
    y, last_h, _ = by_hand(module, x, h, h)
    close(module(x, h[None]), (y, last_h[None]))


def test_a_pair_carries_the_whole_state_from_window_to_window() -> None:
    module = build("gate-last gru", num_layers=2)
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    zero = torch.zeros(2, BATCH, HIDDEN, dtype=F64)
    whole, last = module(x, (zero, zero))
    first, state = module(x[:3], (zero, zero))
    second, end = module(x[3:], state)
    close((torch.cat((first, second)), end), (whole, last))
    close(module(x)[0], whole)
    alone, single = module(x[3:], state[0])
    assert isinstance(single, Tensor)  # a tensor for a tensor, as of nn.GRU
    assert not torch.allclose(alone, second)


def test_a_pair_with_packed_sequences() -> None:
    module = build("gate-last gru", **DEEP)
    sequences, packed = ragged()
    hx = tuple(torch.randn(2, 4, BATCH, HIDDEN, dtype=F64))
    output, state = module(packed, hx)
    rows, _ = pad_packed_sequence(output, batch_first=True)
    for index, sequence in enumerate(sequences):
        alone, last = module(sequence, of_sequence(hx, index))
        close((rows[index, : len(sequence)], of_sequence(state, index)), (alone, last))


def test_a_keep_bias_keeps_as_in_torchs() -> None:
    module = build("gate-last gru")
    with torch.no_grad():
        module.bias_ih_l0[HIDDEN : 2 * HIDDEN] = 1e4
    c = torch.randn(1, BATCH, HIDDEN, dtype=F64)
    x = torch.randn(STEPS, BATCH, IN, dtype=F64)
    assert torch.equal(module(x, (c, c))[1][1], c)


def test_the_state_passes_no_matrix() -> None:
    """dc_T / dc_0 along the carried state alone is the product of z: with z = 1 it is 1."""
    module = build("gate-last gru")
    with torch.no_grad():
        module.bias_ih_l0[HIDDEN : 2 * HIDDEN] = 1e4
    x = torch.randn(200, 1, IN, dtype=F64)
    h = torch.zeros(1, 1, HIDDEN, dtype=F64)
    found = torch.autograd.functional.jacobian(lambda c: module(x, (h, c))[1][1].flatten(), h)
    close(found.reshape(HIDDEN, HIDDEN), torch.eye(HIDDEN, dtype=F64))
