"""How many steps the states have seen that are read of a recurrence, from the gradient on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rnnguard.inspection.arguments import is_bidirectional
from rnnguard.inspection.native import NativeCall
from rnnguard.inspection.readout import source_of_calls
from rnnguard.inspection.recording import Recording
from rnnguard.inspection.sites import FoundSite
from rnnguard.inspection.walk import Walk
from rnnguard.inspection.written import relative


@dataclass(frozen=True)
class StepsSeen:
    """The most steps that a state which is read has seen, by direction; None where none is read.

    `place`: the user's file:line where one step is taken out of the sequence.
    """

    forward: int | None
    reverse: int | None
    place: str | None


def steps_seen(site: FoundSite, recording: Recording, scalar: Tensor | None) -> StepsSeen | None:
    """What is read of a bidirectional fused site has seen so many steps.

    `scalar`: what the recorded run gave, or a loss of it. A state counts as read where the
    gradient on the top layer's output, or on a last state, is not exactly zero. The forward state
    at step t has seen t + 1 steps, the reverse one length - t. None for other sites and where the
    run cannot be differentiated. Costs the backward pass behind the recurrence, and none of it.
    """
    calls = [call for call in recording.calls if call.node in site.calls]
    if scalar is None or not scalar.requires_grad or not calls:
        return None
    if not is_bidirectional(calls[0].node):
        return None
    forward, reverse = set[int](), set[int]()
    for call in calls:
        lengths = site.input.lengths if len(calls) == 1 else None
        gradients = _gradients(call, scalar)
        if gradients is None:
            return None
        output, *states = gradients
        ahead, back = _seen_at_steps(call, output, lengths)
        whole = _whole(call)
        forward |= ahead | {whole for state in states if _any(state, 0)}
        reverse |= back | {whole for state in states if _any(state, 1)}
    place = _Places(source_of_calls(calls)).first()
    return StepsSeen(max(forward, default=None), max(reverse, default=None), place)


def _gradients(call: NativeCall, scalar: Tensor) -> list[Tensor | None] | None:
    """The gradient on the call's output and on each of its last states."""
    parts = sorted(
        (part for part in call.node.users if part.meta.get("name") == "item"),
        key=lambda part: int(part.meta["part"]),
    )
    if not parts or any("edge" not in part.meta for part in parts):
        return None
    edges = [part.meta["edge"] for part in parts]
    try:
        found = torch.autograd.grad(scalar, edges, retain_graph=True, allow_unused=True)
    except RuntimeError:
        # Reentrant checkpointing knows backward() only, and a freed graph nothing at all.
        return None
    return list(found)


def _any(state: Tensor | None, way: int) -> bool:
    """Whether any row of a last state (D, B, H) is read in that direction."""
    return state is not None and bool((state[way::2] != 0).any())


def _whole(call: NativeCall) -> int:
    if call.batch_sizes is not None:
        return len(call.batch_sizes)
    return int(call.input.shape[1 if call.batch_first else 0])


def _seen_at_steps(
    call: NativeCall, output: Tensor | None, lengths: Tensor | None
) -> tuple[set[int], set[int]]:
    """How many steps the states at the steps that are read have seen, forward and reverse."""
    if output is None:
        return set(), set()
    if call.batch_sizes is not None:
        steps, ends = _packed_steps(call.batch_sizes)
        rows = output
    else:
        padded = output.transpose(0, 1) if call.batch_first else output
        total, batch = padded.shape[:2]
        rows = padded.flatten(0, 1)
        steps = torch.arange(total).repeat_interleave(batch)
        own = torch.full((batch,), total) if lengths is None else lengths.cpu()
        ends = own.repeat(total)
    ahead, back = (half.ne(0).any(-1).cpu() for half in rows.chunk(2, -1))
    # Behind a sequence's end the reverse state has seen nothing of it.
    seen = (ends - steps).clamp_min(0)
    return set((steps[ahead] + 1).tolist()), set(seen[back].tolist())


def _packed_steps(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of packed data its step, and the length of its sequence."""
    sizes = batch_sizes.cpu()
    steps = torch.arange(len(sizes)).repeat_interleave(sizes)
    sequences = torch.cat([torch.arange(int(size)) for size in sizes])
    lengths = (sizes[:, None] > torch.arange(int(sizes[0]))).sum(0)
    return steps, lengths[sequences]


class _Places(Walk):
    """Follows the steps to the place where one of them is taken."""

    def first(self) -> str | None:
        """The file:line of the first call behind which only one step of several is left."""
        for node, held in self._held.items():
            if len(held.known) == 1 and not held.state and self._several(node.all_input_nodes):
                return relative(node.meta.get("location"))
        return None

    def _several(self, nodes: Sequence[fx.Node]) -> bool:
        return any(n in self._held and len(self._held[n].known) > 1 for n in nodes)
