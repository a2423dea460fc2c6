"""nn.RNN, nn.LSTM and nn.GRU that keep torch's kernel and change what lies around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import Weights, carries_cell_state, recurrences
from rnnguard.nn.attention_readout import AttentionReadout
from rnnguard.nn.between_layers import BetweenLayers
from rnnguard.nn.call import taken_apart
from rnnguard.nn.contract import redraw_own, refuse_script, warn_of_older_checkpoint
from rnnguard.nn.kernel import run_layers
from rnnguard.nn.one_call import States, as_one_call
from rnnguard.nn.recurrent_weights import RecurrentWeights, recurrent_parameters
from rnnguard.probe.stepping import OwnRecurrence
from rnnguard.records import Direction

_CHILDREN = ("between", "recurrent", "attention")


class _Fused(OwnRecurrence, nn.Module):
    """Up to three children, each optional, each leaving torch's parameters and keys as they are.

    recurrent (RecurrentWeights): makes the recurrent weights of each forward.
    between (BetweenLayers): stands between the layers, whose kernel then runs layer by layer.
    attention (AttentionReadout): adds attention over its own past to the output.

    As arguments they are what makes such a child for a module, for example
    `FusedLSTM(8, 16, num_layers=2, between=partial(BetweenLayers, norm=True))`; a morph adds
    them to a module that exists. The last states are the kernel's own: what stands between the
    layers reaches them, norm_last and attention do not.
    """

    def __init__(
        self,
        *sizes: Any,
        between: Callable[[nn.RNNBase], BetweenLayers] | None = None,
        recurrent: Callable[[nn.RNNBase], RecurrentWeights] | None = None,
        attention: Callable[[nn.RNNBase], AttentionReadout] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*sizes, **options)
        module = cast(nn.RNNBase, self)
        for name, make in zip(_CHILDREN, (between, recurrent, attention), strict=True):
            if make is not None:
                self.add_module(name, make(module))

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        module = cast(nn.RNNBase, self)
        between = cast(BetweenLayers | None, self._modules.get("between"))
        recurrent = cast(RecurrentWeights | None, self._modules.get("recurrent"))
        attention = cast(AttentionReadout | None, self._modules.get("attention"))
        if between is None and recurrent is None and attention is None:
            return cast(tuple[Any, Any], super().forward(input, hx))
        module._update_flat_weights()
        weights = cast(list[Tensor], module._flat_weights)
        if recurrent is not None:
            weights = _made(module, recurrent, weights)
        call = taken_apart(module, input, hx, carries_cell_state(module))
        sizes = call.batch_sizes
        if between is None:
            whole = slice(0, module.num_layers)
            rows, states = run_layers(module, weights, whole, sizes, call.rows, call.states)
        else:
            run = partial(_layer_by_layer, module, between, weights, sizes)
            rows, states = as_one_call(module, call.rows, sizes, call.states, run)
        if attention is not None:
            rows = attention(rows, call.batch_sizes)
        return call.result(rows, states)

    def weights_used(self, layer: int, way: Direction) -> Weights:
        held = super().weights_used(layer, way)
        recurrent = cast(RecurrentWeights | None, self._modules.get("recurrent"))
        if recurrent is None:
            return held
        module = cast(nn.RNNBase, self)
        made = recurrent(recurrent_parameters(module), module.training)
        return replace(held, hh=made[recurrences(module).index((layer, way))])

    def above(self, layer: int, fed: Tensor, output: Tensor) -> Tensor:
        between = cast(BetweenLayers | None, self._modules.get("between"))
        return output if between is None else between.joined(layer, fed, output, 0.0)

    def reset_parameters(self) -> None:
        """torch's own draw for torch's own parameters, and each child's for its own."""
        redraw_own(cast(nn.RNNBase, self))
        for child in self.children():
            if isinstance(child, RecurrentWeights):
                child.follow(recurrent_parameters(cast(nn.RNNBase, self)))
            elif isinstance(child, BetweenLayers | AttentionReadout):
                child.reset_parameters()

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks first."""
        refuse_script(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """As torch does; tells why keys are missing where the checkpoint is an older one."""
        super()._load_from_state_dict(state_dict, prefix, *more)
        held = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        lacking = {
            name: child
            for name, child in self.named_children()
            if held and not any(key.startswith(f"{name}.") for key in held)
        }
        recurrent = lacking.pop("recurrent", None)
        if isinstance(recurrent, RecurrentWeights):
            # torch hands the children what lies in the dictionary.
            state_dict.update(_completed(cast(nn.RNNBase, self), recurrent, state_dict, prefix))
        added = [name for name, child in lacking.items() if any(True for _ in child.parameters())]
        warn_of_older_checkpoint(prefix, added)


class FusedRNN(_Fused, nn.RNN):
    """nn.RNN on its own kernel, with up to three children around it (see `FusedLSTM`)."""


class FusedLSTM(_Fused, nn.LSTM):
    """nn.LSTM on its own kernel, with up to three children around it.

    `between` stands between the layers, `recurrent` makes the recurrent weights of each forward,
    `attention` reads the outputs of all earlier steps. Without any it is nn.LSTM.
    """


class FusedGRU(_Fused, nn.GRU):
    """nn.GRU on its own kernel, with up to three children around it (see `FusedLSTM`)."""


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: FusedRNN,
    nn.LSTM: FusedLSTM,
    nn.GRU: FusedGRU,
}


def _made(module: nn.RNNBase, recurrent: RecurrentWeights, weights: list[Tensor]) -> list[Tensor]:
    """The flat weights with the recurrent ones replaced by what `recurrent` makes of them."""
    names = module._flat_weights_names
    places = [names.index(name) for name in _recurrent_names(module)]
    made = recurrent([weights[i] for i in places], module.training)
    replaced = dict(zip(places, made, strict=True))
    return [replaced.get(i, weight) for i, weight in enumerate(weights)]


def _recurrent_names(module: nn.RNNBase) -> list[str]:
    return [name for name in module._flat_weights_names if name.startswith("weight_hh_l")]


def _completed(
    module: nn.RNNBase, recurrent: RecurrentWeights, state_dict: dict[str, Any], prefix: str
) -> dict[str, Tensor]:
    """The keys of `recurrent` for a plain module's checkpoint; none where its weights are amiss."""
    given = [state_dict.get(prefix + name) for name in _recurrent_names(module)]
    own = recurrent_parameters(module)
    fit = [w for w, p in zip(given, own, strict=True) if w is not None and w.shape == p.shape]
    made = recurrent.completed(fit) if len(fit) == len(own) else {}
    return {f"{prefix}recurrent.{key}": value for key, value in made.items()}


def _layer_by_layer(
    module: nn.RNNBase,
    between: BetweenLayers,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    rows: Tensor,
    states: States,
) -> tuple[Tensor, States]:
    last = []
    for layer in range(module.num_layers):
        fed, own = between.fed(layer, rows, batch_sizes, module.training), slice(layer, layer + 1)
        output, reached = run_layers(module, weights, own, batch_sizes, fed, states)
        last.append(reached)
        # torch's own dropout: after every layer but the last.
        dropout = module.dropout if module.training and layer + 1 < module.num_layers else 0.0
        rows = between.joined(layer, rows, output, dropout)
    return rows, tuple(torch.cat(states) for states in zip(*last, strict=True))
