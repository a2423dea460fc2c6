"""Turns what a rewrite put into a model back into plain torch, for use without rnnguard.

Of the classes of rnnguard that a rewrite leaves behind, a norm after the recurrence can go: its
module becomes torch's own again, same object, same keys, and a forward hook of torch alone
applies the norm. What lies inside a recurrence stays, and is told. Written values are plain
already, and the step guard lies on the optimizer.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import fx, nn

from rnnguard.errors import Refusal, RNNGuardWarning, refuse
from rnnguard.inspection.preflight import run_refusals
from rnnguard.inspection.wrappers import wrapper_refusals
from rnnguard.nn import (
    AttentionReadout,
    BetweenLayers,
    BoundedRNN,
    DropConnect,
    FusedGRU,
    FusedLSTM,
    FusedRNN,
    GatedRNN,
    GateLastGRU,
    IndRNN,
    LayerNormGRU,
    LayerNormLSTM,
    LayerNormRNN,
    Orthogonal,
    PenalizedRNN,
    ResidualRNN,
    RetentionPenalty,
    SpectralBound,
    WeightNorm,
    ZoneoutGRU,
    ZoneoutLSTM,
)
from rnnguard.nn.output_norm import OUTPUT_NORMS
from rnnguard.records import near_miss
from rnnguard.rewrite.edit import Edit
from rnnguard.rewrite.transaction import transaction

_INSIDE = {
    BoundedRNN: "the bound on its recurrent weights is set anew at each forward",
    GateLastGRU: "its reset gate acts on the output, which torch's does not",
    GatedRNN: "its update gate lies inside the recurrence",
    IndRNN: "its units are independent, with a bound set anew at each forward",
    LayerNormGRU: "its norm lies inside the recurrence",
    LayerNormLSTM: "its norm lies inside the recurrence",
    LayerNormRNN: "its norm lies inside the recurrence",
    PenalizedRNN: "its backward adds a penalty, which a hook on the forward cannot",
    ResidualRNN: "its residual lies inside the recurrence",
    ZoneoutGRU: "its zoneout lies inside the recurrence",
    ZoneoutLSTM: "its zoneout lies inside the recurrence",
}
_AROUND: dict[type[nn.Module], str] = {
    **dict.fromkeys(
        (FusedRNN, FusedLSTM, FusedGRU), "what was added works around each call of its kernel"
    ),
    **dict.fromkeys(
        (
            AttentionReadout,
            BetweenLayers,
            DropConnect,
            Orthogonal,
            RetentionPenalty,
            SpectralBound,
            WeightNorm,
        ),
        "it is a part of a module of rnnguard",
    ),
}
# Every module of rnnguard.nn: torch's class that it becomes again, or the reason why it cannot.
BAKED: Mapping[type[nn.Module], type[nn.Module] | str] = {
    **{normed: plain for plain, normed in OUTPUT_NORMS.items()},
    **_INSIDE,
    **_AROUND,
}
_KEEP = "Keep rnnguard where the model is loaded, or deploy an export of it (torch.export, ONNX)."


@dataclass(frozen=True)
class Baked:
    """What `bake` did: paths turned into torch's own classes, and the reasons of those that stay.

    `earlier` are paths that were baked before this call.
    """

    paths: tuple[str, ...]
    earlier: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    _edit: Edit = field(repr=False, compare=False)

    def undo(self) -> None:
        """Gives the modules their classes of rnnguard back; a second call does nothing.

        It may come after training. The rewrite's own undo should follow it, not precede it.
        """
        self._edit.rollback_()

    def __str__(self) -> str:
        lines = [f"`{path}` is torch's own class again." for path in self.paths]
        lines += [f"`{path}` was baked before." for path in self.earlier]
        lines += [f"Stays: {refusal}" for refusal in self.refusals]
        return "\n".join(lines) or "Nothing to bake: the model holds no module of rnnguard."


def bake(model: nn.Module, *, packed: Iterable[str] = ()) -> Baked:
    """Makes the model loadable without rnnguard, in place: `torch.save(model)` then needs torch.

    packed: paths whose input is a PackedSequence; a hook cannot ask, since its code must be
    torch's alone. Outputs, parameters, state_dict keys and module objects stay as they are. The
    norm then lies in a forward hook: a call of `module.forward(...)` bypasses it. Bake last:
    TorchScript takes no such hook, and dynamic quantisation of the recurrence would lose the
    norm's module and so fails.

    Warns where a module stays (RG922) and where there is nothing to bake. Raises RefusedError for
    a scripted, compiled or wrapped model and for unknown paths, with nothing touched.
    """
    paths = [packed] if isinstance(packed, str) else list(packed)
    refuse([*_unreachable(model), *_unknown(model, paths)])
    with_packed = {id(model.get_submodule(path)) for path in paths}
    turned: dict[str, tuple[nn.Module, type[nn.Module]]] = {}
    refusals: list[Refusal] = []
    for path, module in model.named_modules():
        plain = BAKED.get(type(module), "")
        if isinstance(plain, type):
            turned[path] = (module, plain)
        elif _needs_rnnguard(module) and not _inside(path, refusals):
            refusals.append(_stays(path, module, plain))
    earlier = tuple(path for path, module in model.named_modules() if is_baked(module))
    edit = Edit(model, None)
    with transaction(edit):
        for module, plain in turned.values():
            edit.bake_(module, plain, _norm_hook(packed=id(module) in with_packed))
    baked = Baked(tuple(turned), earlier, tuple(refusals), edit)
    if refusals or not (turned or earlier):
        warnings.warn(str(baked), RNNGuardWarning, stacklevel=2)
    return baked


def is_baked(module: nn.Module) -> bool:
    """Whether one of the module's forward hooks is what `bake` put there."""
    return bool(_norm_hooks(module))


