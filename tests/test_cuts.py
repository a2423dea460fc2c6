"""Recurrences whose values are used while their gradient is cut off, and cuts that are meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import recorded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

from rnnguard.inspection.cuts import cut_at
from rnnguard.inspection.loops import find_loops
from rnnguard.inspection.recording import Recording, record
from rnnguard.inspection.sites import FoundSite, find_sites
from rnnguard.inspection.written import WrittenSite, written_sites

B, T, F, H = 5, 7, 3, 4
Run = Callable[..., Any]


class Net(nn.Module):
    """An encoder and a decoder, a cell, a hand-written recurrence and heads, used by `run`."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.rnn = nn.GRU(F, H, batch_first=True)
        self.lstm = nn.LSTM(F, H, num_layers=2, bidirectional=True, batch_first=True)
        self.upper, self.cell = nn.GRU(H, H, batch_first=True), nn.GRUCell(F, H)
        self.into, self.state = nn.Linear(F, H), nn.Linear(H, H)
        self.head, self.wide, self.embed = nn.Linear(H, 2), nn.Linear(2 * H, 2), nn.Embedding(9, F)
        self.kept: Tensor | None = None
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def cuts_in(model: nn.Module, recording: Recording, held: Any = None) -> dict[str, str]:
    """The place of the cut by the path of the site, of every site that has one."""
    native = find_sites(model, recording)
    known = {call for site in native for call in site.calls}
    written = written_sites(model, find_loops(recording.graph), known)
    sites: list[FoundSite | WrittenSite] = [*native, *written]
    places = {site.record.path: cut_at(recording, site, model, held) for site in sites}
    assert places, "no site was found"
    return {path: place for path, place in places.items() if place is not None}


def cuts(run: Run) -> dict[str, str]:
    model = Net(run)
    return cuts_in(model, recorded(model, torch.randn(B, T, F)))


def cut_lines(run: Run) -> dict[str, int]:
    """The line of each cut, counted from the first one of `run`."""
    start = run.__code__.co_firstlineno
    return {path: int(place.rpartition(":")[2]) - start for path, place in cuts(run).items()}


def detached_summary(m: Net, x: Tensor) -> Any:
    _, h = m.rnn(x)
    summary = h[-1].detach()
    return m.head(summary.relu())


def data_of_the_output(m: Net, x: Tensor) -> Any:
    out, _ = m.rnn(x)
    return m.head(out.data.mean(1))


def copied(m: Net, x: Tensor) -> Any:
    return m.head(m.rnn(x)[0][:, -1].clone().detach())


def pooled_without_gradient(m: Net, x: Tensor) -> Any:
    out, _ = m.rnn(x)
    with torch.no_grad():
        pooled = out.mean(1)
    return m.head(pooled)


def whole_without_gradient(m: Net, x: Tensor) -> Any:
    with torch.no_grad():
        _, h = m.rnn(x)
    return m.head(h[-1])


def cut_between_two(m: Net, x: Tensor) -> Any:
    out, _ = m.rnn(x)
    out, _ = m.upper(out.detach())
    return m.head(out[:, -1])


def cut_state_of_a_decoder(m: Net, x: Tensor) -> Any:
    _, h = m.rnn(x)
    out, _ = m.upper(x.new_ones(B, T, H), h.detach())
    return m.head(out)


def cut_lstm(m: Net, x: Tensor) -> Any:
    _, (h, _) = m.lstm(x)
    h = h.detach()
    return {"score": m.wide(torch.cat([h[-2], h[-1]], 1))}


def cut_in_place(m: Net, x: Tensor) -> Any:
    h = m.rnn(x)[1][-1] * 1
    h.detach_()
    return m.head(h)


def cells_cut_at_the_end(m: Net, x: Tensor) -> Any:
    h = x.new_zeros(B, H)
    for x_t in x.unbind(1):
        h = m.cell(x_t, h)
    return m.head(h.detach())


def cells_cut_everywhere(m: Net, x: Tensor) -> Any:
    h, steps = x.new_zeros(B, H), []
    for x_t in x.unbind(1):
        h = m.cell(x_t, h).detach()
        steps.append(h)
    return m.head(torch.stack(steps, 1))


