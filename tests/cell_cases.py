"""Every cell of rnnguard.nn with a recurrence of its own, small, and what holds for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

from rnnguard import nn as cells
from rnnguard.inspection.gates import plain_class

IN, HIDDEN, STEPS, BATCH = 4, 5, 7, 4
LENGTHS = [3, STEPS, 1, 5]
F64 = torch.float64

CELLS: dict[str, Callable[..., nn.RNNBase]] = {
    "layer norm lstm": cells.LayerNormLSTM,
    "layer norm gru": cells.LayerNormGRU,
    "layer norm rnn": cells.LayerNormRNN,
    "zoneout lstm": cells.ZoneoutLSTM,
    "zoneout gru": cells.ZoneoutGRU,
    "residual rnn": cells.ResidualRNN,
    "bounded rnn": cells.BoundedRNN,
    "indrnn": cells.IndRNN,
    "gated rnn": cells.GatedRNN,
    "gate-last gru": cells.GateLastGRU,
}
WITHOUT_KEYS = {"zoneout lstm", "zoneout gru", "bounded rnn", "indrnn", "gate-last gru"}

# Everything at once: what can go wrong with one of these goes wrong here too.
DEEP: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


def build(name: str, **options: Any) -> nn.RNNBase:
    """In float64 and evaluation, every parameter drawn, so that nothing is at a plain start."""
    module = CELLS[name](IN, HIDDEN, **{"dtype": F64, **options}).eval()
    return drawn(module)


def drawn(module: nn.RNNBase) -> nn.RNNBase:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.6, 0.6)
    return module


def plain_of(module: nn.RNNBase) -> type[nn.RNNBase]:
    """The class of torch that a cell is a subclass of."""
    cls = plain_class(module)
    assert cls is not None and issubclass(cls, nn.RNNBase)
    return cls


def carries_cell(module: nn.RNNBase) -> bool:
    return plain_of(module) is nn.LSTM


def states_of(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def initial(module: nn.RNNBase, *batch: int) -> Any:
    """Drawn initial states in the form that the module takes."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    dtype = module.weight_ih_l0.dtype
    hidden = torch.randn(count, *batch, module.proj_size or module.hidden_size, dtype=dtype)
    if not carries_cell(module):
        return hidden
    return hidden, torch.randn(count, *batch, module.hidden_size, dtype=dtype)


def of_sequence(state: Any, index: int) -> Any:
    """One sequence's part of the states of a batch, unbatched."""
    if isinstance(state, tuple):
        return tuple(part[:, index] for part in state)
    return state[:, index]


def ragged(batch_first: bool = False) -> tuple[list[Tensor], PackedSequence]:
    """Sequences of LENGTHS, alone and packed in no order."""
    sequences = [torch.randn(length, IN, dtype=F64) for length in LENGTHS]
    padded = pad_sequence(sequences, batch_first=batch_first)
    packed = pack_padded_sequence(padded, LENGTHS, batch_first, enforce_sorted=False)
    return sequences, packed


def close(mine: Any, theirs: Any) -> None:
    """Equal to 1e-12, output and states."""
    for own, other in zip(flat(mine), flat(theirs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, PackedSequence):
        return [found.data]
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found for tensor in flat(part)]


def with_weights_of(module: nn.RNNBase, **options: Any) -> nn.RNNBase:
    """Torch's own module with the same sizes and weights."""
    for name in ("num_layers", "bias", "batch_first", "bidirectional", "proj_size"):
        if getattr(module, name) != {"num_layers": 1, "bias": True}.get(name, 0):
            options[name] = getattr(module, name)
    if plain_of(module) is nn.RNN:
        options.setdefault("nonlinearity", module.nonlinearity)
    plain = plain_of(module)(module.input_size, module.hidden_size, **options)
    plain = plain.to(module.weight_ih_l0.dtype)
    own = {key: value for key, value in module.state_dict().items() if "." not in key}
    plain.load_state_dict(own)
    return plain


# The forms in which a reduction to torch's own module is checked.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep and bidirectional": DEEP,
    "without bias": {"bias": False},
    "batch first": {"batch_first": True},
}


def assert_is_torchs(module: nn.RNNBase, plain: nn.RNNBase) -> None:
    """Outputs, states and gradients equal torch's, for a padded and for a packed batch."""
    x = torch.randn(STEPS, BATCH, IN, dtype=F64, requires_grad=True)
    if module.batch_first:
        x = torch.randn(BATCH, STEPS, IN, dtype=F64, requires_grad=True)
    hx = initial(module, BATCH)
    mine, theirs = module(x, hx), plain(x, hx)
    close(mine, theirs)
    shared = [name for name, _ in plain.named_parameters()]
    weights, gradients = [torch.randn_like(part) for part in flat(theirs)], []
    for found, owner in ((mine, module), (theirs, plain)):
        wanted = [x, *(owner.get_parameter(name) for name in shared)]
        gradients.append(torch.autograd.grad(flat(found), wanted, weights))
    close(*gradients)
    _, packed = ragged(module.batch_first)
    close(module(packed, hx), plain(packed, hx))
