"""The model's graph, recorded while it runs: every torch call becomes a torch.fx node.

Recording, unlike tracing, handles any Python: packing, loops over lengths, calls of
`module.forward(...)` past the hooks. Each node knows the shapes it gave, whether gradient
passes, the module it ran in and the user's file:line.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

import rnnguard
from rnnguard.inspection.gates import is_recurrent
from rnnguard.inspection.native import NATIVE, NativeCall, native_call

_TORCH, _OURS = (str(Path(str(m.__file__)).parent) + os.sep for m in (torch, rnnguard))
# Parts of the package that hold modules of their own, as a user's files do.
_MODULES_OF_OURS = (f"{_OURS}nn{os.sep}", f"{_OURS}demo.py")


_FARTHEST = 4096  # backward steps that an unseen call may consist of


@dataclass
class Recording:
    """The graph of one run, its native recurrent calls in order, and what the run gave."""

    graph: fx.Graph
    order: dict[fx.Node, int] = field(default_factory=dict)
    calls: list[NativeCall] = field(default_factory=list)
    result: Any = None


def record(run: Callable[[], Any], model: nn.Module, inputs: Any = ()) -> Recording:
    """Runs `run` once and gives the graph of every torch call that it made.

    `inputs` are the tensors that become placeholders. Exceptions of `run` pass through.
    """
    recorder = _Recorder(model, inputs)
    with recorder:
        recorder.recording.result = run()
    recorder.close()
    return recorder.recording


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.recording = Recording(fx.Graph())
        self._names = _tensor_names(model)
        self._modules = {id(module): path for path, module in model.named_modules()}
        # The tensor is kept beside its node, so that no id is used twice during the run.
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self._backward: dict[Node, fx.Node] = {}
        for position, tensor in enumerate(tensors_in(inputs)):
            self._remember(tensor, self._count(self.recording.graph.placeholder(f"in{position}")))

    def close(self) -> None:
        """Ends the graph with the run's output and lets go of the tensors."""
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
        owner, module, location = self._where()
        node.meta.update(name=name, module=owner, location=location)
        node.meta["shape"] = tuple(given[0].shape) if given else ()
        if isinstance(result, tuple | list):
            for position, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._remember(item, self._part(node, position, item))
        elif given:
            self._remember(given[0], node)
        if writes and args and isinstance(args[0], Tensor):
            self._remember(args[0], node)
        if name in NATIVE:
            self.recording.calls.append(native_call(node, order, name, module, args, location))

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
        node.meta["real"] = tensor.is_floating_point() or tensor.is_complex()
        if tensor.grad_fn is not None:
            # The place in the autograd graph outlives in-place changes of the tensor.
            node.meta["edge"] = get_gradient_edge(tensor)
            self._backward[node.meta["edge"].node] = node

    def _node_of(self, tensor: Tensor) -> fx.Node:
        known = self._nodes.get(id(tensor))
        if known is not None:
            _, node = known
            if tensor.grad_fn is not None and "edge" not in node.meta:
                # Made without gradient inside a custom function, which gave it one.
                node.meta["grad"] = True
                self._remember(tensor, node)
            return node
        node = self._unseen(tensor) if tensor.grad_fn is not None else None
        if node is None:
            name = self._names.get(id(tensor), "constant")
            node = self._count(self.recording.graph.get_attr(name))
            node.meta.update(name="parameter" if id(tensor) in self._names else "constant")
        node.meta["shape"] = tuple(tensor.shape)
        self._remember(tensor, node)
        return node

    def _unseen(self, tensor: Tensor) -> fx.Node | None:
        """A tensor of a call that bypassed the recorder, joined on by the autograd graph.

        Scripted functions and custom autograd functions do not pass through the mode.
        """
        pending, seen, sources = [tensor.grad_fn], set[Any](), dict[fx.Node, None]()
        while pending and len(seen) < _FARTHEST:
            step = pending.pop()
            if step is None or step in seen:
                continue
            seen.add(step)
            leaf = getattr(step, "variable", None)
            if step in self._backward:
                sources[self._backward[step]] = None
            elif isinstance(leaf, Tensor):
                sources[self._node_of(leaf)] = None
            else:
                pending += [following for following, _ in step.next_functions]
        if not sources:
            return None
        node = self._count(self.recording.graph.call_function(_unrecorded, tuple(sources)))
        owner, module, location = self._where()
        node.meta.update(name="unrecorded", module=owner, location=location)
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

    def _where(self) -> tuple[str | None, nn.Module | None, str | None]:
        """The innermost known module's path, the recurrent module, and the user's file:line."""
        owner: str | None = None
        module: nn.Module | None = None
        location: str | None = None
        for frame in _frames():
            holder = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
            if isinstance(holder, nn.Module):
                if owner is None:
                    owner = self._modules.get(id(holder))
                if module is None and is_recurrent(holder):
                    module = holder
            file = frame.f_code.co_filename
            if file.startswith(_OURS) and not file.startswith(_MODULES_OF_OURS):
                break  # from here outwards it is the caller of rnnguard, not the model
            if location is None and not file.startswith((_TORCH, _MODULES_OF_OURS[0])):
                location = f"{file}:{frame.f_lineno}"
            if location is not None and owner is not None:
                break
        return owner, module, location


def _frames() -> Iterator[FrameType]:
    """The frames of the running code from the torch call outwards, without the recorder's own."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename in (__file__, *_OWN_FRAMES):
        frame = frame.f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


_OWN_FRAMES = (str(Path(torch.overrides.__file__)),)


def _item(parts: Any, position: int) -> Any:
    return parts[position]


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
