"""Samples that meet in a model, and sound models that look as if they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import subject
from torch import Tensor, nn

import rnnguard
from rnnguard.inspection.recording import record
from rnnguard.inspection.sites import find_sites
from rnnguard.probe.leakage import Leakage, leakage
from rnnguard.probe.snapshot import fingerprint, untouched

B, T, F, H = 6, 11, 5, 16
_SEED = torch.Generator().manual_seed(0)
X = torch.randn(B, T, F, generator=_SEED)
IDS = torch.randint(20, (B, T), generator=_SEED)
Y = torch.randint(3, (B,), generator=_SEED)
CE = nn.CrossEntropyLoss()
Read = Callable[..., Any]


class Net(nn.Module):
    """A recurrence over features or tokens, its read-out, and a head."""

    graph: Any

    def __init__(self, read: Read, rnn: nn.Module | None = None, tokens: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, F) if tokens else nn.Identity()
        self.rnn = rnn or nn.GRU(F, H, batch_first=True)
        self.head = nn.LazyLinear(3)
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.head(self.read(self, self.embed(x)))


def made(read: Read, rnn: nn.Module | None = None, *, tokens: bool = False) -> Net:
    net = Net(read, rnn, tokens)
    net(IDS if tokens else X)
    return net


def share(model: nn.Module, x: Any = X, y: Any = Y, size: int | None = None, **options: Any) -> Any:
    options = options or {"loss": CE}
    asked = subject(model, [(x, y)] * 2, **options)
    before, random = fingerprint(model), torch.get_rng_state()
    with untouched(model):
        recording = record(lambda: model(*(x if isinstance(x, tuple) else (x,))), model, x)
        sites = [site.record for site in find_sites(model, recording)]
        found = leakage(asked, sites, size)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    return found


def last(net: Any, x: Tensor) -> Any:
    return net.rnn(x)[0][:, -1]


def every(net: Any, x: Tensor) -> Any:
    return net.rnn(x)[0]


def viewed(net: Any, x: Tensor) -> Any:
    return net.rnn(x.reshape(T, B, -1))[0][-1]


def final_view(net: Any, x: Tensor) -> Any:
    return net.rnn(x)[1].view(B, -1)


WRONG: dict[str, tuple[Read, Callable[[], nn.Module]]] = {
    "no batch_first": (last, lambda: nn.GRU(F, H)),
    "no batch_first, lstm": (last, lambda: nn.LSTM(F, H, 2)),
    "view for transpose": (viewed, lambda: nn.GRU(F, H)),
    "h_n.view": (final_view, lambda: nn.GRU(F, H, batch_first=True, bidirectional=True)),
}
RIGHT: dict[str, tuple[Read, Callable[[], nn.Module]]] = {
    "last step": (last, lambda: nn.LSTM(F, H, 2, batch_first=True, dropout=0.5)),
    "both ways": (
        lambda net, x: net.rnn(x)[1].transpose(0, 1).flatten(1),
        lambda: nn.GRU(F, H, batch_first=True, bidirectional=True),
    ),
    "transposed": (lambda net, x: net.rnn(x.transpose(0, 1))[0][-1], lambda: nn.GRU(F, H)),
    "pooled": (lambda net, x: every(net, x).amax(1), lambda: nn.RNN(F, H, batch_first=True)),
    "functional dropout": (
        lambda net, x: nn.functional.dropout(last(net, x), 0.5),
        lambda: nn.GRU(F, H, batch_first=True),
    ),
}


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_samples_that_meet(name: str, tokens: bool) -> None:
    read, rnn = WRONG[name]
    found = share(made(read, rnn(), tokens=tokens), IDS if tokens else X)
    assert 0.1 < found.share <= 1
    assert found.axis.startswith("the samples lie along axis 0 of the input")
    assert ("takes for time" in found.axis) is name.startswith("no batch_first")
    assert (found.location is None) is not name.startswith("no batch_first")


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_samples_kept_apart(name: str, tokens: bool) -> None:
    read, rnn = RIGHT[name]
    assert share(made(read, rnn(), tokens=tokens), IDS if tokens else X) == Leakage(0.0)


def test_a_sound_model_with_time_first() -> None:
    net = made(lambda net, x: net.rnn(x)[0][-1], nn.GRU(F, H))
    assert share(net, X.transpose(0, 1).contiguous()) == Leakage(0.0)


def test_the_share_of_a_known_mixture() -> None:
    class Mixed(nn.Module):
        """Sample i is read as 3 of itself and 4 of the sample before it."""

        def forward(self, x: Tensor) -> Any:
            return (3 * x + 4 * x.roll(1, 0)).sum((1, 2))[:, None].expand(-1, 2)

    found = share(Mixed(), y=Y, size=B, loss=None)
    assert found.share == pytest.approx(0.8, rel=1e-5)


@pytest.mark.parametrize("flat", [False, True])
def test_tags_of_every_step(flat: bool) -> None:
    def read(net: Any, x: Tensor) -> Any:
        return every(net, x).reshape(-1, H) if flat else every(net, x)

    wrong, right, tags = made(read, nn.GRU(F, H)), made(read), torch.randint(3, (B, T))
    assert share(wrong, y=tags, loss=None) is None  # either axis may hold the samples
    assert share(wrong, y=tags, size=B, loss=None).share > 0.1
    assert share(right, y=tags, size=B, loss=None) == Leakage(0.0)


def test_the_users_own_step() -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        return CE(model(batch[0]), batch[1])

    assert share(made(last, nn.GRU(F, H)), step=step).share > 0.1
    assert share(made(last), step=step) == Leakage(0.0)

    def twice(model: nn.Module, batch: Any) -> Any:
        return CE(model(batch[0]) + model(batch[0]), batch[1])

    assert share(made(last, nn.GRU(F, H)), step=twice) is None


class Normed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.rnn, self.head, self.how = nn.GRU(F, H, batch_first=True), nn.Linear(H, 3), how
        self.norm = nn.BatchNorm1d(H, track_running_stats=how != "untracked")
        self.register_buffer("graph", torch.rand(B, B))

    def forward(self, x: Tensor) -> Any:
        h = self.rnn(x)[0][:, -1]
        if self.how == "by hand":
            h = (h - h.mean(0)) / h.var(0).sqrt()
        elif self.how == "graph":
            h = self.graph @ h
        else:
            h = self.norm(h)
        return self.head(h)


@pytest.mark.parametrize("how", ["untracked", "by hand", "graph"])
def test_what_is_meant_to_mix_is_not_judged(how: str) -> None:
    assert share(Normed(how)) is None


def test_batch_norm_is_put_into_evaluation() -> None:
    assert share(Normed("tracked")) == Leakage(0.0)


def test_a_single_sequence_has_no_other_sample() -> None:
    net, x = made(every), torch.randn(T, F)
    assert share(net, x, torch.randint(3, (T,))) is None


def test_cells_in_a_loop_and_a_state_that_goes_on() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(F, H), nn.Linear(H, 3)
            self.embed, self.h = nn.Embedding(20, F), torch.zeros(B, H)

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            h = self.h
            for x in self.embed(ids).unbind(1):
                h = self.cell(x, h)
            self.h = h.detach()
            return {"logits": self.head(h)}

    found = share(Loop(), IDS, Y, loss=lambda out, y: CE(out["logits"], y))
    assert found == Leakage(0.0)


def test_the_audit_names_the_view_that_mixes_them() -> None:
    model = made(final_view, nn.GRU(F, H, batch_first=True, bidirectional=True))
    report = rnnguard.audit(model, data=(X, torch.randn(B, 3)), loss=nn.MSELoss())
    told = {f.code: f.location for f in report.findings if f.code in ("RG203", "RG205")}
    place = report["rnn"].places["state_index"]
    assert told == {"RG203": place} and "test_leakage.py" in place


# A global, since what a closure of the model's holds is given back.
_lengths: list[int] = []


def steps_run(read: Read, rnn: nn.Module, tokens: bool) -> tuple[Any, list[int]]:
    """What is found on long sequences, and how many steps the model was run on for it."""

    def watched(net: Any, x: Tensor) -> Any:
        _lengths.append(x.shape[1])
        return read(net, x)

    model = Net(watched, rnn, tokens)
    long = torch.randint(20, (B, 90)) if tokens else torch.randn(B, 90, F)
    model(long)
    asked = subject(model, [(long, Y)] * 2, loss=CE)
    with untouched(model):
        sites = [s.record for s in find_sites(model, record(lambda: model(long), model, long))]
        _lengths.clear()
        found = leakage(asked, sites)
    return found, list(_lengths)


@pytest.mark.parametrize("tokens", [False, True])
def test_the_first_steps_of_a_long_sequence_acquit(tokens: bool) -> None:
    found, lengths = steps_run(last, nn.GRU(F, H, batch_first=True), tokens)
    assert found == Leakage(0.0) and set(lengths) == {24}


@pytest.mark.parametrize("tokens", [False, True])
def test_only_the_whole_sequence_convicts(tokens: bool) -> None:
    found, lengths = steps_run(last, nn.GRU(F, H), tokens)
    assert found.share > 0.1 and 90 in lengths


def test_a_model_for_one_length_is_run_on_that() -> None:
    def fixed(net: Any, x: Tensor) -> Any:
        # 24 steps would be taken for fewer samples of 90 steps each.
        return last(net, x.reshape(-1, 90, F))

    found, lengths = steps_run(fixed, nn.GRU(F, H, batch_first=True), False)
    assert found == Leakage(0.0) and lengths[-1] == 90
