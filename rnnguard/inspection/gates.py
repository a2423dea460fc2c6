"""The one table of what differs between RNN, LSTM and GRU, and where their weights lie.

Block orders are PyTorch's: LSTM i, f, g, o; GRU r, z, n (keeps with z).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnnguard.records import Cell, Direction


@dataclass(frozen=True)
class Gates:
    """The blocks of one cell's stacked weights, in PyTorch's order."""

    blocks: tuple[str, ...]
    candidate: str
    keep: str | None
    write: str | None
    carries_cell_state: bool

    def block(self, name: str, hidden_size: int) -> slice:
        """The rows of one gate in the stacked weights and biases."""
        start = self.blocks.index(name) * hidden_size
        return slice(start, start + hidden_size)

    @property
    def gated(self) -> bool:
        return self.keep is not None


# A positive bias on `keep` keeps more, for f and for z alike; only the LSTM has a
# separate gate `write` whose bias is tied to it with the opposite sign.
GATES: dict[Cell, Gates] = {
    "rnn_tanh": Gates(("h",), "h", None, None, False),
    "rnn_relu": Gates(("h",), "h", None, None, False),
    "lstm": Gates(("i", "f", "g", "o"), "g", "f", "i", True),
    "gru": Gates(("r", "z", "n"), "n", "z", None, False),
}

_FUSED: dict[type[nn.Module], str] = {nn.RNN: "rnn", nn.LSTM: "lstm", nn.GRU: "gru"}
_SINGLE: dict[type[nn.Module], str] = {nn.RNNCell: "rnn", nn.LSTMCell: "lstm", nn.GRUCell: "gru"}


def is_recurrent(module: object) -> bool:
    """Whether the module derives from torch's recurrent modules or cells."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase)


def is_single_step(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNCellBase)


def is_plain(module: nn.Module) -> bool:
    """Whether the module is exactly torch's class, so that a class morph is safe."""
    return type(module) in _FUSED or type(module) in _SINGLE


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The torch class that the module is or derives from."""
    return next((c for c in (*_FUSED, *_SINGLE) if isinstance(module, c)), None)


def cell_of(module: nn.Module) -> Cell | None:
    """Which of the four cells the module computes."""
    family = next((name for cls, name in (_FUSED | _SINGLE).items() if isinstance(module, cls)), "")
    if family == "rnn":
        return "rnn_relu" if module.nonlinearity == "relu" else "rnn_tanh"
    return family if family in ("lstm", "gru") else None  # type: ignore[return-value]


def carries_cell_state(module: nn.Module) -> bool:
    """Whether torch's state of the module is (h, c)."""
    cell = cell_of(module)
    return cell is not None and GATES[cell].carries_cell_state


@dataclass(frozen=True)
class Weights:
    """The tensors of one layer in one direction, as they stand on the module."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None

    @property
    def hidden_size(self) -> int:
        return self.hr.shape[1] if self.hr is not None else self.hh.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        parts = {"weight_ih": self.ih, "weight_hh": self.hh, "bias_ih": self.bias_ih,
                 "bias_hh": self.bias_hh, "weight_hr": self.hr}  # fmt: skip
        return {name: tensor for name, tensor in parts.items() if tensor is not None}


def recurrences(module: nn.Module) -> list[tuple[int, Direction]]:
    """Every (layer, direction) of the module, in the order of torch's states."""
    if is_single_step(module):
        return [(0, "forward")]
    assert isinstance(module, nn.RNNBase)
    ways: tuple[Direction, ...] = ("forward", "reverse") if module.bidirectional else ("forward",)
    return [(layer, way) for layer in range(module.num_layers) for way in ways]


def parameter_name(module: nn.Module, kind: str, layer: int, direction: Direction) -> str:
    """torch's name of a weight: `weight_hh_l0_reverse`, or `weight_hh` for a single cell."""
    if is_single_step(module):
        return kind
    return f"{kind}_l{layer}{'_reverse' if direction == 'reverse' else ''}"


def weights_of(module: nn.Module, layer: int, direction: Direction) -> Weights:
    """The weights that the next forward will use, parametrized or not."""

    def tensor(kind: str) -> Tensor | None:
        value = getattr(module, parameter_name(module, kind, layer, direction), None)
        return value if isinstance(value, Tensor) else None

    ih, hh = tensor("weight_ih"), tensor("weight_hh")
    assert ih is not None and hh is not None
    return Weights(ih, hh, tensor("bias_ih"), tensor("bias_hh"), tensor("weight_hr"))


def gate_bias(weights: Weights, gates: Gates, name: str) -> Tensor | None:
    """The total bias of one gate, b_ih + b_hh, which is what the gate sees."""
    if weights.bias_ih is None or weights.bias_hh is None:
        return None
    rows = gates.block(name, weights.hidden_size)
    return weights.bias_ih[rows].detach() + weights.bias_hh[rows].detach()


def recurrent_block(weights: Weights, gates: Gates, name: str) -> Tensor:
    """The recurrent matrix of one gate from state to state; (H, H), with `proj_size` (P, P)."""
    block = weights.hh[gates.block(name, weights.hidden_size)].detach()
    if weights.hr is None:
        return block
    return torch.matmul(weights.hr.detach(), block)
