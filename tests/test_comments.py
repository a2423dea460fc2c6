"""Comments in the code of a model: which are ours, and what each of them speaks of."""

from __future__ import annotations

import ast
import linecache
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from factories import recorded
from torch import nn

from rnnguard.inspection.comments import Comment, absolute, comments_of
from rnnguard.inspection.sites import find_sites

X = torch.zeros(6, 20, 5)
Load = Callable[..., ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Runs a text as the file model.py of the working directory."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, name: str = "model.py") -> ModuleType:
        file = tmp_path / name
        source = "import torch\nfrom torch import nn\n" + textwrap.dedent(text)
        file.write_text(source, encoding="utf-8")
        module = ModuleType(file.stem)
        exec(compile(source, str(file), "exec"), vars(module))
        return module

    return load


def comments_in(model: nn.Module, *args: Any) -> list[Comment]:
    sites = [site.record for site in find_sites(model, recorded(model, *args or (X,)))]
    return list(comments_of(model, sites))


def only(model: nn.Module, *args: Any) -> Comment:
    (found,) = comments_in(model, *args)
    return found


def lines(comment: Comment) -> list[int]:
    return sorted(int(line.rpartition(":")[2]) for line in comment.lines)


NET = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(5, 8, batch_first=True)
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.lstm(x)[0][:, -1])
"""
MADE, READ = "self.lstm = nn.LSTM(5, 8, batch_first=True)", "return self.fc(self.lstm(x)[0][:, -1])"
IGNORE = "  # rnnguard: ignore[RG201]"


def beside(code: str, comment: str) -> str:
    assert code in NET
    return NET.replace(code, f"{code}  {comment}")


@pytest.mark.parametrize(
    ("text", "names", "reason"),
    [
        ("# rnnguard: ignore[RG201] tags are read in pairs", ["RG201"], "tags are read in pairs"),
        ("#rnnguard:ignore[RG201]", ["RG201"], ""),
        ("# rnnguard: ignore [RG201, no-clipping] - as agreed", ["RG201", "no-clipping"],
         "as agreed"),
        ("# noqa: E501  # rnnguard: ignore[RG2]: see issue 7", ["RG2"], "see issue 7"),
        ("# rnnguard: ignore", [], ""),
        ("# rnnguard: ignore[]", [], ""),
        ("# rnnguard: ignore RG201", [], "RG201"),
        ("# rnnguard: ignore[RG201", [], "[RG201"),
    ],
)  # fmt: skip
def test_a_comment_is_read(load: Load, text: str, names: list[str], reason: str) -> None:
    found = only(load(beside(MADE, text)).Net())
    assert (list(found.names), found.reason) == (names, reason)
    assert found.location == "model.py:7"


@pytest.mark.parametrize(
    "text",
    ["# rnnguard: ignored[RG201]", "# rnnguard is great", "# see rnnguard: ignore[RG201]",
     "; note = '# rnnguard: ignore[RG201]'"],
)  # fmt: skip
def test_other_words_are_none_of_ours(load: Load, text: str) -> None:
    assert comments_in(load(beside(MADE, text)).Net()) == []


def test_two_on_one_line_are_two(load: Load) -> None:
    text = "# rnnguard: ignore[RG201] one # rnnguard: ignore[RG401] two"
    found = comments_in(load(beside(MADE, text)).Net())
    assert [(c.names, c.reason) for c in found] == [(("RG201",), "one"), (("RG401",), "two")]


def test_beside_the_line_that_makes_a_module(load: Load) -> None:
    found = only(load(beside(MADE, IGNORE)).Net())
    assert (set(found.paths), found.sure, lines(found)) == ({"lstm"}, True, [7])


def test_on_a_line_of_its_own_above(load: Load) -> None:
    above = NET.replace(MADE, f"# rnnguard: ignore[RG201]\n            {MADE}")
    found = only(load(above).Net())
    assert (set(found.paths), lines(found), found.location) == ({"lstm"}, [8], "model.py:7")
    two = NET.replace(
        MADE, f"# rnnguard: ignore[RG201]\n            # so be it\n            {MADE}"
    )
    assert lines(only(load(two).Net())) == [9]
    apart = NET.replace(MADE, f"# rnnguard: ignore[RG201]\n\n            {MADE}")
    found = only(load(apart).Net())
    assert (set(found.paths), lines(found)) == (set(), [])


def test_in_the_forward(load: Load) -> None:
    found = only(load(beside(READ, IGNORE)).Net())
    assert (set(found.paths), found.sure, lines(found)) == (set(), True, [11])
    above = NET.replace(READ, f"# rnnguard: ignore[RG201]\n            {READ}")
    assert lines(only(load(above).Net())) == [12]


def test_anywhere_in_a_statement_of_several_lines(load: Load) -> None:
    parts = ["self.lstm = nn.LSTM(", f"    5, 8,{IGNORE}", "    batch_first=True,", ")"]
    long = f"\n{' ' * 12}".join(parts)
    found = only(load(NET.replace(MADE, long)).Net())
    assert (set(found.paths), lines(found)) == ({"lstm"}, [7, 8, 9, 10])


def test_of_a_block_the_head(load: Load) -> None:
    text = """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.cell = nn.GRUCell(5, 8)

            def forward(self, x):
                h = x.new_zeros(len(x), 8)
                # rnnguard: ignore[RG201]
                for t in range(x.shape[1]):
                    h = self.cell(x[:, t], h)
                return h
    """
    assert lines(only(load(text).Net())) == [12]


def test_the_line_of_the_models_class(load: Load) -> None:
    found = only(load(beside("class Net(nn.Module):", IGNORE)).Net())
    assert (set(found.paths), found.sure) == ({""}, True)
    decorated = "\n    # rnnguard: ignore[RG201]\n    @staticmethod\n    class Net(nn.Module):"
    plain = "\n    class Net(nn.Module):"
    model = load(NET.replace(plain, decorated)).Net.__wrapped__()
    assert only(model).paths == {""}


CONTAINERS = {
    "list": ("self.rnns = nn.ModuleList([nn.GRU(5, 5), nn.GRU(5, 5)])", {"rnns.0", "rnns.1"}),
    "dict": ("self.rnns = nn.ModuleDict({'0': nn.GRU(5, 5), '1': nn.GRU(5, 5)})",
             {"rnns.0", "rnns.1"}),
    "comprehension": ("self.rnns: nn.ModuleList = nn.ModuleList(nn.GRU(5, 5) for _ in range(2))",
                      {"rnns.0", "rnns.1"}),
    "nested": ("self.rnns = nn.ModuleList([nn.ModuleList([nn.GRU(5, 5)]), nn.GRU(5, 5)])",
               {"rnns.0.0", "rnns.1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_makes_a_container_makes_what_it_holds(load: Load, name: str) -> None:
    code, paths = CONTAINERS[name]
    text = f"""
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                {code}{IGNORE}

            def forward(self, x):
                for part in (self.rnns[k] for k in ('0', '1')) if hasattr(self.rnns, 'keys') \\
                        else self.rnns:
                    part = part[0] if isinstance(part, nn.ModuleList) else part
                    x = part(x)[0]
                return x
    """
    assert only(load(text).Net()).paths == paths


@pytest.mark.parametrize(
    "code",
    [
        "self.rnns.append(nn.GRU(5, 5))",
        "self.rnns.add_module('0', nn.GRU(5, 5))",
        "self.rnns += [nn.GRU(5, 5)]",
    ],
)
def test_what_adds_to_a_container_may_not_be_the_only_one(load: Load, code: str) -> None:
    text = f"""
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnns = nn.ModuleList()
                {code}{IGNORE}

            def forward(self, x):
                return self.rnns[0](x)[0]
    """
    found = only(load(text).Net())
    assert (set(found.paths), found.sure) == ({"rnns.0"}, False)


@pytest.mark.parametrize(
    "code", ["setattr(self, 'rnn', nn.GRU(5, 5))", "self.add_module('rnn', nn.GRU(5, 5))",
             "self.rnn, self.size = nn.GRU(5, 5), 5"]
)  # fmt: skip
def test_a_module_may_be_set_by_name(load: Load, code: str) -> None:
    text = f"""
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                {code}{IGNORE}

            def forward(self, x):
                return self.rnn(x)[0]
    """
    found = only(load(text).Net())
    assert (set(found.paths), found.sure) == ({"rnn"}, True)


NESTED = """
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(5, 5){inner}

        def forward(self, x):
            return self.rnn(x)[0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Encoder(), Encoder(){outer}

        def forward(self, x):
            return self.second(self.first(x))
"""


def test_the_class_that_owns_the_site_counts(load: Load) -> None:
    found = only(load(NESTED.format(inner=IGNORE, outer="")).Net())
    assert found.paths == {"first.rnn", "second.rnn"}
    assert only(load(NESTED.format(inner="", outer=IGNORE)).Net()).paths == set()


def test_classes_of_other_files_are_read_too(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "base", load(beside(MADE, IGNORE), "base.py"))
    child = load("""
        from base import Net

        class Child(Net):
            def forward(self, x):
                return super().forward(x)
    """)
    found = only(child.Child())
    assert (found.location, set(found.paths)) == ("base.py:7", {"lstm"})


def test_other_classes_of_the_file_are_not_this_model(load: Load) -> None:
    text = NET + NET.replace("Net", "Other").replace(MADE, f"{MADE}{IGNORE}").replace(
        READ, f"{READ}{IGNORE}"
    )
    found = comments_in(load(text).Net())
    assert [(set(c.paths), c.sure) for c in found] == [(set(), False), (set(), False)]


def test_code_that_may_not_run_is_not_sure(load: Load) -> None:
    text = f"""
        class Net(nn.Module):
            def __init__(self, both=False):
                super().__init__()
                if both:
                    self.rnn = nn.GRU(5, 8, bidirectional=True){IGNORE}
                else:
                    self.rnn = nn.GRU(5, 8)

            def forward(self, x):
                if x.dim() == 2:
                    return self.rnn(x)[0][-1]{IGNORE}
                return self.rnn(x)[0]

            def sample(self, x):
                return self.rnn(x)[0][-1]{IGNORE}

        def helper(x):
            return x[-1]{IGNORE}
    """
    found = comments_in(load(text).Net())
    assert [(set(c.paths), c.sure) for c in found] == [
        ({"rnn"}, False), (set(), False), (set(), False), (set(), False),
    ]  # fmt: skip


def test_the_file_of_a_place_is_read_too(load: Load) -> None:
    model = load(NET).Net()
    Path("train.py").write_text("def step():\n    clip()  # rnnguard: ignore[RG502]\n")
    (found,) = comments_of(model, [], ["train.py:2", None])
    assert (found.location, found.sure, lines(found)) == ("train.py:2", True, [2])
    assert found.lines == {absolute("train.py:2")}


def test_a_cell_of_a_notebook_is_read(load: Load) -> None:
    source = "from torch import nn\n" + textwrap.dedent(beside(MADE, IGNORE))
    name = "<ipython-input-1-abc>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), space)
    found = only(space["Net"]())
    assert (found.location, set(found.paths)) == (f"{name}:6", {"lstm"})
    assert absolute(found.location) == found.location


def test_a_module_of_torchs_own_has_no_code() -> None:
    assert comments_of(nn.LSTM(5, 8), []) == ()


def test_a_file_changed_since_is_no_failure(load: Load) -> None:
    model = load(NET).Net()
    Path("model.py").write_text("class Net(:  # rnnguard: ignore[RG201]\n  'unclosed\n")
    (found,) = comments_of(model, [], ["model.py:1"])
    assert (lines(found), set(found.paths), found.sure) == ([1], set(), True)


def test_nothing_is_parsed_where_nothing_is_said(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: Any) -> Any:
        raise AssertionError("parsed")

    monkeypatch.setattr(ast, "parse", parse)
    assert comments_in(load(NET).Net()) == []
