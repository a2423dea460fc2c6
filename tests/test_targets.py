"""What a command line may name, and the sentence for everything that goes wrong with it."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rnnguard
from rnnguard.errors import RNNGuardError
from rnnguard.targets import (
    AUDIT_ARGUMENTS,
    STABILIZE_ONLY,
    audit_arguments,
    load_optimizer,
    load_value,
    origin,
    parse,
)

MODEL = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, hidden=8):
            super().__init__()
            self.lstm = nn.LSTM(5, hidden)

    def build_model(hidden=8, *, layers=1):
        return nn.LSTM(5, hidden, layers)

    def needs(hidden, *, depth): return nn.LSTM(5, hidden)
    def fails(): raise RuntimeError("no such\\n   weights")
    def leaves(): raise SystemExit(0)
    def number(): return 42

    inputs = torch.zeros(3, 2, 5)
    def sample(): return inputs
    def loss_fn(output, target): return output.sum()
    def make_optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.1)

    class zoo:
        net = nn.GRU(5, 4)

    def pair(): return Net(), inputs
    def trained(): model = Net(); return model, make_optimizer(model)
    def triple(): model = Net(); return model, make_optimizer(model), inputs
    def setup(): return {"model": Net(), "inputs": inputs, "memory": 30, "total_steps": 900}
    def wrong(): return {"model": Net(), "memry": 30}
    def headless(): return {"memory": 30}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; modules and paths of the test are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def nets(folder: Path) -> Path:
    write(folder / "nets.py", MODEL)
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def model_of(text: str, folder: Path) -> Any:
    return audit_arguments(text, folder)["model"]


def sentence(text: str, folder: Path) -> str:
    with pytest.raises(RNNGuardError) as caught:
        audit_arguments(text, folder)
    assert caught.value.code == "RG919"
    said = str(caught.value)
    assert "\n" not in said
    return said.removesuffix(" (RG919)")


@pytest.mark.parametrize(
    ("text", "place", "names", "called", "args", "kwargs"),
    [
        ("pkg.m", "pkg.m", (), False, (), {}),
        ("pkg.m:a.b", "pkg.m", ("a", "b"), False, (), {}),
        ("m:f(64, bias=False)", "m", ("f",), True, (64,), {"bias": False}),
        ("dir/m.py:f()", "dir/m.py", ("f",), True, (), {}),
        ("m:f('x.py:y')", "m", ("f",), True, ("x.py:y",), {}),
        (r"C:\dir\m.py:f", r"C:\dir\m.py", ("f",), False, (), {}),
    ],
)
def test_parts_of_a_target(
    text: str, place: str, names: Any, called: bool, args: Any, kwargs: Any
) -> None:
    target = parse(text)
    assert (target.place, target.names, target.called) == (place, names, called)
    assert (target.args, target.kwargs) == (args, kwargs)


@pytest.mark.parametrize(
    "text", ["", ":f", "m:", "m:f(x)", "m:f(*[1])", "m:f(**{})", "m:1", "m:f;g"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(RNNGuardError, match="Write `module:attr`"):
        parse(text)


def test_nothing_in_a_target_is_evaluated(folder: Path) -> None:
    said = sentence("os:getenv(open('x','w').name)", folder)
    assert said.startswith("`os:getenv(open('x','w').name)`: `getenv(open('x','w').name)` is not")
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("nets:build_model", 8),
        ("nets:build_model(16, layers=2)", 16),
        ("nets.py:build_model", 8),
        ("./nets.py:build_model(hidden=3)", 3),
    ],
)
def test_a_factory_is_called(nets: Path, text: str, hidden: int) -> None:
    assert model_of(text, nets).hidden_size == hidden


def test_a_module_a_class_and_a_dotted_name(nets: Path) -> None:
    assert isinstance(model_of("nets:zoo.net", nets), nn.GRU)
    assert model_of("nets:Net", nets).lstm.hidden_size == 8
    assert model_of("nets:Net(4)", nets).lstm.hidden_size == 4
    assert isinstance(model_of("torch.nn:LSTM(5, 32)", nets), nn.LSTM)


def test_what_a_factory_may_give(nets: Path) -> None:
    assert set(audit_arguments("nets:pair", nets)) == {"model", "inputs"}
    assert set(audit_arguments("nets:trained", nets)) == {"model", "optimizer"}
    assert set(audit_arguments("nets:triple", nets)) == {"model", "optimizer", "inputs"}
    assert set(audit_arguments("nets:setup", nets)) == {"model", "inputs", "memory"}


def test_the_app_dir_is_where_modules_are_found(folder: Path) -> None:
    write(folder / "src" / "pkg" / "net.py", "from torch import nn\nmodel = nn.GRU(2, 3)")
    assert isinstance(model_of("pkg.net:model", folder / "src"), nn.GRU)


def test_a_file_finds_its_neighbours_and_runs_once(folder: Path) -> None:
    write(folder / "code" / "sizes.py", "hidden = 7")
    code = "import sizes\nfrom torch import nn\ndef build(): return nn.GRU(2, sizes.hidden)"
    write(folder / "code" / "net.py", f"{code}\nprint('ran')")
    first = model_of("code/net.py:build", folder)
    assert first.hidden_size == 7
    build = load_value("code/net.py:build", folder)
    assert build is load_value("./code/net.py:build", folder)


def test_a_file_named_like_a_known_module_is_still_read(folder: Path) -> None:
    write(folder / "random.py", "from torch import nn\ndef build(): return nn.GRU(2, 3)")
    assert isinstance(model_of("random.py:build", folder), nn.GRU)


@pytest.mark.parametrize(
    "code",
    [
        "model = nn.GRU(2, 3)\nother = nn.GRU(2, 4)",
        "net = nn.GRU(2, 3)\nloss = nn.MSELoss()",
        "def make_model(): return nn.GRU(2, 3)\nclass A(nn.Module): pass",
        "class Net(nn.GRU):\n    def __init__(self): super().__init__(2, 3)",
    ],
)
def test_a_module_alone_names_its_model(folder: Path, code: str) -> None:
    write(folder / "alone.py", f"from torch import nn\n{code}")
    assert model_of("alone", folder).hidden_size == 3


def test_several_models_are_listed(folder: Path) -> None:
    write(folder / "two.py", "from torch import nn\na = nn.GRU(2, 3)\nb = nn.GRU(2, 4)")
    assert sentence("two", folder) == (
        "`two`: it holds more than one model. Write one: `two:a`, `two:b`."
    )
    write(folder / "zero.py", "x = 1")
    assert sentence("zero", folder) == (
        "`zero`: there is no model in it, nor a function to build one. Name one: `zero:NAME`."
    )


def test_a_missing_module_and_a_failing_import_are_told_apart(nets: Path) -> None:
    assert sentence("netz:f", nets) == ("`netz:f`: there is no module `netz`. Did you mean `nets`?")
    assert sentence("torch.nowhere:f", nets) == (
        "`torch.nowhere:f`: there is no module `torch.nowhere`. "
        "Start where it can be imported, or name its folder with `--app-dir`."
    )
    write(nets / "broken.py", "import torch\nimport not_installed")
    assert sentence("broken:f", nets) == (
        "`broken:f`: importing it failed at broken.py:2 with ModuleNotFoundError: "
        "No module named 'not_installed'. Correct that; `--debug` shows the traceback."
    )
    write(nets / "unwritten.py", "def f(:")
    assert "with SyntaxError: " in sentence("unwritten:f", nets)


def test_a_file_without_a_name_says_what_it_holds(folder: Path) -> None:
    write(folder / "train.py", "raise SystemExit\ndef main(): pass\ndef make_net(): pass")
    assert sentence("train.py", folder) == (
        "`train.py`: it does not say what in the file. "
        "Did you mean `train:make_net` or `train.py:make_net`?"
    )
    assert sentence("trian.py:f", folder) == (
        "`trian.py:f`: there is no file `trian.py`. Did you mean `train.py`?"
    )
    assert sentence("code/train:f", folder) == (
        "`code/train:f`: a file is named with its ending. Write `code/train.py:attr`."
    )


def test_a_script_that_runs_off_is_explained(folder: Path) -> None:
    write(folder / "script.py", "import sys\nsys.exit(0)")
    assert sentence("script.py:f", folder) == (
        "`script.py:f`: running it failed at script.py:2 with SystemExit: 0. "
        'Put what a script does under `if __name__ == "__main__":`.'
    )
    write(folder / "pkg" / "part.py", "from .other import f")
    assert sentence("pkg/part.py:f", folder).endswith(
        "The file belongs to a package: write `package.module:attr` with `--app-dir`."
    )
    assert "script" not in sys.modules


def test_a_missing_name_brings_the_nearest(nets: Path) -> None:
    assert sentence("nets:bild_model", nets) == (
        "`nets:bild_model`: there is no `bild_model`. Did you mean `build_model`?"
    )
    write(nets / "tiny.py", "def one(): pass\ndef two(): pass")
    assert sentence("tiny:zzz", nets) == "`tiny:zzz`: there is no `zzz`. It has `one`, `two`."


def test_a_factory_that_needs_arguments_says_which(nets: Path) -> None:
    assert sentence("nets:needs", nets) == (
        "`nets:needs`: it cannot be called so: missing a required argument: 'hidden'. "
        "Call it as `nets:needs(hidden=..., depth=...)`."
    )
    assert "unexpected keyword argument 'width'" in sentence("nets:build_model(width=3)", nets)
    assert sentence("nets:zoo.net(3)", nets).startswith("`nets:zoo.net(3)`: calling it failed")
    assert sentence("nets:inputs(3)", nets) == (
        "`nets:inputs(3)`: a Tensor cannot be called. Write `nets:inputs`."
    )


def test_a_failing_factory_is_one_sentence(nets: Path) -> None:
    said = sentence("nets:fails", nets)
    assert re.fullmatch(
        r"`nets:fails`: calling it failed at nets\.py:\d+ with RuntimeError: no such weights\. "
        r"Correct that; `--debug` shows the traceback\.",
        said,
    )
    assert "SystemExit: 0" in sentence("nets:leaves", nets)


def test_what_is_no_model_is_shown(nets: Path) -> None:
    said = sentence("nets:number", nets)
    assert said.startswith("`nets:number`: it is a int, not a model: 42. Give the model, (model,")
    assert "it is a dict, not a model" in sentence("nets:headless", nets)
    assert sentence("nets:wrong", nets) == (
        "`nets:wrong`: 'memry' is not an argument of stabilize. Did you mean `memory`?"
    )


def test_the_known_arguments_are_those_of_audit_and_stabilize() -> None:
    assert {*AUDIT_ARGUMENTS, "verbose"} == set(signature(rnnguard.audit).parameters)
    both = {*AUDIT_ARGUMENTS, *STABILIZE_ONLY} - {"train_step"}
    assert both == set(signature(rnnguard.stabilize).parameters)


def test_values_of_options(nets: Path) -> None:
    inputs = load_value("nets:inputs", nets)
    assert load_value("nets:sample", nets, from_function=True) is inputs
    assert load_value("nets:loss_fn", nets)(torch.ones(2), None) == 2
    assert isinstance(load_value("torch.nn:MSELoss", nets), nn.MSELoss)
    assert isinstance(load_value("torch.nn:MSELoss(reduction='sum')", nets), nn.MSELoss)
    with pytest.raises(RNNGuardError, match="Write `nets:NAME`"):
        load_value("nets", nets)


def test_optimizers(nets: Path) -> None:
    model = nn.GRU(2, 3)
    assert load_optimizer("nets:make_optimizer", nets, model).param_groups[0]["lr"] == 0.1
    adam = load_optimizer("torch.optim:Adam(lr=0.003)", nets, model)
    assert adam.param_groups[0]["lr"] == 0.003
    assert adam.param_groups[0]["params"] == list(model.parameters())
    with pytest.raises(RNNGuardError, match="it gave a Tensor, not an optimizer"):
        load_optimizer("nets:inputs", nets, model)


def test_the_origin_is_the_users_own_line(nets: Path) -> None:
    write(nets / "deep.py", "import torch\ndef f(): return torch.zeros(2) @ torch.zeros(3)")
    with pytest.raises(RuntimeError) as caught:
        load_value("deep:f", nets)()
    assert origin(caught.value) == " at deep.py:2"
    assert origin(ValueError()) == ""
