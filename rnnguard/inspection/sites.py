"""The recurrences of the model, found where their native calls were recorded."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import pad

from rnnguard.inspection.arguments import steps_of
from rnnguard.inspection.dataflow import is_normalized, is_residual, link
from rnnguard.inspection.gates import cell_of, is_recurrent, is_single_step, recurrences, weights_of
from rnnguard.inspection.native import NativeCall
from rnnguard.inspection.pathways import is_bypassed, real_lengths, results_of
from rnnguard.inspection.readout import picks_own_ends, readout_of, source_of_calls
from rnnguard.inspection.recording import Recording
from rnnguard.inspection.walk import Walk
from rnnguard.inspection.written import relative
from rnnguard.measurements import Site
from rnnguard.records import Readout

_NEAR = 12  # calls between a sorted batch and the recurrence that it is packed for


@dataclass(frozen=True)
class SiteInput:
    """What a recurrence was given, time first: x (T, B, F), lengths (B,), states (D, B, n)."""

    x: Tensor
    lengths: Tensor
    hidden: Tensor
    cell_state: Tensor | None


@dataclass(frozen=True)
class FoundSite:
    """A site together with its module and its input; what the probe works on."""

    record: Site
    module: nn.Module
    input: SiteInput
    calls: frozenset[fx.Node]

    @property
    def order(self) -> Tensor | None:
        """Which row of the model's batch each of the site's rows is, where packing sorted them."""
        batch = self.input.x.shape[1]
        node = min(self.calls, key=lambda call: int(call.meta["order"])).args[0]
        for _ in range(_NEAR):
            picks = node.meta.get("picks") if isinstance(node, fx.Node) else None
            if picks is not None and picks.shape == (batch,):
                found: Tensor = picks
                return found
            node = node.args[0] if isinstance(node, fx.Node) and node.args else None
        return None


@dataclass(frozen=True)
class _Chain:
    """Calls of one module that hand their state on, and where a detach cuts them apart."""

    calls: tuple[NativeCall, ...]
    cuts: tuple[int, ...]

    def window(self, readout: Readout) -> int:
        """Steps that the gradient passes: those behind the last cut, or of the longest piece.

        A loss at the end flows back to the last cut only; one at every step passes each piece.
        """
        bounds = pairwise((0, *self.cuts, len(self.calls)))
        pieces = [sum(map(steps_of, self.calls[low:high])) for low, high in bounds]
        return max(pieces) if readout == "all_steps" else pieces[-1]


def paths_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Every path that leads to the module, the first one being its name."""
    named = model.named_modules(remove_duplicate=False)
    return [path for path, candidate in named if candidate is module]


