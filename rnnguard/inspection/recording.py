"""The model's graph, recorded while it runs: every torch call becomes a torch.fx node.

Recording, unlike tracing, handles any Python: packing, loops over lengths, calls of
`module.forward(...)` past the hooks. Each node knows the shapes it gave, whether gradient
passes, the module it ran in and the user's file:line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import Node, get_gradient_edge

from rnnguard.inspection.caller import caller
from rnnguard.inspection.native import NATIVE, NativeCall, Onlooker, native_call

_INTERNAL = frozenset(vars(nn.Module()))
_FARTHEST = 4096  # backward steps that an unseen call may consist of


@dataclass
class Recording:
    """The graph of one run, its native recurrent calls in order, and what the run gave.

    `kept` are the values of the run that the model still holds on attributes or in buffers, or
    that something else holds.
    """

    graph: fx.Graph
    order: dict[fx.Node, int] = field(default_factory=dict)
    calls: list[NativeCall] = field(default_factory=list)
    result: Any = None
    kept: dict[fx.Node, Tensor] = field(default_factory=dict)


def record(
    run: Callable[[], Any],
    model: nn.Module,
    inputs: Any = (),
    kept: Iterable[Tensor] = (),
    held: Callable[[], Iterable[Tensor]] = tuple,
) -> Recording:
    """Runs `run` once and gives the graph of every torch call that it made.

    `inputs` are the tensors that become placeholders, and those `kept` from an earlier run are
    told apart from other constants. `held` gives what something besides the model holds
    afterwards. Exceptions of `run` pass through.
    """
    recorder = _Recorder(model, inputs, kept)
    with recorder:
        recorder.recording.result = run()
    recorder.close((*_held_by(model), *held()))
    return recorder.recording


class _Recorder(Onlooker):
    def __init__(self, model: nn.Module, inputs: Any, kept: Iterable[Tensor]) -> None:
        super().__init__()
        self.recording = Recording(fx.Graph())
        self._names = _tensor_names(model)
        self._modules = {id(module): path for path, module in model.named_modules()}
        # The tensor is kept beside its node, so that no id is used twice during the run.
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self._backward: dict[tuple[Node, int], fx.Node] = {}
        for position, tensor in enumerate(tensors_in(inputs)):
            node = self._count(self.recording.graph.placeholder(f"in{position}"))
            node.meta["shape"] = tuple(tensor.shape)
            self._remember(tensor, node)
        for position, tensor in enumerate(kept):
            node = self._count(self.recording.graph.get_attr(f"kept{position}"))
            node.meta.update(name="kept", shape=tuple(tensor.shape), trainable=False)
            self._remember(tensor, node)

    def close(self, held: Iterable[Tensor]) -> None:
        """Ends the graph with the run's output and lets go of the tensors."""
        for tensor in held:
            known = self._nodes.get(id(tensor))
            if known is not None and known[1].op == "call_function":
                self.recording.kept[known[1]] = tensor
        outputs = [self._node_of(t) for t in tensors_in(self.recording.result)]
        self._count(self.recording.graph.output(tuple(outputs)))
        self._nodes.clear()
        self._backward.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Arguments are looked up first: an in-place call gives its own argument back.
        writes = _writes_in_place(func)
        if not writes and not _may_give_tensors(func):
            return func(*args, **kwargs)
        mapped = self._map(args), self._map(dict(kwargs))
        result = func(*args, **kwargs)
        given = list(tensors_in(result))
        if given or writes:
            self._add(func, mapped, args, result, given, writes)
        return result

    def _add(
        self,
        func: Callable[..., Any],
        mapped: tuple[Any, Any],
        args: tuple[Any, ...],
        result: Any,
        given: list[Tensor],
        writes: bool,
    ) -> None:
        node = self.recording.graph.call_function(func, mapped[0], mapped[1])
        order = self._count(node).meta["order"]
        name = _name(func)
        by = caller(self._modules)
        node.meta.update(name=name, module=by.owner, location=by.location, spot=by.spot)
        shaped = given or [a for a in args[:1] if isinstance(a, Tensor)]
        node.meta["shape"] = tuple(shaped[0].shape) if shaped else ()
        node.meta["real"] = any(map(_is_real, given))
        if name == "index_select" and len(args) > 2 and isinstance(args[2], Tensor):
            node.meta["picks"] = args[2].detach()
        if isinstance(result, tuple | list):
            for position, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._remember(item, self._part(node, position, item))
        elif given:
            self._remember(given[0], node)
        if writes and args and isinstance(args[0], Tensor):
            self._remember(args[0], node)
            self._carry_to_base(args[0], node)
        if name in NATIVE:
            call = native_call(node, order, name, by.module, args, by.location)
            self.recording.calls.append(call)

    def _carry_to_base(self, view: Tensor, node: fx.Node) -> None:
        """What is written into a view stands in the tensor that it looks into."""
        base = view._base
        if base is None or id(base) not in self._nodes:
            return
        whole = self.recording.graph.call_function(_written, (self._nodes[id(base)][1], node))
        self._count(whole).meta.update(node.meta, name="written", order=whole.meta["order"])
        whole.meta["shape"] = tuple(base.shape)
        self._remember(base, whole)

    def _part(self, node: fx.Node, position: int, item: Tensor) -> fx.Node:
        part = self._count(self.recording.graph.call_function(_item, (node, position)))
        part.meta.update(name="item", shape=tuple(item.shape), part=position)
        return part

    def _count(self, node: fx.Node) -> fx.Node:
        node.meta["order"] = self.recording.order[node] = len(self.recording.order)
        node.meta["grad"] = torch.is_grad_enabled()
        return node

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = (tensor, node)
        node.meta.update(shape=tuple(tensor.shape), real=_is_real(tensor))
        node.meta.update(dtype=tensor.dtype, device=tensor.device)
        if tensor.grad_fn is not None:
            # The place in the autograd graph outlives in-place changes of the tensor.
            node.meta["edge"] = get_gradient_edge(tensor)
            self._backward[node.meta["edge"][:2]] = node

    def _node_of(self, tensor: Tensor) -> fx.Node:
        known = self._nodes.get(id(tensor))
        # What a custom function made inside, without gradient, has one when it comes out.
        came_out = known is not None and tensor.grad_fn is not None and "edge" not in known[1].meta
        if known is not None and not came_out:
            return known[1]
        node = self._unseen(tensor) if tensor.grad_fn is not None else None
        if node is None:
            name = self._names.get(id(tensor), "constant")
            node = self._count(self.recording.graph.get_attr(name))
            node.meta.update(name="parameter" if id(tensor) in self._names else "constant")
            node.meta["trainable"] = tensor.requires_grad
        node.meta["shape"] = tuple(tensor.shape)
        self._remember(tensor, node)
        return node

    def _unseen(self, tensor: Tensor) -> fx.Node | None:
        """A tensor of a call that bypassed the recorder, joined on by the autograd graph.

        Scripted functions and custom autograd functions do not pass through the mode.
        """
        pending: list[tuple[Any, int]] = [get_gradient_edge(tensor)[:2]]
        seen, sources = set[Any](), dict[fx.Node, None]()
        while pending and len(seen) < _FARTHEST:
            place = pending.pop()
            step = place[0]
            if step is None or place in seen:
                continue
            seen.add(place)
            leaf = getattr(step, "variable", None)
            if place in self._backward:
                sources[self._backward[place]] = None
            elif isinstance(leaf, Tensor):
                sources[self._node_of(leaf)] = None
            else:
                pending += step.next_functions
        if not sources:
            return None
        node = self._count(self.recording.graph.call_function(_unrecorded, tuple(sources)))
        # Nearer to the call than the place that happens to read its result first.
        latest = max(sources, key=lambda source: self.recording.order[source])
        by = caller(self._modules)
        known = {"module": by.owner, "location": by.location, "spot": by.spot}
        node.meta.update({key: latest.meta.get(key, value) for key, value in known.items()})
        node.meta["name"] = "unrecorded"
        return node

    def _map(self, value: Any) -> Any:
        """Arguments as fx takes them: tensors as nodes, unknown objects by their type's name."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, tuple | list):
            items = [self._map(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {str(k): self._map(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._map(v) for v in (value.start, value.stop, value.step)))
        simple = (int, float, complex, bool, str, type(None), type(...), torch.dtype, torch.device)
        return value if isinstance(value, simple) else f"<{type(value).__name__}>"


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _item(parts: Any, position: int) -> Any:
    return parts[position]


def _written(whole: Any, part: Any) -> Any:
    raise NotImplementedError("stands for a tensor that one of its views was written into")


def _unrecorded(*sources: Any) -> Any:
    raise NotImplementedError("stands for a call that the recorder did not see")


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name


def _writes_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


def _may_give_tensors(func: Callable[..., Any]) -> bool:
    """Attribute reads and size questions are by far the most calls, and give no tensors."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return _name(func) in ("T", "mT", "H", "mH", "data", "real", "imag")
    return name not in ("size", "dim", "__len__", "numel", "stride", "is_contiguous")


def _tensor_names(model: nn.Module) -> dict[int, str]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {id(tensor): name for name, tensor in reversed(named)}


def _held_by(model: nn.Module) -> Iterator[Tensor]:
    """The tensors in buffers and on plain attributes of the model's modules."""
    for module in model.modules():
        yield from (buffer for buffer in module.buffers(recurse=False))
        own = (value for name, value in vars(module).items() if name not in _INTERNAL)
        yield from tensors_in(list(own))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists, dicts and objects with a few attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))
