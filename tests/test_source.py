"""Mistakes in source: results of `detach` dropped, graphs retained; and what only looks like it."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import rnnguard
from rnnguard.inspection.source import retained_graph, source_readings, unused_detaches

HEAD = "import torch\nfrom torch import nn\n\n"


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Any]:
    """Imports code that is written to a file, as a user's module is."""
    names: list[str] = []

    def write(code: str) -> ModuleType:
        file = tmp_path / f"user_code_{len(names)}.py"
        file.write_text(HEAD + textwrap.dedent(code), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        names.append(file.stem)
        spec.loader.exec_module(module)
        return module

    yield write
    for name in names:
        del sys.modules[name]


def model_with(body: str, more: str = "") -> str:
    inside = textwrap.indent(textwrap.dedent(body).strip(), " " * 8)
    return f"""
class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 16)
        self.hidden = None

    def forward(self, x):
        out, hidden = self.lstm(x, self.hidden)
{inside}
        return out
{more}

model = nn.ModuleDict(dict(a=Memory(), b=Memory()))
"""


UNUSED = [
    "hidden[0].detach()\nself.hidden = hidden",
    "self.hidden = hidden\nself.hidden[0].data.detach()",
    "for h in hidden:\n    h.detach()\nself.hidden = hidden",
    "for h in hidden:\n    h = h.detach()\nself.hidden = hidden",
    "[h.detach() for h in hidden]\nself.hidden = hidden",
    "tuple(h.detach() for h in hidden)\nself.hidden = hidden",
    "if self.training:\n    with torch.no_grad():\n        out.detach()",
]
USED = [
    "self.hidden = tuple(h.detach() for h in hidden)",
    "self.hidden = [h.detach() for h in hidden]",
    "for h in hidden:\n    h.detach_()\nself.hidden = hidden",
    "[h.detach_() for h in hidden]\nself.hidden = hidden",
    "hidden[0].detach().zero_()",
    "self.lstm(x)[0].detach()",
    "out = out.detach() + out",
    "kept = []\nfor h in hidden:\n    h = h.detach()\n    kept.append(h)",
    "for i, h in enumerate(hidden):\n    out = out + h.detach()[0]",
    "print_ = lambda h: h.detach()",
    '"""h.detach()"""',
]


@pytest.mark.parametrize("body", UNUSED)
def test_a_result_that_is_dropped(written: Any, body: str) -> None:
    module = written(model_with(body))
    (place,) = unused_detaches(module.model)
    file, line = place.rsplit(":", 1)
    assert Path(file).name == Path(module.__file__).name
    assert ".detach()" in Path(module.__file__).read_text("utf-8").splitlines()[int(line) - 1]


@pytest.mark.parametrize("body", USED)
def test_a_result_that_is_used(written: Any, body: str) -> None:
    assert unused_detaches(written(model_with(body)).model) == []


def test_methods_decorated_and_inherited(written: Any) -> None:
    more = """
    @torch.no_grad()
    def reset(self):
        self.hidden.detach()

    @staticmethod
    def cut(h):
        h.detach()

    @property
    def state(self):
        self.hidden.detach()
        return self.hidden

class Child(Memory):
    def forward(self, x):
        return super().forward(x)
"""
    module = written(model_with("self.hidden = None", more))
    assert len(unused_detaches(module.Child())) == 3


@pytest.mark.parametrize("name", ["step", "train_step", "loss"])
def test_in_functions_and_what_they_call(written: Any, name: str) -> None:
    module = written("""
        def repackage(hidden):
            for h in hidden:
                h.detach()
            return hidden

        def run(model, *batch):
            model.hidden = repackage(model.hidden)
            return model(batch[0])
    """)
    found = source_readings(nn.LSTM(5, 16), **{name: module.run})
    assert found["detach_unused"] == 1 and found["places"]["detach_unused"].endswith(":7")


def test_an_object_that_may_detach_in_place(written: Any) -> None:
    state = """
        class State:
            def detach(self):
                self.h = self.h.detach()

        def step(model, batch):
            model.state.detach()
            return model(batch)

        class Model(nn.LSTM):
            def forward(self, x):
                self.state.detach()
                return super().forward(x)
    """
    module = written(state)
    assert unused_detaches(nn.LSTM(5, 16), module.step) == []
    elsewhere = written(state.replace("class State:\n            def detach", "def other"))
    model = elsewhere.Model(5, 16)
    assert len(unused_detaches(model)) == 1
    model.state = module.State()
    assert unused_detaches(model) == []


RETAINED = [
    "loss.backward(retain_graph=True)",
    "torch.autograd.backward(loss, retain_graph=True)",
    "scaler.scale(loss).backward(retain_graph=True)",
    "if scaler:\n    scaler.scale(loss).backward(retain_graph=True)\nelse:\n    "
    "loss.backward(retain_graph=True)",
    "for x in batch:\n    loss.backward(retain_graph=True)\n    optimizer.step()",
    "loss.backward()\nloss2.backward(retain_graph=True)",
]
NEEDED = [
    "loss.backward()",
    "loss.backward(retain_graph=False)",
    "loss.backward(retain_graph=keep)",
    "loss.backward(retain_graph=True, create_graph=True)",
    "loss.backward(retain_graph=True)\nloss2.backward()",
    "for l in losses:\n    l.backward(retain_graph=True)\noptimizer.step()",
    "loss.backward(retain_graph=True)\np = torch.autograd.grad(loss, x)",
    "if last:\n    loss.backward()\nelse:\n    loss.backward(retain_graph=True)",
    "loss.backward(retain_graph=True)\nfinish(loss)",
    "return loss",
]


def _step(body: str) -> str:
    inside = textwrap.indent(body, "    ")
    return (
        f"\ndef finish(loss):\n    loss.backward()\n\ndef train_step(model, optimizer, batch):\n"
        f"    loss = loss2 = model(batch)\n{inside}\n    optimizer.step()\n"
    )


@pytest.mark.parametrize("body", RETAINED)
def test_a_graph_that_is_retained(written: Any, body: str) -> None:
    module = written(_step(body))
    place = retained_graph(None, module.train_step)
    assert place is not None
    line = Path(module.__file__).read_text("utf-8").splitlines()[int(place.rsplit(":", 1)[1]) - 1]
    assert "retain_graph=True" in line


@pytest.mark.parametrize("body", NEEDED)
def test_a_graph_that_is_needed_or_freed(written: Any, body: str) -> None:
    found = source_readings(nn.LSTM(5, 16), train_step=written(_step(body)).train_step)
    assert found == {"detach_unused": 0, "graph_retained": False, "places": {}}


def test_code_without_source() -> None:
    names: dict[str, Any] = {}
    exec(
        "def step(model, batch):\n    batch.detach()\n    model.backward(retain_graph=True)", names
    )
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    found = source_readings(model, loss=len, step=names["step"], train_step=None)
    assert found == {"detach_unused": 0, "graph_retained": False, "places": {}}


def test_source_that_does_not_parse(written: Any) -> None:
    module = written("def step(model, batch):\n    batch.detach()\n")
    assert len(unused_detaches(nn.LSTM(5, 16), module.step)) == 1
    Path(module.__file__).write_text("def step(:\n", encoding="utf-8")
    assert unused_detaches(nn.LSTM(5, 16), module.step) == []


def test_a_watched_training_step_leaves_what_step_does_told(written: Any) -> None:
    module = written("""
        def step(model, batch):
            out, state = model(batch[:4])
            state.detach()
            return model(batch[4:], state)[0].square().mean()

        def train_step(model, optimizer, batch):
            optimizer.zero_grad()
            model(batch)[0].square().mean().backward()
            optimizer.step()
    """)
    model = nn.GRU(5, 16)
    report = rnnguard.audit(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        [torch.randn(8, 3, 5)],
        step=module.step,
        train_step=module.train_step,
    )
    (finding,) = [f for f in report.findings if f.code == "RG302"]
    assert str(finding.location).endswith(":7")
