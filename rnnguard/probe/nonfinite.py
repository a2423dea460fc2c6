"""Where the first value that is not finite comes from, found by one run under watch.

Forward, every torch call is seen, and a value that is not finite is followed back through
the calls to the one that made it of finite ones. Backward, every node of the graph is seen,
and the first that makes a gradient that is not finite of finite ones is the place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rnnguard.inspection.recording import tensors_in
from rnnguard.inspection.written import relative
from rnnguard.probe.seen_call import SeenCall, is_finite
from rnnguard.probe.subject import Subject
from rnnguard.probe.watch import Watch
from rnnguard.records import Record

Phase = Literal["input", "parameter", "forward", "backward"]


class FirstNonfinite(Record):
    """The first value that was not finite: when, in what, and where it was made.

    `step` and `batch` count from 0; no step where none was taken. `phase` says what was not
    finite: an input of the batch (`path` is its name), a parameter (`path` its name; after the
    optimizer's step), a value of the forward pass or a gradient (`path` is the module, `loss` in
    a loss of torch's own, None in the user's code outside of every module).
    `time` is the step of the sequence, or the call in a loop, counted from 0; for a gradient
    it is the last step in time, hence the first in backward order, that is not finite.
    `parameter` is the first in backward order that gets such a gradient.
    """

    step: int | None
    batch: int
    phase: Phase
    path: str | None = None
    operation: str | None = None
    time: int | None = None
    location: str | None = None
    parameter: str | None = None

    def __str__(self) -> str:
        what = {"input": "the input", "parameter": "the parameter"}.get(self.phase, self.phase)
        moment = (
            f"batch {self.batch}" if self.step is None else f"step {self.step}, batch {self.batch}"
        )
        parts = [f"{moment}: {what}"]
        if self.path is not None:
            parts.append(f" `{self.path or '(model)'}`")
        if self.operation is not None:
            parts.append(f" at {self.operation}")
        if self.time is not None:
            parts.append(f", time step {self.time}")
        if self.parameter is not None:
            parts.append(f", first into `{self.parameter}`")
        return "".join(parts) + (f" ({relative(self.location)})" if self.location else "")


class Search:
    """Runs a step once more and finds the place; the caller gives back what the run changes.

    `inputs` are the batch's tensors by name, `parameters` those of model and optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        parameters: dict[str, Tensor],
        step: int | None,
        batch: int,
    ) -> None:
        self._inputs = {id(tensor): name for name, tensor in inputs.items()}
        self._parameters = {id(tensor): name for name, tensor in parameters.items()}
        given = (*inputs.values(), *parameters.values())
        self._watch = Watch(model, [tensor for tensor in given if not is_finite(tensor)])
        self._moment: dict[str, Any] = {"step": step, "batch": batch}

    def run(self, forward: Callable[[], Tensor]) -> FirstNonfinite | None:
        """The place; None when this time all is finite."""
        with self._watch:
            loss = forward()
        if not is_finite(loss):
            return self._place("forward", self._watch.maker(loss))
        backward = _Backward(loss, self._watch, self._parameters)
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            backward.close()
        if backward.call is None and backward.parameter is None:
            return None
        return self._place("backward", backward.call, backward.parameter)

    def _place(
        self, phase: Phase, call: SeenCall | None, parameter: str | None = None
    ) -> FirstNonfinite:
        place: dict[str, Any] = {"phase": phase, "parameter": parameter}
        if call is not None:
            maker, given = self._watch.origin(call)
            if id(given) in self._inputs:
                place = {"phase": "input", "path": self._inputs[id(given)]}
            elif id(given) in self._parameters:
                place = {"phase": "parameter", "path": self._parameters[id(given)]}
            else:
                place |= self._at(maker if phase == "forward" else call, phase)
        return FirstNonfinite(**self._moment, **place)

    def _at(self, call: SeenCall, phase: Phase) -> dict[str, Any]:
        path, location, _ = call.place
        time = call.time if self._watch.is_repeated(call) else None
        if phase == "backward" and call.layout is not None:
            gradient = call.input_gradient
            time = None if gradient is None else call.last_bad_step(gradient)
        path = "loss" if path is None and location is None else path
        return {"path": path, "operation": call.operation, "time": time, "location": location}


class _Backward:
    """Hooks on every node of a loss's graph; each node belongs to the torch call that made it."""

    def __init__(self, loss: Tensor, watch: Watch, parameters: dict[int, str]) -> None:
        self.call: SeenCall | None = None
        self.parameter: str | None = None
        self._found = False
        self._parameters = parameters
        self._handles: list[Any] = []
        pending: list[tuple[Any, SeenCall | None]] = [(loss.grad_fn, None)]
        seen: set[Any] = set()
        while pending:
            node, owner = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            owner = watch.made.get(node, owner)
            self._hook(node, owner)
            pending.extend((following, owner) for following, _ in node.next_functions)

    def _hook(self, node: Any, owner: SeenCall | None) -> None:
        if type(node).__name__ == "AccumulateGrad":
            leaf = node.variable

            def arrived(gradients: Iterable[Tensor | None]) -> None:
                if self.parameter is None and not _all_finite(gradients):
                    self.parameter = self._parameters.get(id(leaf))

            self._handles.append(node.register_prehook(arrived))
            return

        def passed(given: Iterable[Tensor | None], _: Iterable[Tensor | None]) -> None:
            if not self._found and not _all_finite(given):
                self._found, self.call = True, owner

        self._handles.append(node.register_hook(passed))

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _all_finite(gradients: Iterable[Tensor | None]) -> bool:
    return all(is_finite(gradient) for gradient in gradients if gradient is not None)


def first_nonfinite(subject: Subject, number: int) -> FirstNonfinite | None:
    """Where a batch of the subject gives the first value that is not finite; in `untouched`.

    None where it cannot be had again, as with dropout that strikes elsewhere.
    """
    batches = subject.batches
    batch = batches.fresh(batches.batches[number])
    raw = batch.raw if batches.step is not None else batch.args
    inputs = named_inputs(raw, batch.kwargs, batch.target)
    named = named_parameters(subject.model, ())

    def loss() -> Tensor:
        scalar = batches.scalar(batches.forward(subject.model, batch), batch, subject.seed)
        assert scalar is not None
        return scalar

    try:
        return Search(subject.model, inputs, named, None, number).run(loss)
    except Exception:
        return None


def named_inputs(args: Any, kwargs: Any, target: Any) -> dict[str, Tensor]:
    """A batch's tensors by name: `input 0`, the keyword, or `target`, numbered if many."""
    parts = {"input": args, **kwargs, "target": target}
    named: dict[str, Tensor] = {}
    for name, part in parts.items():
        found = list(tensors_in(part))
        numbered = name == "input" or len(found) > 1
        named |= {f"{name} {i}" if numbered else name: tensor for i, tensor in enumerate(found)}
    return named


def named_parameters(model: nn.Module, held: Iterable[Tensor]) -> dict[str, Tensor]:
    """The model's parameters by name, and behind them those that only the optimizer holds."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    known = {id(parameter) for parameter in named.values()}
    foreign = [parameter for parameter in held if id(parameter) not in known]
    return named | {f"parameter {i} outside the model": p for i, p in enumerate(foreign)}


def nonfinite_parameter(
    parameters: dict[str, Tensor], step: int, batch: int
) -> FirstNonfinite | None:
    """The first parameter that an optimizer's step has left with a value that is not finite."""
    for name, tensor in parameters.items():
        if not torch.isfinite(tensor.detach()).all():
            return FirstNonfinite(step=step, batch=batch, phase="parameter", path=name)
    return None
