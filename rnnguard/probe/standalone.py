"""A recurrence by itself: its inputs as the caller gives them, checked, and its trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from rnnguard.errors import RefusedError
from rnnguard.inspection.gates import (
    carries_cell_state,
    cell_of,
    is_single_step,
    recurrences,
    weights_of,
)
from rnnguard.inspection.sites import SiteInput, recurrent_modules
from rnnguard.probe.snapshot import untouched
from rnnguard.probe.trajectory import LayerTrajectory, trajectories

Lengths = Sequence[int] | Tensor | None
State = Tensor | tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Standalone:
    """The trajectories of a recurrence over so many sequences of at most so many steps."""

    runs: tuple[LayerTrajectory, ...]
    steps: int
    sequences: int
    notes: tuple[str, ...]


def refused(place: str, fact: str, cure: str) -> RefusedError:
    """The refusal of something that was given, in one sentence."""
    return RefusedError.of("RG912", place, fact, cure)


def check_recurrence(module: object) -> None:
    """Raises RefusedError (RG003) unless the module is one of torch's recurrences."""
    if isinstance(module, nn.Module) and cell_of(module) is not None:
        if next(module.parameters()).is_meta:
            raise refused("module", "its weights are on the meta device.", "Give it values first.")
        return
    cure = "Give an nn.RNN, nn.LSTM, nn.GRU or one of their cells."
    if isinstance(module, nn.Module) and (held := list(recurrent_modules(module))):
        cure = f"Give the recurrence itself, `model.{held[0]}`."
    raise RefusedError.of("RG003", type(module).__name__, "it is no recurrence of torch.", cure)


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the module's weights may be read and nothing runs in the caller's autocast.

    To read a parametrized weight may change it, as the power iteration of spectral_norm does.
    """
    kept = untouched(module) if parametrize.is_parametrized(module) else nullcontext()
    with kept, torch.autocast(device.type, enabled=False):
        yield


@torch.no_grad()
def standalone_input(
    module: nn.Module, inputs: Tensor | PackedSequence, lengths: Lengths, state: State
) -> SiteInput:
    """What the recurrence is given, time first, in the dtype that it is measured in.

    Raises RefusedError (RG912) that says what the module takes instead.
    """
    weights = weights_of(module, *recurrences(module)[0])
    if isinstance(inputs, PackedSequence):
        if lengths is not None:
            raise refused("lengths", "packed inputs hold their own.", "Leave it out.")
        (x, ends), batched = pad_packed_sequence(inputs), True
    else:
        x, batched = _time_first(module, inputs)
        ends = _ends(lengths, len(x), x.shape[1])
    width = weights.ih.shape[1]
    if x.shape[-1] != width:
        fact = f"its last axis is {x.shape[-1]}, where the module takes {width} features."
        raise refused("inputs", fact, f"Give {_layout(module)} with F = {width}.")
    sizes = [weights.hh.shape[1]]
    sizes += [weights.hidden_size] if carries_cell_state(module) else []
    states = _states(module, [(x.shape[1], size) for size in sizes], state, batched)
    dtype = torch.float64 if weights.hh.dtype == torch.float64 else torch.float32
    x, *states = (t.detach().to(weights.hh.device, dtype) for t in (x, *(states or ())))
    for name, tensor in (("inputs", x), *(("state", given) for given in states)):
        if not bool(torch.isfinite(tensor).all()):
            cure = "Replace what is NaN or infinite."
            raise refused(name, "it holds values that are not finite.", cure)
    if not states:
        depth = len(recurrences(module))
        states = [x.new_zeros(depth, x.shape[1], size) for size in sizes]
    return SiteInput(x, ends.to(x.device), states[0], states[1] if len(states) > 1 else None)


def standalone(
    module: nn.Module, given: SiteInput, sequences: int, device: torch.device | None
) -> Standalone:
    """The trajectories of every layer and direction over the first sequences.

    A sequence ends where a state overflows, of which a note tells.
    """
    steps = int(given.lengths[:sequences].max())
    runs = trajectories(module, given, sequences=sequences, longest=steps, device=device)
    lengths = runs[0].trajectory.lengths
    alive = [torch.isfinite(run.trajectory.outputs).all(-1).long() for run in runs]
    finite = torch.stack([steps.cumprod(0).sum(0) for steps in alive]).amin(0)
    ends = torch.minimum(lengths, finite.clamp_min(1))
    notes: tuple[str, ...] = ()
    if bool((ends < lengths).any()):
        notes = (f"a state overflows after {int(ends.min())} steps; what follows was left out",)
        runs = [replace(r, trajectory=replace(r.trajectory, lengths=ends)) for r in runs]
    return Standalone(tuple(runs), steps, sequences, notes)


def place_of(device: torch.device | str | None) -> torch.device | None:
    """The device by its name; raises RefusedError (RG912) when it is not there."""
    if device is None:
        return None
    cure = "Give one that is there, as `cpu`."
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise refused("device", f"{said}.", cure) from error
    if place.type == "meta":
        raise refused("device", "the meta device holds no values.", cure)
    return place


def _layout(module: nn.Module) -> str:
    return "(B, T, F)" if getattr(module, "batch_first", False) else "(T, B, F)"


def _time_first(module: nn.Module, inputs: Tensor) -> tuple[Tensor, bool]:
    """The inputs as (T, B, F), and whether they came with a batch."""
    layout = _layout(module)
    if not isinstance(inputs, Tensor):
        fact = f"it is a {type(inputs).__name__}."
        raise refused("inputs", fact, f"Give a tensor {layout} or a PackedSequence.")
    if inputs.dim() not in (2, 3) or not inputs.is_floating_point():
        fact = f"it is {inputs.dtype}{list(inputs.shape)}.".replace("torch.", "")
        raise refused("inputs", fact, f"Give real numbers of the shape {layout} or (T, F).")
    if inputs.numel() == 0:
        fact = f"its shape {list(inputs.shape)} holds nothing."
        raise refused("inputs", fact, "Give at least one sequence of one step.")
    if inputs.dim() == 2:
        return inputs[:, None], False
    return (inputs.transpose(0, 1) if layout == "(B, T, F)" else inputs), True


def _ends(lengths: Lengths, steps: int, batch: int) -> Tensor:
    if lengths is None:
        return torch.tensor([steps] * batch, device="cpu")
    ends = torch.as_tensor(lengths, device="cpu").detach()
    if ends.shape != (batch,) or ends.is_floating_point() or ends.dtype == torch.bool:
        raise refused("lengths", "it is not one integer per sequence.", f"Give {batch} integers.")
    if int(ends.min()) < 1 or int(ends.max()) > steps:
        fact = f"it goes from {int(ends.min())} to {int(ends.max())}."
        raise refused("lengths", fact, f"Give 1 to {steps}, the steps of the inputs.")
    return ends.long()


def _states(
    module: nn.Module, sizes: list[tuple[int, int]], state: State, batched: bool
) -> list[Tensor]:
    """The states (D, B, n), or none when the module is to start from zero."""
    if state is None:
        return []
    parts = [state] if isinstance(state, Tensor) else list(state)
    single = is_single_step(module)
    shapes = []
    for batch, size in sizes:
        depth = () if single else (len(recurrences(module)),)
        shapes.append((*depth, *((batch,) if batched else ()), size))
    if [tuple(part.shape) for part in parts] != shapes:
        said = " and ".join(str(list(part.shape)) for part in parts)
        wanted = " and ".join(str(list(shape)) for shape in shapes)
        raise refused("state", f"its shape is {said}.", f"Give {wanted}.")
    parts = parts if batched else [part.unsqueeze(-2) for part in parts]
    return [part[None] for part in parts] if single else parts