def written_cut_at_the_end(m: Net, x: Tensor) -> Any:
    h = x.new_zeros(B, H)
    for x_t in x.unbind(1):
        h = torch.tanh(m.into(x_t) + m.state(h))
    h = h.detach()
    return m.head(h)


def written_cut_everywhere(m: Net, x: Tensor) -> Any:
    h, steps = x.new_zeros(B, H), []
    for x_t in x.unbind(1):
        h = torch.tanh(m.into(x_t) + m.state(h.detach()))
        steps.append(h.detach())
    return m.head(torch.stack(steps, 1))


def written_without_gradient(m: Net, x: Tensor) -> Any:
    h = x.new_zeros(B, H)
    with torch.no_grad():
        for x_t in x.unbind(1):
            h = torch.tanh(m.into(x_t) + m.state(h))
    return m.head(h)


SICK: dict[Run, dict[str, int]] = {
    detached_summary: {"rnn": 2},
    data_of_the_output: {"rnn": 2},
    copied: {"rnn": 1},
    pooled_without_gradient: {"rnn": 3},
    whole_without_gradient: {"rnn": 2},
    cut_between_two: {"rnn": 2},
    cut_state_of_a_decoder: {"rnn": 2},
    cut_lstm: {"lstm": 2},
    cut_in_place: {"rnn": 2},
    cells_cut_at_the_end: {"cell": 4},
    cells_cut_everywhere: {"cell": 3},
    written_cut_at_the_end: {"": 4},
    written_cut_everywhere: {"": 4},
    written_without_gradient: {"": 4},
}


@pytest.mark.parametrize("run", SICK, ids=lambda run: run.__name__)
def test_a_cut_is_found_where_it_is_made(run: Run) -> None:
    assert cut_lines(run) == SICK[run]


def last_state(m: Net, x: Tensor) -> Any:
    return m.head(m.rnn(x)[1][-1])


def truncated(m: Net, x: Tensor) -> Any:
    state, steps = None, []
    for piece in torch.split(x, 3, 1):
        out, state = m.rnn(piece, None if state is None else state.detach())
        steps.append(out)
    return m.head(torch.cat(steps, 1))


def truncated_cells(m: Net, x: Tensor) -> Any:
    h = x.new_zeros(B, H)
    for x_t in x.unbind(1):
        h = m.cell(x_t, h.detach())
    return m.head(h)


def truncated_by_hand(m: Net, x: Tensor) -> Any:
    h, steps = x.new_zeros(B, H), []
    for t, x_t in enumerate(x.unbind(1)):
        h = torch.tanh(m.into(x_t) + m.state(h.detach() if t % 3 == 0 else h))
        steps.append(h)
    return m.head(torch.stack(steps, 1))


def burnt_in(m: Net, x: Tensor) -> Any:
    with torch.no_grad():
        _, state = m.rnn(x[:, :3])
    return m.head(m.rnn(x[:, 3:], state)[0])


def kept_for_the_next_batch(m: Net, x: Tensor) -> Any:
    out, h = m.rnn(x, m.kept)
    m.kept = h.detach()
    return m.head(out)


def shown_attention(m: Net, x: Tensor) -> Any:
    out, _ = m.rnn(x)
    weights = out.sum(-1).softmax(1)
    return {"score": m.head((weights.unsqueeze(-1) * out).sum(1)), "seen": weights.detach()}


def own_target(m: Net, x: Tensor) -> Any:
    out, _ = m.rnn(x)
    return mse_loss(m.state(out[:, :-1]), out[:, 1:].detach())


def straight_through(m: Net, x: Tensor) -> Any:
    soft = m.rnn(x)[1][-1].softmax(-1)
    hard = torch.zeros_like(soft).scatter(1, soft.argmax(1, keepdim=True), 1.0)
    return m.head(hard - soft.detach() + soft)


def detached_input(m: Net, x: Tensor) -> Any:
    return m.head(m.rnn(m.into(x).detach()[..., :F])[0])


