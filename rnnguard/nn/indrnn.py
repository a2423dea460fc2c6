"""IndRNN: each unit sees its own past only, h_t = phi(W x_t + b + u h_{t-1}).

Li et al. 2018 (arXiv 1803.04831). u is the diagonal of torch's `weight_hh_l*`; what lies off
the diagonal is not used. A parameter of its own would leave weight_hh without any gradient,
which distributed training takes for an error, and would add keys and an entry to the optimizer;
so the parameters, the keys and the optimizer's state stay as they are, an undo is bitwise, and
with a diagonal weight_hh within the bound the cell is nn.RNN exactly. The price: the gradient
of weight_hh keeps its full size, with zeros off the diagonal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import Weights
from rnnguard.nn.recurrence_bound import Recurrence, chosen_activation, within_entries
from rnnguard.nn.sequences.diagonal import diagonal_sequence
from rnnguard.nn.sequences.products import both
from rnnguard.nn.stack import Lane, Stack, suffixes
from rnnguard.nn.time_scales import share_of_gain
from rnnguard.records import Direction


class IndependentRecurrence(Recurrence):
    """The `recurrence` of an IndRNN: |u| <= bound in the forward, whatever the parameter holds.

    memory: steps T of the task, None where unknown.
    read_last: whether only the last output is read, so that the last layer starts long.
    """

    def __init__(
        self, activation: str, bound: float, memory: float | None, read_last: bool
    ) -> None:
        super().__init__(activation, bound)
        self.memory, self.read_last = memory, read_last


def indrnn_parts(
    module: nn.RNNBase,
    *,
    activation: str | None = None,
    memory: float | None = None,
    bound: float | None = None,
    read_last: bool = False,
) -> dict[str, nn.Module]:
    """The child of an IndRNN, `recurrence`; `starting_weights` are to be written besides.

    activation: None for the module's own.
    memory: steps T of the task. A gradient may then grow twofold over them in all L layers
    together: |u| <= 2^(1/(T L)). None: |u| <= 1.
    bound: the bound on |u| itself, in place of that; infinite for none.
    read_last: see `starting_weights`.
    """
    nonlinearity = str(module.nonlinearity)
    limit = share_of_gain(memory, module.num_layers) if bound is None else bound
    chosen = activation or nonlinearity
    return {"recurrence": IndependentRecurrence(chosen, limit, memory, read_last)}


def starting_weights(
    module: nn.RNNBase, part: IndependentRecurrence, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """By name, what each `weight_hh_l*` is to hold at the start: u from U(0, 1), zeros beside it.

    With `read_last` and a memory of T steps, the last layer's u is from U(2^(-1/T), bound): what
    it holds then lasts until it is read. Section 3.2 of the paper.
    """
    made = {}
    for suffix in suffixes(module):
        high = min(1.0, part.bound)
        low = 0.0
        if part.read_last and part.memory and suffix.startswith(f"l{module.num_layers - 1}"):
            low = 2 ** (-1 / part.memory)
            high = max(low, min(part.bound, 2 ** (1 / part.memory)))
        u = low + (high - low) * torch.rand(module.hidden_size, generator=generator)
        made[f"weight_hh_{suffix}"] = torch.diag(u)
    return made


class IndRNN(Stack, nn.RNN):
    """nn.RNN whose units are independent of each other; same weights and keys.

    Takes what nn.RNN takes, and the options of `indrnn_parts`; ReLU where no activation is
    named. A checkpoint of an nn.RNN loads, and the diagonals of its recurrent weights are used.
    """

    recurrence: IndependentRecurrence

    def __init__(
        self,
        *sizes: Any,
        activation: str | None = None,
        memory: float | None = None,
        bound: float | None = None,
        read_last: bool = False,
        **options: Any,
    ) -> None:
        chosen = chosen_activation(activation, sizes, options)
        super().__init__(*sizes, **options)
        limits = {"memory": memory, "bound": bound, "read_last": read_last}
        self.take(indrnn_parts(self, activation=chosen, **limits))  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "recurrence" not in self._modules:  # still being built
            return
        with torch.no_grad():
            for name, value in starting_weights(self, self.recurrence).items():
                nn.init.zeros_(self.get_parameter(name)).add_(value.to(self.get_parameter(name)))

    def lane_weights(self, layer: int, way: Direction) -> Weights:
        return super().weights_used(layer, way)

    def weights_used(self, layer: int, way: Direction) -> Weights:
        held = super().weights_used(layer, way)
        return replace(held, hh=torch.diag(self._own(held)))

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        held, state, phi = lane.weights, lane.states[0], self.recurrence.activation
        u, bias = self._own(held), both(held.bias_ih, held.bias_hh)
        return diagonal_sequence(lane.x, state, held.ih, u, bias, phi, lane.over)

    def _own(self, held: Weights) -> Tensor:
        """u (H,), within the bound."""
        # By steps of H + 1, which every export knows; `diagonal` none of ONNX's evaluators runs.
        entries = held.hh.reshape(-1)[:: self.hidden_size + 1]
        return within_entries(entries, self.recurrence.bound)
