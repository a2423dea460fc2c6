"""What the model is run on: the user's batches in one form, or a guess from its first layer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnguard.errors import RefusedError
from rnnguard.inspection.gates import is_recurrent
from rnnguard.inspection.recording import tensors_in
from rnnguard.records import Basis

Loss = Callable[[Any, Any], Tensor]
Step = Callable[[nn.Module, Any], Tensor]
_PAIRS = "Give an iterable of (inputs, target) pairs."
SAMPLE = 50
_LENGTHS = ("length", "lengths", "lens", "seq_len", "seq_lens", "seq_lengths", "input_lengths")


@dataclass(frozen=True)
class Batch:
    """One call of the model: positional and keyword inputs, the target, and the user's own form."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any
    raw: Any


@dataclass(frozen=True)
class Batches:
    """The batches of a run and what is done with each; gives a scalar to differentiate."""

    batches: tuple[Batch, ...]
    basis: Basis
    per_epoch: int | None
    loss: Loss | None
    step: Step | None
    consumed: bool = False
    """Whether the model changes its input in place, so that each run needs a copy of its own."""

    @property
    def has_loss(self) -> bool:
        return self.step is not None or self.loss is not None

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output on the batch, or the user's own step's loss."""
        if self.step is not None:
            return self.step(model, batch.raw)
        return model(*batch.args, **batch.kwargs)

    def fresh(self, batch: Batch) -> Batch:
        """The batch as it was given, for one run of the model."""
        return cloned(batch) if self.consumed else batch

    def scalar(self, output: Any, batch: Batch, seed: int) -> Tensor | None:
        """The loss, or without one a fixed random projection of all outputs."""
        if self.step is not None:
            return output if isinstance(output, Tensor) else None
        if self.loss is not None:
            return self.loss(_as_loss_takes(output, self.loss), batch.target)
        return random_projection(output, seed)


def cloned(value: Any) -> Any:
    """The same with tensors of its own, inside all that `tensors_in` looks into."""
    return with_tensors(value, Tensor.clone)


def _moved(value: Any, device: torch.device, *, lengths: bool = False) -> Any:
    """The same on the device; lengths stay where packing wants them, if asked for."""

    def move(tensor: Tensor) -> Tensor:
        counts = tensor.dim() == 1 and not tensor.is_floating_point()
        return tensor if lengths and counts else tensor.to(device)

    if isinstance(value, PackedSequence):
        return value.to(device=device)  # type: ignore[call-arg]
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device, lengths=lengths) for item in value)
    return with_tensors(value, move)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor that `tensors_in` finds changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        same = copy.copy(value)
        same.update({key: with_tensors(item, change) for key, item in value.items()})
        return same
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(with_tensors(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(with_tensors(item, change) for item in value)
    if is_dataclass(value):
        own = copy.copy(value)
        for each in fields(value):
            item = with_tensors(getattr(value, each.name), change)
            object.__setattr__(own, each.name, item)
        return own
    return value


def random_projection(output: Any, seed: int) -> Tensor | None:
    """A fixed random weighting of every floating output; None when there is none."""
    generator = torch.Generator().manual_seed(seed)
    parts = [t for t in tensors_in(output) if t.requires_grad and t.is_floating_point()]
    if not parts:
        return None
    weighted: list[Tensor] = [
        (t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in parts
    ]
    total: Tensor = torch.stack(weighted).sum()
    scaled: Tensor = total / float(sum(t.numel() for t in parts)) ** 0.5
    return scaled


def _as_loss_takes(output: Any, loss: Loss) -> Any:
    """torch's own losses take one tensor: of a nested output (logits, state) the first."""
    if isinstance(output, Tensor) or not isinstance(loss, nn.Module):
        return output
    return next(tensors_in(output), output)


def given_batches(
    model: nn.Module,
    data: Any,
    inputs: Any,
    loss: Loss | None,
    step: Step | None,
    count: int,
) -> Batches | None:
    """The user's batches, at most `count` of them; None when neither data nor inputs are given.

    Raises RefusedError (RG912) for data that hold no batch.
    """
    if data is None:
        if inputs is None:
            return None
        args, kwargs = _arguments(model, inputs)
        batch = _where_the_model_is(model, Batch(args, kwargs, None, inputs))
        return Batches((batch,), "given inputs", None, None, step)
    if _is_one_pair(data):
        raw, per_epoch = [data], None
    else:
        # A loader over a stream has a len() that raises, which the hint takes for no length.
        raw, per_epoch = list(islice(_iterable(data), count)), _epoch(data)
    if not raw:
        raise RefusedError.of("RG912", "data", "it holds no batch.", _PAIRS)
    if any(t.numel() == 0 for item in raw for t in tensors_in(item)):
        raise RefusedError.of("RG912", "data", "a batch is empty.", "Leave empty batches out.")
    batches = tuple(_batch(model, item, step) for item in raw)
    return Batches(batches, "real data", per_epoch, loss, step)