def recurrent_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every registered recurrent module under its first path."""
    return {p: m for p, m in model.named_modules() if is_recurrent(m) and cell_of(m) is not None}


def left_alone(model: nn.Module, skip: Iterable[str]) -> frozenset[str]:
    """The paths to leave alone, all that lie below them, and every other path to these modules."""
    given = {skip} if isinstance(skip, str) else set(skip)
    named = list(model.named_modules(remove_duplicate=False))
    inside = {id(m) for p, m in named if any(f"{p}.".startswith(f"{own}.") for own in given)}
    return frozenset(given | {path for path, module in named if id(module) in inside})


def find_sites(
    model: nn.Module, recording: Recording, rounds: Collection[fx.Node] = ()
) -> list[FoundSite]:
    """The sites whose native calls were recorded, in the order of their first call.

    `rounds` are cell calls that are known to be no steps of time.
    """
    groups: dict[int, list[NativeCall]] = {}
    for call in recording.calls:
        if call.node in rounds:
            continue
        module = call.module if call.module is not None else _owner(model, call)
        if module is not None and cell_of(module) is not None:
            groups.setdefault(id(module), []).append(call)
    found = []
    for calls in groups.values():
        module = calls[0].module if calls[0].module is not None else _owner(model, calls[0])
        assert module is not None
        paths = paths_of(model, module)
        if paths:
            found.append(_site(module, paths, calls))
    return found


def _owner(model: nn.Module, call: NativeCall) -> nn.Module | None:
    """The registered module whose weights the call used, for code that calls the kernel itself."""
    used = {id(weight) for weight in call.weights}
    for module in recurrent_modules(model).values():
        if any(id(parameter) in used for parameter in module.parameters(recurse=False)):
            return module
    return None


def unregistered_calls(model: nn.Module, recording: Recording) -> list[str]:
    """file:line of native calls on modules that the model does not know (a plain list, say).

    Only of calls that the model itself makes, as its step may run other networks beside it, and
    of modules that are to be trained, as a frozen one is often kept out of reach on purpose.
    """
    known = {id(module) for module in model.modules()}
    return sorted({call.location or "unknown place" for call in recording.calls
                   if call.module is not None and id(call.module) not in known
                   and call.node.meta["module"] is not None and _is_trained(call)})  # fmt: skip


def _is_trained(call: NativeCall) -> bool:
    return call.node.meta["grad"] and any(weight.requires_grad for weight in call.weights)


def _site(module: nn.Module, paths: list[str], calls: list[NativeCall]) -> FoundSite:
    chain = max(_chains(calls), key=lambda c: sum(steps_of(call) for call in c.calls))
    given = _join([_site_input(module, call) for call in chain.calls])
    cell = cell_of(module)
    assert cell is not None
    first = weights_of(module, *recurrences(module)[0])
    walk = Walk(source_of_calls(chain.calls))
    readout, picked = readout_of(walk), picks_own_ends(walk)
    lengths = real_lengths(given.x, given.lengths)
    padded = 1 - float(lengths.sum()) / max(1, int(given.lengths.sum()))
    if picked or readout not in ("last_step", "final_state"):
        # Where the last step is read whatever it is, the gradient does pass the padding.
        given = replace(given, lengths=lengths)
    nodes = results_of(call.node for call in calls)
    record = Site(
        path=paths[0],
        aliases=tuple(paths[1:]),
        module=type(module).__name__,
        cell=cell,
        form="cell" if is_single_step(module) else "fused",
        input_size=first.ih.shape[1],
        hidden_size=first.hidden_size,
        layers=getattr(module, "num_layers", 1),
        bidirectional=getattr(module, "bidirectional", False),
        batch_first=getattr(module, "batch_first", False),
        proj_size=getattr(module, "proj_size", 0),
        bias=first.bias_ih is not None,
        dropout=float(getattr(module, "dropout", 0.0)),
        steps=int(given.lengths.max()),
        batch=given.x.shape[1],
        window=chain.window(readout),
        calls=len(calls),
        packed=chain.calls[0].batch_sizes is not None,
        readout=readout,
        normalized=is_normalized(chain.calls[-1]),
        residual=is_residual(chain.calls[0]),
        location=relative(chain.calls[0].location),
        bypass=is_bypassed(chain.calls[0].node.graph, nodes, int(given.lengths.max()), readout),
        padded=padded,
        picked=picked,
        remade=any(not isinstance(t, nn.Parameter) for t in first.tensors().values()),
    )
    return FoundSite(record, module, given, frozenset(call.node for call in calls))


def _chains(calls: list[NativeCall]) -> list[_Chain]:
    """Groups the calls of one module into runs that hand their state on."""
    runs: list[list[NativeCall]] = []
    cuts: list[list[int]] = []
    for call in calls:
        for run, cut in zip(runs, cuts, strict=True):
            joint = link(run[-1], call)
            if joint.linked and _continues(run[-1], call):
                cut.append(len(run)) if joint.cut else None
                run.append(call)
                break
        else:
            runs.append([call])
            cuts.append([])
    return [_Chain(tuple(run), tuple(cut)) for run, cut in zip(runs, cuts, strict=True)]


def _site_input(module: nn.Module, call: NativeCall) -> SiteInput:
    x = call.input.detach()
    if call.kind.endswith("_cell"):
        hidden = tuple(state.detach()[None] for state in call.state)
        lengths = torch.ones(x.shape[0], dtype=torch.long, device=x.device)
        return SiteInput(x[None], lengths, hidden[0], hidden[1] if len(hidden) > 1 else None)
    hidden = tuple(state.detach() for state in call.state)
    cell_state = hidden[1] if len(hidden) > 1 else None
    if call.batch_sizes is not None:
        padded, lengths = _padded(x, call.batch_sizes)
        return SiteInput(padded, lengths, hidden[0], cell_state)
    x = x.transpose(0, 1) if call.batch_first else x
    lengths = torch.full((x.shape[1],), x.shape[0], dtype=torch.long, device=x.device)
    return SiteInput(x, lengths, hidden[0], cell_state)


def _padded(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows as (T, B, F) with zeros behind each end, and the lengths."""
    sizes = batch_sizes.tolist()
    padded = data.new_zeros(len(sizes), sizes[0], data.shape[1])
    lengths = torch.zeros(sizes[0], dtype=torch.long, device=data.device)
    start = 0
    for step, size in enumerate(sizes):
        padded[step, :size] = data[start : start + size]
        lengths[:size] += 1
        start += size
    return padded, lengths


def _continues(earlier: NativeCall, later: NativeCall) -> bool:
    """Same features, and a batch from which sequences may only drop out at its end."""
    axis = 0 if later.kind.endswith("_cell") or later.batch_first else 1
    same = later.input.shape[-1] == earlier.input.shape[-1]
    packed = later.batch_sizes is not None or earlier.batch_sizes is not None
    return same and (packed or later.input.shape[axis] <= earlier.input.shape[axis])


def _join(parts: list[SiteInput]) -> SiteInput:
    """Calls that hand their state on, as one sequence from the first call's state."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    batch = max(part.x.shape[1] for part in parts)
    x = torch.cat([pad(part.x, (0, 0, 0, batch - part.x.shape[1])) for part in parts])
    lengths = torch.stack([pad(part.lengths, (0, batch - len(part.lengths))) for part in parts])
    return SiteInput(x, lengths.sum(0), first.hidden, first.cell_state)
