"""Batches of (inputs, target) as the sequences whose memory demand is estimated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from rnnguard.errors import RefusedError
from rnnguard.probe.history import Array, Sequences, one_hot, standardised, token_channels

MOST = 2048  # sequences looked at
COLUMNS = 16  # of a real-valued target
IGNORED = -100  # the class that torch's cross-entropy leaves out
_PAIRS = "Give an iterable of (inputs, target) pairs."


@dataclass(frozen=True)
class Part:
    """One batch: inputs (B, T, F) or token ids (B, T), lengths (B,), target as it was given."""

    inputs: Tensor
    lengths: Tensor
    target: Tensor

    @property
    def is_tokens(self) -> bool:
        return self.inputs.dim() == 2


def parts_of(data: Any, batch_first: bool) -> list[Part]:
    """The batches, until MOST sequences are seen; raises RefusedError (RG912) for any other form.

    data: (inputs, target) pairs, or one pair.
    """
    parts: list[Part] = []
    seen = 0
    for item in _pairs(data):
        parts.append(_part(item, batch_first))
        seen += len(parts[-1].lengths)
        if seen >= MOST:
            break
    if not parts:
        raise _refused("it holds no batch.", _PAIRS)
    first = parts[0]
    for part in parts[1:]:
        if part.is_tokens != first.is_tokens or part.inputs.shape[2:] != first.inputs.shape[2:]:
            raise _refused("its batches differ in their inputs' form.", "Give one form of input.")
        if _form(part) != _form(first):
            raise _refused("its batches differ in their targets' form.", "Give one form of target.")
    return parts


def sequences_of(parts: list[Part]) -> Sequences | None:
    """All batches in one; None where a value is not finite or no step has a target."""
    steps = max(part.inputs.shape[1] for part in parts)
    tokens = parts[0].is_tokens
    inputs = np.concatenate([_padded(part.inputs, steps, tokens) for part in parts])
    lengths = np.concatenate([part.lengths.numpy() for part in parts])
    inside = np.arange(steps) < lengths[:, None]
    values = token_channels(inputs) if tokens else inputs
    values = np.where(inside[:, :, None], values, 0)
    rows, times, target = _targets(parts, lengths)
    if len(rows) == 0 or not (np.isfinite(values).all() and np.isfinite(target).all()):
        return None
    if target.shape[1] == 1 and target.dtype.kind in "biu":
        hot, classes = one_hot(target[:, 0])
        return Sequences(values, rows, times, hot, classes)
    return Sequences(values, rows, times, standardised(target.astype(np.float64)), 0)


def _padded(inputs: Tensor, steps: int, tokens: bool) -> Array:
    values = inputs.numpy() if tokens else inputs.float().numpy()
    room = [(0, 0), (0, steps - values.shape[1])] + [(0, 0)] * (values.ndim - 2)
    return np.pad(values, room)


def _targets(parts: list[Part], lengths: Array) -> tuple[Array, Array, Array]:
    """Which sequence and step each target belongs to, and the targets (n, K)."""
    if not _per_step(parts[0]):
        joined = torch.cat([part.target.reshape(len(part.lengths), -1) for part in parts])
        rows, times, target = np.arange(len(lengths)), lengths - 1, _as_array(joined)
    else:
        found, offset = [], 0
        for part in parts:
            inside = torch.arange(part.target.shape[1]) < part.lengths[:, None]
            row, time = inside.nonzero(as_tuple=True)
            given = part.target.reshape(*part.target.shape[:2], -1)[row, time]
            found.append((row.numpy() + offset, time.numpy(), _as_array(given)))
            offset += len(part.lengths)
        rows, times, target = (np.concatenate(column) for column in zip(*found, strict=True))
    kept = np.ones(len(rows), dtype=bool)
    if target.dtype.kind in "iu" and target.shape[1] == 1:
        kept = target[:, 0] != IGNORED
    return rows[kept], times[kept], target[kept]


def _as_array(target: Tensor) -> Array:
    found: Array = (target.double() if target.is_floating_point() else target).numpy()
    return found


def _per_step(part: Part) -> bool:
    shape = part.target.shape
    return len(shape) > 1 and shape[1] == part.inputs.shape[1] and (len(shape) == 3 or shape[1] > 1)


def _form(part: Part) -> tuple[Any, ...]:
    columns = part.target.shape[2:] if _per_step(part) else part.target.shape[1:]
    return _per_step(part), tuple(columns), part.target.is_floating_point()


def _pairs(data: Any) -> Iterator[Any]:
    if _is_one_pair(data):
        yield data
        return
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise _refused(f"it is a {type(data).__name__}, not pairs of inputs and target.", _PAIRS)
    yield from data


def _is_one_pair(data: Any) -> bool:
    """(inputs, target) itself, rather than an iterable of such pairs."""
    if not isinstance(data, tuple | list) or len(data) != 2 or isinstance(data, PackedSequence):
        return False
    first, second = data
    return isinstance(second, Tensor) and (isinstance(first, Tensor) or _has_lengths(first))


def _has_lengths(inputs: Any) -> bool:
    if isinstance(inputs, PackedSequence):
        return True
    pair = isinstance(inputs, tuple | list) and len(inputs) == 2
    return pair and isinstance(inputs[0], Tensor)


def _part(item: Any, batch_first: bool) -> Part:
    if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[1], Tensor):
        raise _refused(f"a batch is a {type(item).__name__}, not (inputs, target).", _PAIRS)
    inputs, lengths = _inputs(item[0], batch_first)
    target = item[1].detach().cpu()
    if not batch_first and target.dim() > 1 and target.shape[:2] == inputs.shape[:2][::-1]:
        target = target.transpose(0, 1)
    part = Part(inputs, lengths, target)
    _check_target(part)
    return part


def _inputs(given: Any, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Inputs (B, T, F), or ids (B, T), and lengths (B,), on the CPU."""
    if isinstance(given, PackedSequence):
        padded, lengths = pad_packed_sequence(given, batch_first=True)
        return _checked(padded, lengths)
    padded = given[0] if _has_lengths(given) else given
    if not isinstance(padded, Tensor):
        raise _refused(
            f"inputs are a {type(given).__name__}.",
            "Give a tensor, (padded tensor, lengths) or a PackedSequence.",
        )
    if padded.dim() > 1 and not batch_first:
        padded = padded.transpose(0, 1)
    if _has_lengths(given):
        return _checked(padded, torch.as_tensor(given[1]))
    return _checked(
        padded, torch.full(padded.shape[:1], padded.shape[1] if padded.dim() > 1 else 1)
    )


