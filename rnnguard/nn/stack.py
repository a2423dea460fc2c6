"""What all cells share: layers, directions and torch's contract around one layer's sequence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from rnnguard.inspection.gates import Weights, carries_cell_state, recurrences
from rnnguard.nn.call import taken_apart
from rnnguard.nn.contract import redraw_own, refuse_script, warn_of_older_checkpoint
from rnnguard.nn.layout import Laid, laid_out
from rnnguard.nn.one_call import States, as_one_call
from rnnguard.nn.sequences.parts import GRUWeights, LSTMWeights
from rnnguard.probe.stepping import OwnRecurrence, Stepping
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


class Stack(OwnRecurrence, nn.RNNBase):
    """A subclass of one of torch's modules whose layers run through a sequence of rnnguard's.

    Torch's parameters stay, with their names; what a cell needs besides lies in child modules,
    so that a morph is a class and some children. Weights are read off the module at every call.
    """

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        """Outputs (T, B, n) and the last states of one layer in one direction."""
        raise NotImplementedError

    def lane_weights(self, layer: int, way: Direction) -> Weights:
        """The weights that `lane` is to be given."""
        return self.weights_used(layer, way)

    def gates(self, lane: Lane) -> dict[str, Tensor]:
        """The gates (1, B, H) of the lane's one step by torch's names, of a cell that has them."""
        return {}

    def drive(self, lane: Lane) -> Tensor:
        """What the input adds to the pre-activations of all steps, (T, B, n)."""
        return lane.x @ lane.weights.ih.t()

    def keep_bias(self, suffix: str) -> Tensor | None:
        """The keep gate's offset (H,) where it lies in no bias of torch's."""
        return None

    def takes_pair(self, hx: Any) -> bool:
        """Whether the state of this call is (h, c)."""
        return carries_cell_state(self)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        # In a compiled model a recurrence stays as it is, like torch's own, and keeps its
        # speed: traced, it would be unrolled over the steps. Without need, the import takes long.
        run = _kept_eager() if "torch._dynamo" in sys.modules else Stack._forward
        return run(self, input, hx)

    def _forward(self, input: Any, hx: Any) -> tuple[Any, Any]:
        call = taken_apart(self, input, hx, self.takes_pair(hx))
        run = partial(self._layers, call.batch_sizes)
        return call.result(*as_one_call(self, call.rows, call.batch_sizes, call.states, run))

    def _layers(
        self, batch_sizes: Tensor | None, rows: Tensor, states: States
    ) -> tuple[Tensor, States]:
        laid = laid_out(rows, batch_sizes)
        over, y, last = laid.over(), laid.x, []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                y = dropout(y, self.dropout, self.training)
            outputs = []
            for way in WAYS if self.bidirectional else WAYS[:1]:
                output, *own = self._run(laid, y, states, over, layer, way)
                outputs.append(output)
                last.append(own)
            y = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        return laid.rows(y), tuple(torch.stack(own) for own in zip(*last, strict=True))

    def _run(
        self, laid: Laid, y: Tensor, states: States, over: Tensor | None, layer: int, way: Direction
    ) -> tuple[Tensor, ...]:
        """One layer in one direction, its outputs in the order of the input."""
        place = layer * (2 if self.bidirectional else 1) + WAYS.index(way)
        own = tuple(state[place] for state in states)
        x = laid.turned(y) if way == "reverse" else y
        weights = self.lane_weights(layer, way)
        output, *last = self.lane(Lane(x, own, weights, over, suffix_of(layer, way)))
        return laid.turned(output) if way == "reverse" else output, *last

    def stepping(self, layer: int, way: Direction) -> Stepping:
        """One step of the layer as its sequence makes it."""
        weights, suffix = self.lane_weights(layer, way), suffix_of(layer, way)

        def lane(x: Tensor, states: States = ()) -> Lane:
            return Lane(x, states, weights, None, suffix)

        return Stepping(
            step=lambda x, states: self.lane(lane(x[None], states))[1:],
            gates=lambda x, states: self.gates(lane(x[None], states)),
            drive=lambda x: self.drive(lane(x)),
            keep_bias=self.keep_bias(suffix),
        )

    def take(self, parts: Mapping[str, nn.Module]) -> None:
        """Adds the children that a cell needs, where and as its weights are."""
        like = next(self.parameters())
        for name, part in parts.items():
            self.add_module(name, part.to(device=like.device, dtype=like.dtype))

    def reset_parameters(self) -> None:
        """Torch's own draw for torch's own parameters, and each child's for its own."""
        redraw_own(self)
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


def suffix_of(layer: int, way: Direction) -> str:
    """The ending of torch's names for a layer in a direction, such as `l0_reverse`."""
    return f"l{layer}_reverse" if way == "reverse" else f"l{layer}"


def suffixes(module: nn.RNNBase) -> list[str]:
    """The endings of torch's names for every layer and direction, in the order of its states."""
    return [suffix_of(layer, way) for layer, way in recurrences(module)]
