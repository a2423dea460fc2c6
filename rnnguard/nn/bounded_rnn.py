"""A plain recurrence whose matrix is bounded, with tanh, ReLU, leaky ReLU or ELU.

Bounded is the spectral norm: with slopes of at most 1 it is what a step can multiply a gradient
by, and rotations, which carry a gradient on unchanged, reach it. A bound on the entries or on
the sums of rows would shrink those too, by up to sqrt(H). Beyond its bound the matrix is scaled
in the forward, differentiably; the parameter is not written, so it can grow on without effect,
and its gradient is then at right angles to it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rnnguard.inspection.gates import Weights
from rnnguard.nn.recurrence_bound import Recurrence, chosen_activation, within_norm
from rnnguard.nn.sequences.elman import elman_sequence
from rnnguard.nn.stack import Lane, Stack
from rnnguard.nn.time_scales import share_of_gain
from rnnguard.records import Direction


def bounded_parts(
    module: nn.RNNBase,
    *,
    activation: str | None = None,
    memory: float | None = None,
    bound: float | None = None,
) -> dict[str, nn.Module]:
    """The child of a BoundedRNN, `recurrence`.

    activation: None for the module's own.
    memory: steps over which a gradient may grow twofold, in all layers together; None: never.
    bound: the bound on the spectral norm itself, in place of `memory`; infinite for none.
    """
    nonlinearity = str(module.nonlinearity)
    limit = share_of_gain(memory, module.num_layers) if bound is None else bound
    return {"recurrence": Recurrence(activation or nonlinearity, limit)}


class BoundedRNN(Stack, nn.RNN):
    """nn.RNN with a bounded recurrent matrix; same weights and keys.

    Takes what nn.RNN takes, and the options of `bounded_parts`; ReLU where no activation is
    named.
    """

    recurrence: Recurrence

    def __init__(
        self,
        *sizes: Any,
        activation: str | None = None,
        memory: float | None = None,
        bound: float | None = None,
        **options: Any,
    ) -> None:
        chosen = chosen_activation(activation, sizes, options)
        super().__init__(*sizes, **options)
        self.take(bounded_parts(self, activation=chosen, memory=memory, bound=bound))

    def weights_used(self, layer: int, way: Direction) -> Weights:
        held = super().weights_used(layer, way)
        return replace(held, hh=within_norm(held.hh, self.recurrence.bound))

    def lane(self, lane: Lane) -> tuple[Tensor, ...]:
        phi = self.recurrence.activation
        return elman_sequence(lane.x, lane.states[0], lane.rows(), phi, kept=lane.over)