def _norm_hook(*, packed: bool) -> fx.GraphModule:
    """A forward hook that norms the first of the module's two results by its `output_norm`.

    A GraphModule, since a pickle holds its code, not the name of a function of rnnguard. It
    looks its norm up at every call, so that copies and swapped children stay tied.
    """
    graph = fx.Graph()
    module, _, results = map(graph.placeholder, ("module", "args", "results"))
    output = graph.call_function(operator.getitem, (results, 0))
    state = graph.call_function(operator.getitem, (results, 1))
    rows = graph.call_function(getattr, (output, "data")) if packed else output
    normed = graph.call_method("output_norm", (module, rows))
    if packed:
        normed = graph.call_method("_replace", (output,), {"data": normed})
    graph.output((normed, state))
    return fx.GraphModule(nn.Module(), graph)


def _norm_hooks(module: nn.Module) -> list[fx.GraphModule]:
    """Those of the module's forward hooks that `_norm_hook` made, also after a pickle."""
    hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, fx.GraphModule)]
    return [hook for hook in hooks if _calls(hook, "output_norm")]


def _calls(hook: fx.GraphModule, method: str) -> bool:
    return any((node.op, node.target) == ("call_method", method) for node in hook.graph.nodes)


def _needs_rnnguard(module: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "rnnguard" for cls in type(module).__mro__)


def _inside(path: str, refusals: list[Refusal]) -> bool:
    """Whether the module is a part of one that stays, which is told already."""
    return any(not refusal.path or path.startswith(f"{refusal.path}.") for refusal in refusals)


def _stays(path: str, module: nn.Module, reason: str) -> Refusal:
    name = type(module).__name__
    if reason:
        return Refusal("RG922", path, f"a {name} cannot be plain torch: {reason}.", _KEEP)
    fact = f"{name} is a class of its own on top of rnnguard's, and stays."
    return Refusal("RG922", path, fact, f"Remove its parametrization, if it has one. {_KEEP}")


def _unreachable(model: nn.Module) -> Iterator[Refusal]:
    """Scripted, compiled and wrapped models, whose inner modules are bound already."""
    cure = "Pass the plain model, with whole weights: what a wrapper holds, such as its `module`."
    scripted = (refusal for refusal in run_refusals(model) if refusal.code == "RG908")
    for refusal in (*scripted, *wrapper_refusals(model)):
        yield replace(refusal, cure=cure)


def _unknown(model: nn.Module, packed: list[str]) -> Iterator[Refusal]:
    """Paths of `packed` that lead to no module that is baked now or was before."""
    known = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(BAKED.get(type(module)), type) or is_baked(module)
    }
    for path in packed:
        if path not in known:
            fact = f"`packed` names {path!r}, which is no module that can be baked;"
            yield Refusal("RG914", "packed", fact, near_miss(path, list(known)))
        elif any(not _calls(hook, "_replace") for hook in _norm_hooks(known[path])):
            fact = "it was baked before, for tensors."
            yield Refusal("RG922", path, fact, "Take that back first, with the `undo()` it gave.")
