"""What all cells share: layers, directions and torch's contract around one layer's sequence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from rnnguard.inspection.gates import GATES, Weights, cell_of, weights_of
from rnnguard.nn.contract import refuse_script, warn_of_older_checkpoint
from rnnguard.nn.layout import Laid, laid_out
from rnnguard.nn.sequences.parts import GRUWeights, LSTMWeights
from rnnguard.records import Direction

WAYS: tuple[Direction, Direction] = ("forward", "reverse")


@dataclass(frozen=True)
class Lane:
    """One layer in one direction of one call: what its sequence is run with.

    x: (T, B, F), in the order in which the steps are taken.
    states: (B, n) each.
    over: (T, B, 1), 1 where a shorter sequence is over and its state stays; None: nowhere.
    suffix: as in torch's names, such as `l0_reverse`.
    """

    x: Tensor
    states: tuple[Tensor, ...]
    weights: Weights
    over: Tensor | None
    suffix: str

    def rows(self) -> GRUWeights:
        """The weights as a sequence without projection takes them."""
        held = self.weights
        return GRUWeights(held.ih, held.hh, held.bias_ih, held.bias_hh)

    def lstm(self) -> LSTMWeights:
        """The weights as an LSTM's sequence takes them."""
        return LSTMWeights(*self.rows(), self.weights.hr)


class Stack(nn.RNNBase):
    """A subclass of one of torch's modules whose layers run through a sequence of rnnguard's.

    Torch's parameters stay, with their names; what a cell needs besides lies in child modules,
    so that a morph is a class and some children. Weights are read off the module at every call.
    """

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        """Outputs (T, B, n) and the last states of one layer in one direction."""
        raise NotImplementedError

    def takes_pair(self, hx: Any) -> bool:
        """Whether the state of this call is (h, c)."""
        cell = cell_of(self)
        assert cell is not None
        return GATES[cell].carries_cell_state

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        # In a compiled model a recurrence stays as it is, like torch's own, and keeps its
        # speed: traced, it would be unrolled over the steps. Without need, the import takes long.
        run = _kept_eager() if "torch._dynamo" in sys.modules else Stack._forward
        return run(self, input, hx)

    def _forward(self, input: Any, hx: Any) -> tuple[Any, Any]:
        pair = self.takes_pair(hx)
        laid = laid_out(self, input, hx, pair)
        over, y, last = laid.over(), laid.x, []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                y = dropout(y, self.dropout, self.training)
            outputs = []
            for way in WAYS if self.bidirectional else WAYS[:1]:
                output, *states = self._run(laid, y, over, layer, way)
                outputs.append(output)
                last.append(states)
            y = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        final = tuple(laid.final(list(states)) for states in zip(*last, strict=True))
        return laid.output(y), final if pair else final[0]

    def _run(
        self, laid: Laid, y: Tensor, over: Tensor | None, layer: int, way: Direction
    ) -> tuple[Tensor, ...]:
        """One layer in one direction, its outputs in the order of the input."""
        place = layer * (2 if self.bidirectional else 1) + WAYS.index(way)
        states = tuple(state[place] for state in laid.states)
        suffix = f"l{layer}_reverse" if way == "reverse" else f"l{layer}"
        x = laid.turned(y) if way == "reverse" else y
        output, *last = self.lane(Lane(x, states, weights_of(self, layer, way), over, suffix))
        return laid.turned(output) if way == "reverse" else output, *last

    def take(self, parts: Mapping[str, nn.Module]) -> None:
        """Adds the children that a cell needs, where and as its weights are."""
        like = next(self.parameters())
        for name, part in parts.items():
            self.add_module(name, part.to(device=like.device, dtype=like.dtype))

    def reset_parameters(self) -> None:
        """Torch's own draw for torch's own parameters, and each child's for its own."""
        reach = self.hidden_size**-0.5
        for weight in self.parameters(recurse=False):
            nn.init.uniform_(weight, -reach, reach)
        for child in self.children():
            again = getattr(child, "reset_parameters", None)
            if again is not None:
                again()

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks first."""
        refuse_script(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """As torch does; tells why keys are missing where the checkpoint is a plain module's."""
        super()._load_from_state_dict(state_dict, prefix, *more)
        keys = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        held = {key.partition(".")[0] for key in keys}
        added = [name for name, child in self.named_children() if [*child.parameters()]]
        if held and not held.intersection(added):
            warn_of_older_checkpoint(prefix, added)


_eager: Callable[[Stack, Any, Any], tuple[Any, Any]] | None = None


def _kept_eager() -> Callable[[Stack, Any, Any], tuple[Any, Any]]:
    global _eager
    if _eager is None:
        _eager = torch.compiler.disable(Stack._forward)  # type: ignore[no-untyped-call]
    return _eager


def suffixes(module: nn.RNNBase) -> list[str]:
    """The endings of torch's names for every layer and direction, in the order of its states."""
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{way}" for layer in range(module.num_layers) for way in ways]