def sampled_ids(m: Net, x: Tensor) -> Any:
    ids = m.head(m.rnn(x)[1][-1]).argmax(-1)
    return m.head(m.upper(m.embed(ids)[:, None].expand(-1, T, -1).new_ones(B, T, H))[0])


def sampled_numbers(m: Net, x: Tensor) -> Any:
    scale = m.head(m.rnn(x)[0]).exp()
    drawn = torch.distributions.Normal(scale[..., :1], 1.0).sample()  # type: ignore[no-untyped-call]
    return m.head(m.upper(drawn.expand(-1, -1, H))[0])


def shape_only(m: Net, x: Tensor) -> Any:
    h = m.rnn(x)[1][-1].detach()
    return m.head(m.into(x[:, 0]) + m.state.bias.expand_as(h) + torch.zeros_like(h))


def nothing_is_differentiated(m: Net, x: Tensor) -> Any:
    with torch.no_grad():
        return m.head(m.rnn(x)[1][-1])


def detached_altogether(m: Net, x: Tensor) -> Any:
    return m.head(m.rnn(x)[1][-1]).detach()


def not_used(m: Net, x: Tensor) -> Any:
    m.rnn(x)[1].detach().mean()
    return m.head(m.into(x))


def gated_in_place(m: Net, x: Tensor) -> Any:
    h = m.rnn(x)[1][-1] * 1
    with torch.no_grad():
        h.clamp_(-1, 1)
    return m.head(h)


def kept_for_a_loss(m: Net, x: Tensor) -> Any:
    out, _ = m.rnn(x)
    m.kept = out.pow(2).mean()
    return m.head(out.detach())


def checkpointed(m: Net, x: Tensor) -> Any:
    return m.head(checkpoint(lambda x: m.rnn(x)[0], x, use_reentrant=False))


def checkpointed_anew(m: Net, x: Tensor) -> Any:
    run = lambda x: m.rnn(x)[0]  # noqa: E731
    return m.head(checkpoint(run, x.requires_grad_(), use_reentrant=True))


@pytest.mark.parametrize(
    "run",
    [
        *(last_state, truncated, truncated_cells, truncated_by_hand, burnt_in),
        *(kept_for_the_next_batch, shown_attention, own_target, straight_through, detached_input),
        *(sampled_ids, sampled_numbers, shape_only, nothing_is_differentiated, not_used),
        *(detached_altogether, gated_in_place, kept_for_a_loss, checkpointed, checkpointed_anew),
    ],
    ids=lambda run: run.__name__,
)
def test_no_cut(run: Run) -> None:
    assert cuts(run) == {}


def test_a_frozen_site_is_meant_so() -> None:
    for run in (whole_without_gradient, detached_summary):
        model = Net(run)
        model.rnn.requires_grad_(False)
        assert cuts_in(model, recorded(model, torch.randn(B, T, F))) == {}


@pytest.mark.parametrize(
    "run", [whole_without_gradient, detached_summary, cells_cut_everywhere, written_cut_at_the_end]
)
def test_what_no_optimizer_holds_is_meant_so(run: Run) -> None:
    model = Net(run)
    recording = recorded(model, torch.randn(B, T, F))
    head = {id(p) for p in model.head.parameters()}
    assert cuts_in(model, recording, head) == {}
    everything = {id(p) for p in model.parameters()}
    assert len(cuts_in(model, recording, everything)) == 1


@pytest.mark.parametrize("cut", [True, False])
def test_in_a_whole_training_step(cut: bool) -> None:
    model, x, y = Net(detached_summary if cut else last_state), torch.randn(B, T, F), torch.ones(B)

    def step() -> Tensor:
        return cross_entropy(model(x), y.long())

    assert set(cuts_in(model, record(step, model, (x, y)))) == ({"rnn"} if cut else set())


def test_a_batch_of_ids_and_one_sample() -> None:
    model = Net(lambda m, ids: detached_summary(m, m.embed(ids)))
    assert set(cuts_in(model, recorded(model, torch.randint(9, (1, T))))) == {"rnn"}