def _iterable(data: Any) -> Iterable[Any]:
    """The data, if they can be gone through batch by batch; the rows of a tensor are no batches."""
    if isinstance(data, Tensor):
        cure = "Give it as `inputs=`, or together with its target as a pair (inputs, target)."
        raise RefusedError.of("RG912", "data", "it is a single tensor.", cure)
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        fact = f"{type(data).__name__} is no iterable."
        raise RefusedError.of("RG912", "data", fact, _PAIRS)
    found: Iterable[Any] = data
    return found


def _epoch(data: Any) -> int | None:
    """Batches per epoch; a short list is a sample of the data rather than all of them."""
    if isinstance(data, list | tuple) and len(data) < SAMPLE:
        return None
    return length_hint(data) or None


def _is_one_pair(data: Any) -> bool:
    """(inputs, target) itself, rather than an iterable of such pairs."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    first, second = data
    nested = isinstance(first, tuple | list | Mapping) and isinstance(second, Tensor)
    return isinstance(first, Tensor) or nested


def _batch(model: nn.Module, item: Any, step: Step | None) -> Batch:
    if step is not None:
        return Batch((), {}, None, item)
    if isinstance(item, tuple | list) and len(item) == 2:
        args, kwargs = _arguments(model, item[0])
        return _where_the_model_is(model, Batch(args, kwargs, item[1], item))
    if isinstance(item, Tensor):
        return _where_the_model_is(model, Batch((item,), {}, None, item))
    raise RefusedError.of(
        "RG912",
        "data",
        f"a batch is a {type(item).__name__}, not a pair (inputs, target).",
        "Give pairs, or `step=` a function step(model, batch) that gives the loss.",
    )


def _where_the_model_is(model: nn.Module, batch: Batch) -> Batch:
    """The batch on the model's device, where a training loop would move it from the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = {t.device.type for t in tensors_in((batch.args, batch.kwargs))}
    if device.type == "cpu" or given != {"cpu"}:
        return batch
    args, kwargs = _moved((batch.args, dict(batch.kwargs)), device, lengths=True)
    return Batch(args, kwargs, _moved(batch.target, device), batch.raw)


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Inputs as the call takes them; a dict is keywords when forward has those names."""
    if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
        return _spread(model, inputs)
    if isinstance(inputs, Mapping):
        try:
            inspect.signature(model.forward).bind(**inputs)
        except TypeError:
            return (inputs,), {}
        return (), inputs
    return (inputs,), {}


def _spread(model: nn.Module, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Several arguments, or one that is a list, whichever fits the forward."""
    try:
        inspect.signature(model.forward).bind(*inputs)
    except TypeError:
        return (inputs,), {}
    return tuple(inputs), {}


def inferred_batches(model: nn.Module, steps: int, seed: int) -> Iterator[Batches]:
    """Guesses at a sample batch from the first layer, likeliest first."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for sample in _samples(model, steps, generator):
        extra = _required_lengths(model, sample, steps)
        if extra is not None:
            moved = sample.to(device)
            batch = Batch((moved,), extra, None, moved)
            yield Batches((batch,), "inferred inputs", None, None, None)


def _samples(model: nn.Module, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    batch = 8
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            ids = torch.randint(module.num_embeddings, (batch, steps), generator=generator)
            yield from (ids, ids.T.contiguous())
            return
        width = _input_width(module)
        if width is not None:
            normal = torch.randn(batch, steps, width, generator=generator).to(dtype)
            turned = normal.transpose(0, 1).contiguous()
            first = getattr(module, "batch_first", not is_recurrent(module))
            yield from (normal, turned) if first else (turned, normal)
            return
        if isinstance(module, nn.Conv1d):
            yield torch.randn(batch, module.in_channels, steps, generator=generator).to(dtype)
            return


def _input_width(module: nn.Module) -> int | None:
    if is_recurrent(module):
        return int(module.input_size)  # type: ignore[arg-type]
    return module.in_features if isinstance(module, nn.Linear) else None


def _required_lengths(model: nn.Module, sample: Tensor, steps: int) -> dict[str, Any] | None:
    """Full lengths for a required argument of that name; None when forward needs more."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters[1:] if p.default is p.empty and p.kind in kinds]
    if any(name not in _LENGTHS for name in needed):
        return None
    batch = min(sample.shape[:2]) if sample.shape[0] != steps else sample.shape[1]
    return {name: torch.full((batch,), steps) for name in needed}