def _checked(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    padded, lengths = padded.detach().cpu(), lengths.detach().cpu()
    if padded.dim() not in (2, 3) or padded.numel() == 0 or padded.is_complex():
        raise _refused(
            f"inputs have shape {tuple(padded.shape)} and type {padded.dtype}.",
            "Give real values (B, T, F) or (B, T), or token ids (B, T).",
        )
    count, steps = padded.shape[:2]
    if lengths.shape != (count,):
        fact = f"there are {lengths.numel()} lengths for {count} sequences."
        raise _refused(fact, "Give one length per sequence.")
    if lengths.is_floating_point() or not bool(((lengths >= 1) & (lengths <= steps)).all()):
        raise _refused(f"lengths lie outside 1 to {steps}.", "Give whole steps within the padding.")
    if padded.dim() == 2 and (padded.is_floating_point() or padded.dtype is torch.bool):
        padded = padded[:, :, None]
    return padded, lengths


def _check_target(part: Part) -> None:
    target, count = part.target, len(part.lengths)
    if target.dim() == 0 or len(target) != count:
        found = len(target) if target.dim() else "no"
        raise _refused(
            f"a batch has {count} sequences and {found} targets.", "Give one target per sequence."
        )
    columns = target.shape[2] if target.dim() == 3 else 1
    known = target.dim() == 1 or tuple(target.shape) == (count, 1) or _per_step(part)
    if target.is_complex() or not known or target.dim() > 3 or not 1 <= columns <= COLUMNS:
        steps = part.inputs.shape[1]
        raise _refused(
            f"a target has shape {tuple(target.shape)} and type {target.dtype}.",
            f"Give one per sequence ({count},), or one per step ({count}, {steps}).",
        )


def _refused(fact: str, cure: str) -> RefusedError:
    return RefusedError.of("RG912", "data", fact, cure)


def site_parts(
    inputs: Sequence[Tensor],
    lengths: Sequence[Tensor],
    targets: Sequence[Tensor],
    per_step: bool = False,
) -> list[Part] | None:
    """Batches as a recurrence sees them; None for targets of another form.

    inputs: (T, B, F) each; lengths: (B,) each; targets: (B,) or (B, 1) each, or with `per_step`
    (B, T) or (T, B), with or without columns.
    """
    parts = []
    for x, n, target in zip(inputs, lengths, targets, strict=True):
        fitting = _at_steps(target, x) if per_step else _at_ends(target, n)
        if fitting is None or fitting.is_complex():
            return None
        parts.append(Part(*(t.detach().cpu() for t in (x.transpose(0, 1), n, fitting))))
    return parts


def _at_ends(target: Tensor, lengths: Tensor) -> Tensor | None:
    flat = target[:, 0] if target.dim() == 2 and target.shape[1] == 1 else target
    return flat if flat.dim() == 1 and len(flat) == len(lengths) else None


def _at_steps(target: Tensor, x: Tensor) -> Tensor | None:
    steps, batch = x.shape[:2]
    if target.dim() not in (2, 3) or steps < 2:
        return None
    if tuple(target.shape[:2]) == (batch, steps):
        return target
    return target.transpose(0, 1) if tuple(target.shape[:2]) == (steps, batch) else None
