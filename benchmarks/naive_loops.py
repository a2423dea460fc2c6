"""The loops that people write for each cell: one Python step per time step, nothing hoisted.

Input and state are projected at every step, autograd follows every operation, the outputs are
stacked. What does not depend on the step (a bounded matrix, a diagonal) is made once. One layer
in one direction, from a state of zeros, on the parameters of a module at hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnnguard import nn as cells
from rnnguard.inspection.gates import Weights, weights_of
from rnnguard.nn.layer_norm_cells import GateAndCellNorm, GateNorm
from rnnguard.nn.sequences.activation import ACTIVATIONS
from rnnguard.nn.sequences.products import both

# From x_t (B, F) and the states h and c (B, H) to the next ones; h is the output.
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def naive(module: nn.RNNBase, x: Tensor) -> Tensor:
    """The outputs (T, B, H) of a module of LOOPS for x (T, B, F); zoneout draws in training."""
    step = LOOPS[type(module)](module)
    h = c = x.new_zeros(x.shape[1], module.hidden_size)
    outputs = []
    for now in x:
        h, c = step(now, h, c)
        outputs.append(h)
    return torch.stack(outputs)


def _lstm_cell(module: nn.RNNBase) -> Step:
    """What nn.LSTMCell calls."""
    w = _weights(module)
    return lambda x, h, c: torch.lstm_cell(x, (h, c), w.ih, w.hh, w.bias_ih, w.bias_hh)


def _ind_rnn(module: nn.RNNBase) -> Step:
    assert isinstance(module, cells.IndRNN)
    w, part = _weights(module), module.recurrence
    phi, bias = ACTIVATIONS[part.activation].plain, both(w.bias_ih, w.bias_hh)
    u = w.hh.diagonal().clamp(-part.bound, part.bound)
    return lambda x, h, c: (phi(F.linear(x, w.ih, bias) + u * h), c)


def _layer_norm_lstm(module: nn.RNNBase) -> Step:
    w, norm = _weights(module), module.get_submodule("norm_l0")
    assert isinstance(norm, GateAndCellNorm)

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (_fed(x, w, norm) + _back(h, w, norm)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        read = F.layer_norm(c, c.shape[-1:], norm.gain_cell, norm.shift_cell, norm.eps)
        return o.sigmoid() * read.tanh(), c

    return step


def _zoneout_lstm(module: nn.RNNBase) -> Step:
    assert isinstance(module, cells.ZoneoutLSTM)
    w, part = _weights(module), module.zoneout

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (F.linear(x, w.ih, w.bias_ih) + F.linear(h, w.hh, w.bias_hh)).chunk(4, -1)
        new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        out = o.sigmoid() * new.tanh()
        return (
            _zoned_out(out, h, part.hidden, module.training),
            _zoned_out(new, c, part.cell, module.training),
        )

    return step


def _layer_norm_gru(module: nn.RNNBase) -> Step:
    w, norm = _weights(module), module.get_submodule("norm_l0")
    assert isinstance(norm, GateNorm)
    return lambda x, h, c: (_gru(_fed(x, w, norm), _back(h, w, norm), h), c)


def _zoneout_gru(module: nn.RNNBase) -> Step:
    assert isinstance(module, cells.ZoneoutGRU)
    w, part = _weights(module), module.zoneout

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        new = _gru(F.linear(x, w.ih, w.bias_ih), F.linear(h, w.hh, w.bias_hh), h)
        return _zoned_out(new, h, part.hidden, module.training), c

    return step


def _gate_last_gru(module: nn.RNNBase) -> Step:
    w = _weights(module)

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        r, z, n = (F.linear(x, w.ih, w.bias_ih) + F.linear(h, w.hh, w.bias_hh)).chunk(3, -1)
        z = z.sigmoid()
        c = z * c + (1 - z) * n.tanh()
        return r.sigmoid() * c, c

    return step


def _layer_norm_rnn(module: nn.RNNBase) -> Step:
    w, norm, phi = _weights(module), module.get_submodule("norm_l0"), _phi(module)
    assert isinstance(norm, GateNorm)
    return lambda x, h, c: (phi(_fed(x, w, norm) + _back(h, w, norm)), c)


def _residual_rnn(module: nn.RNNBase) -> Step:
    w, phi = _weights(module), _phi(module)
    part = module.get_submodule("residual_l0")
    carry, scale = part.get_parameter("carry"), part.get_parameter("scale")

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        new = phi(F.linear(x, w.ih, w.bias_ih) + F.linear(h, w.hh, w.bias_hh))
        return carry * h + scale * new, c

    return step


def _bounded_rnn(module: nn.RNNBase) -> Step:
    assert isinstance(module, cells.BoundedRNN)
    w, part = _weights(module), module.recurrence
    phi = ACTIVATIONS[part.activation].plain
    hh = w.hh * (part.bound / torch.linalg.matrix_norm(w.hh, 2)).clamp(max=1)
    return lambda x, h, c: (phi(F.linear(x, w.ih, w.bias_ih) + F.linear(h, hh, w.bias_hh)), c)


def _gated_rnn(module: nn.RNNBase) -> Step:
    w, gate, phi = _weights(module), module.get_submodule("gate_l0"), _phi(module)
    ih, hh, bias = (gate.get_parameter(name) for name in ("weight_ih", "weight_hh", "bias"))

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.sigmoid(F.linear(x, ih, bias) + F.linear(h, hh))
        new = phi(F.linear(x, w.ih, w.bias_ih) + F.linear(h, w.hh, w.bias_hh))
        return (1 - z) * h + z * new, c

    return step


LOOPS: dict[type[nn.RNNBase], Callable[[nn.RNNBase], Step]] = {
    nn.LSTM: _lstm_cell,
    cells.IndRNN: _ind_rnn,
    cells.LayerNormLSTM: _layer_norm_lstm,
    cells.ZoneoutLSTM: _zoneout_lstm,
    cells.LayerNormGRU: _layer_norm_gru,
    cells.ZoneoutGRU: _zoneout_gru,
    cells.GateLastGRU: _gate_last_gru,
    cells.LayerNormRNN: _layer_norm_rnn,
    cells.ResidualRNN: _residual_rnn,
    cells.BoundedRNN: _bounded_rnn,
    cells.GatedRNN: _gated_rnn,
}


def _weights(module: nn.RNNBase) -> Weights:
    return weights_of(module, 0, "forward")


def _phi(module: nn.RNNBase) -> Callable[[Tensor], Tensor]:
    return ACTIVATIONS[str(module.nonlinearity)].plain


def _fed(x: Tensor, w: Weights, norm: GateNorm) -> Tensor:
    projected = F.linear(x, w.ih, w.bias_ih)
    return F.layer_norm(projected, projected.shape[-1:], norm.gain_ih, norm.shift, norm.eps)


def _back(h: Tensor, w: Weights, norm: GateNorm) -> Tensor:
    projected = F.linear(h, w.hh, w.bias_hh)
    return F.layer_norm(projected, projected.shape[-1:], norm.gain_hh, None, norm.eps)


def _gru(fed: Tensor, back: Tensor, h: Tensor) -> Tensor:
    (ur, uz, un), (qr, qz, qn) = fed.chunk(3, -1), back.chunk(3, -1)
    r, z = torch.sigmoid(ur + qr), torch.sigmoid(uz + qz)
    return (1 - z) * torch.tanh(un + r * qn) + z * h


def _zoned_out(new: Tensor, old: Tensor, p: float, training: bool) -> Tensor:
    if p == 0:
        return new
    kept = torch.empty_like(new).bernoulli_(p) if training else p
    return kept * old + (1 - kept) * new
