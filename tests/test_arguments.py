"""The arguments of an audit: what the command line, the target's code and a file say of them."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rnnguard.arguments import arguments_of
from rnnguard.errors import RNNGuardError
from rnnguard.settings_file import effective

NETS = """
    import torch
    from torch import nn

    def build_model(hidden=8): return nn.LSTM(5, hidden)
    def setup(): return {"model": nn.LSTM(5, 8), "memory": 30, "seed": 4, "rules": "team"}
    inputs = torch.zeros(20, 3, 5)
    def batches(): return [(inputs, torch.zeros(3))]
    def make_optimizer(model): return torch.optim.Adam(model.parameters())
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project whose module `nets` lies at its root; the working directory is below it."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETS))
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("nets")]:
        del sys.modules[name]


def arguments(project: Path, text: str, **said: Any) -> dict[str, Any]:
    (project / "pyproject.toml").write_text(f"[tool.rnnguard]\n{text}\n")
    return arguments_of(effective(said))


def test_targets_of_a_file_are_found_from_its_folder(project: Path) -> None:
    found = arguments(
        project,
        'target = "nets:build_model(16)"\ndata = "nets:batches"\ninputs = "nets.py:inputs"\n'
        'loss = "torch.nn:MSELoss()"\noptimizer = "nets:make_optimizer"\nmemory = 12',
    )
    assert found["model"].hidden_size == 16
    assert len(found["data"]) == 1
    assert tuple(found["inputs"].shape) == (20, 3, 5)
    assert type(found["loss"]).__name__ == "MSELoss"
    assert found["optimizer"].param_groups[0]["params"][0] is found["model"].weight_ih_l0
    assert (found["memory"], found["seed"]) == (12, 0)
    (settings,) = found["rules"]
    assert settings.memory == 12


def test_code_goes_before_a_file_and_the_command_line_before_both(project: Path) -> None:
    text = 'target = "nets:setup"\nmemory = 12\nseed = 3\ninputs = "nets:inputs"'
    found = arguments(project, text)
    assert (found["memory"], found["seed"]) == (30, 4)
    assert found["rules"][0] == "team" and len(found["rules"]) == 2
    said = arguments(project, text, memory=50, seed=7)
    assert (said["memory"], said["seed"]) == (50, 7)
    assert said["inputs"] is not None


def test_a_target_of_the_command_line_is_found_from_here(project: Path) -> None:
    with pytest.raises(RNNGuardError, match="there is no module `nets`"):
        arguments(project, "memory = 3", target="nets:build_model")
    found = arguments(project, "memory = 3", target="../nets.py:build_model")
    assert found["memory"] == 3


def test_a_folder_for_modules_goes_first(project: Path) -> None:
    settings = effective({"target": "nets:build_model"}, isolated=True)
    assert arguments_of(settings, project)["model"].hidden_size == 8


def test_without_a_target_nothing_can_be_done(project: Path) -> None:
    with pytest.raises(RNNGuardError, match=r"no target is named. Name one, or set `target` in"):
        arguments(project, "memory = 3")
