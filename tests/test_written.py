"""Hand-written recurrences as sites: their path, place and record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import recorded
from torch import Tensor, nn

import rnnguard
from rnnguard.inspection.loops import find_loops
from rnnguard.inspection.sites import find_sites
from rnnguard.inspection.written import WrittenSite, relative, rounds, written_sites

F, H, T, B = 3, 4, 6, 5


class Cell(nn.Module):
    """A cell in a module of its own."""

    def __init__(self, inputs: int = F) -> None:
        super().__init__()
        self.into, self.state = nn.Linear(inputs, H), nn.Linear(H, H)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.into(x) + self.state(h))


class Layer(nn.Module):
    def __init__(self, inputs: int = F) -> None:
        super().__init__()
        self.cell = Cell(inputs)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x.new_zeros(x.shape[1], H), []
        for now in x:
            h = self.cell(now, h)
            outputs.append(h)
        return torch.stack(outputs)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer(H)])
        self.norm = nn.LayerNorm(H)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class TwoInOne(nn.Module):
    """Two recurrences whose weights lie in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(F, F) / 2)
        self.b = nn.Parameter(torch.randn(F, F) / 2)

    def forward(self, x: Tensor) -> Tensor:
        h = g = torch.zeros(x.shape[1], F)
        for now in x:
            h = torch.tanh(now + h @ self.a)
        for now in x.flip(0):
            g = torch.tanh(now + g @ self.b)
        return h + g


class Mixed(nn.Module):
    """A layer of torch's below a hand-written one."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.layer = nn.GRU(F, H), Layer(H)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.gru(x)[0])[-1]
        return out


class Kernel(nn.Module):
    """Torch's cell kernel on weights of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(H, F)), nn.Parameter(torch.randn(H, H))

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], H)
        for now in x:
            h = torch.rnn_tanh_cell(now, h, self.w, self.u)
        return h


class Rounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], H)
        for _ in range(4):
            h = self.cell(x[0], h)
        return h


def found(model: nn.Module) -> list[WrittenSite]:
    recording = recorded(model, torch.randn(T, B, F))
    loops = find_loops(recording.graph)
    native = {call for site in find_sites(model, recording) for call in site.calls}
    return written_sites(model, loops, native)


def test_the_path_is_that_of_the_users_own_module() -> None:
    sites = found(Stack())
    assert [site.record.path for site in sites] == ["layers.0.cell", "layers.1.cell"]
    assert [type(site.module) for site in sites] == [Cell, Cell]
    assert [site.record.module for site in sites] == ["Cell", "Cell"]
    assert [site.record.weights for site in sites] == [
        ("layers.0.cell.state.weight",),
        ("layers.1.cell.state.weight",),
    ]


def test_two_in_one_module_are_told_by_their_weights() -> None:
    assert [site.record.path for site in found(TwoInOne())] == ["a", "b"]


def test_the_record() -> None:
    (site,) = found(Layer())
    record = site.record
    assert (record.form, record.cell, record.path) == ("written", "custom", "cell")
    assert (record.steps, record.batch, record.hidden_size) == (T, B, H)
    assert (record.layers, record.bidirectional, record.packed) == (1, False, False)
    assert record.readout == "all_steps"
    assert record.location is not None
    file, line = record.location.rsplit(":", 1)
    source = (Path(__file__).parents[1] / file).read_text(encoding="utf-8").splitlines()
    assert source[int(line) - 1].strip() == "return torch.tanh(self.into(x) + self.state(h))"


def test_a_norm_behind_is_seen() -> None:
    class Normed(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(H)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[1], H)
            for now in x:
                h = self.cell(now, h)
            found: Tensor = self.norm(h)
            return found

    assert [site.record.normalized for site in found(Normed())] == [True]
    assert [site.record.normalized for site in found(Layer())] == [False]


def test_torchs_own_are_left_to_torchs_own() -> None:
    assert [site.record.path for site in found(Mixed())] == ["layer.cell"]
    report = rnnguard.audit(Mixed(), inputs=torch.randn(T, B, F))
    assert [(site.path, site.form) for site in report.sites] == [
        ("gru", "fused"),
        ("layer.cell", "written"),
    ]


def test_a_kernel_on_own_weights_is_a_written_site() -> None:
    (site,) = found(Kernel())
    assert (site.record.steps, site.record.hidden_size) == (T, H)
    assert "u" in site.record.weights


def test_rounds_are_no_sites_but_told() -> None:
    loops = find_loops(recorded(Rounds(), torch.randn(T, B, F)).graph)
    assert written_sites(Rounds(), loops, ()) == []
    assert [(loop.kind, loop.steps) for loop in rounds(loops)] == [("iterations", 4)]


@pytest.mark.parametrize("below", [True, False])
def test_places_below_the_working_folder_are_relative(
    below: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = f"{tmp_path if below else '/elsewhere'}/model.py:3"
    assert relative(place) == ("model.py:3" if below else place)
    assert relative(None) is None
