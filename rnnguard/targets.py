"""What a command line names: `module:attr`, `module:factory(64, bias=False)`, `file.py:attr`.

Loading a target runs the user's code. Every failure is an RNNGuardError (RG919).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import reprlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from rnnguard.errors import RNNGuardError

FACTORIES = ("build_model", "make_model", "create_model")
AUDIT_ARGUMENTS = (
    "model", "optimizer", "data", "inputs", "loss", "step", "memory", "trial", "train_step",
    "rules", "skip", "seed",
)  # fmt: skip
# A factory may serve stabilize as well; an audit from the command line has no use for these.
STABILIZE_ONLY = ("total_steps", "tiers", "verbose")
GRAMMAR = "Write `module:attr`, `module:factory(64, bias=False)` or `file.py:attr`."


@dataclass(frozen=True)
class Target:
    """A parsed target: where to look, which name, and the literal arguments of a call."""

    text: str
    place: str
    names: tuple[str, ...] = ()
    called: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def bad_target(text: str, fact: str, cure: str) -> RNNGuardError:
    return RNNGuardError.of("RG919", text, fact, cure)


def parse(text: str) -> Target:
    """The parts of a target; nothing is imported yet."""
    parts = re.fullmatch(r"([^\"']+?\.py|[^:\"'()]+)(?::(.+))?", text.strip())
    if parts is None:
        raise bad_target(text, "it is not a target.", GRAMMAR)
    place, attribute = parts[1], parts[2]
    if not place.endswith(".py") and re.search(r"[/\\]", place):
        raise bad_target(text, "a file is named with its ending.", f"Write `{place}.py:attr`.")
    if attribute is None:
        return Target(text, place)
    try:
        node = ast.parse(attribute, mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        names = ast.unparse(call.func if call else node).split(".")
        starred = call is not None and any(keyword.arg is None for keyword in call.keywords)
        if starred or not all(name.isidentifier() for name in names):
            raise ValueError(attribute)
        args = tuple(ast.literal_eval(arg) for arg in call.args) if call else ()
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords} if call else {}
    except (SyntaxError, ValueError) as error:
        fact = f"`{attribute}` is not a name, or a call with literal arguments."
        raise bad_target(text, fact, GRAMMAR) from error
    return Target(text, place, tuple(names), call is not None, args, kwargs)


def audit_arguments(text: str, app_dir: Path) -> dict[str, Any]:
    """The arguments of `rnnguard.audit` that a target stands for, the model among them."""
    from torch import nn

    target = parse(text)
    found = _find(target, app_dir) if target.names else _choose(target, app_dir)
    if target.called or (callable(found) and not isinstance(found, nn.Module)):
        found = _call(target, found)
    return _interpret(text, found)


def load_value(text: str, app_dir: Path, *, from_function: bool = False) -> Any:
    """The object that is named, or what its call gives; classes are always called.

    from_function: a named function is called for the value, as for data and inputs.
    """
    target = _named(text)
    found = _find(target, app_dir)
    makes = inspect.isclass(found) or (from_function and inspect.isfunction(found))
    return _call(target, found) if target.called or makes else found


def load_optimizer(text: str, app_dir: Path, model: Any) -> Any:
    """An optimizer: the one named, what a function of the model gives, or a class's own."""
    from torch.optim import Optimizer

    target = _named(text)
    found = _find(target, app_dir)
    if inspect.isclass(found) and issubclass(found, Optimizer):
        found = _call(target, found, model.parameters())
    elif callable(found):
        found = _call(target, found, model)
    if not isinstance(found, Optimizer):
        cure = "Name an optimizer, a function of the model that gives one, or its class."
        raise bad_target(text, f"it gave a {type(found).__name__}, not an optimizer.", cure)
    return found


def origin(error: BaseException) -> str:
    """Where an exception came from, as ` at file:line`: the innermost line of the user's own."""
    frames = traceback.extract_tb(error.__traceback__)
    skipped = (str(Path(__file__).parent), "<frozen")
    theirs = [frame for frame in frames if not frame.filename.startswith(skipped)]
    own = [frame for frame in theirs if "site-packages" not in frame.filename] or theirs
    if not own:
        return ""
    path = Path(own[-1].filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f" at {shown}:{own[-1].lineno}"


def _named(text: str) -> Target:
    target = parse(text)
    if not target.names:
        raise bad_target(text, "it does not say which object.", f"Write `{target.place}:NAME`.")
    return target


def _find(target: Target, app_dir: Path) -> Any:
    found: Any = _load(target, app_dir)
    for name in target.names:
        if not hasattr(found, name):
            public = [n for n in dir(found) if not n.startswith("_")]
            cure = _nearest(name, public, f"It has {_listed(public[:12]) or 'no names'}.")
            raise bad_target(target.text, f"there is no `{name}`.", cure)
        found = getattr(found, name)
    return found


def _nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean `{near[0]}`?" if near else otherwise


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _load(target: Target, app_dir: Path) -> ModuleType:
    if target.place.endswith(".py"):
        return _load_file(target, Path(target.place))
    _look_in(app_dir)
    with _user_code(target.text, "importing it"):
        try:
            return importlib.import_module(target.place)
        except ModuleNotFoundError as error:
            if not error.name or not f"{target.place}.".startswith(f"{error.name}."):
                raise
            present = [module.name for module in pkgutil.iter_modules([str(app_dir)])]
            cure = "Start where it can be imported, or name its folder with `--app-dir`."
            fact = f"there is no module `{error.name}`."
            raise bad_target(target.text, fact, _nearest(error.name, present, cure)) from error


def _load_file(target: Target, path: Path) -> ModuleType:
    if not path.is_file():
        cure = _nearest(str(path), map(str, path.parent.glob("*.py")), "Check the path.")
        raise bad_target(target.text, f"there is no file `{path}`.", cure)
    path = path.resolve()
    for module in list(sys.modules.values()):
        # The model and its data often lie in one file, which must not run twice.
        if getattr(module, "__file__", None) == str(path):
            return module
    _look_in(path.parent)
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        with _user_code(target.text, "running it"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: Path) -> None:
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


@contextmanager
def _user_code(text: str, doing: str) -> Iterator[None]:
    """Turns whatever the user's code raises into one sentence; the cause stays attached."""
    try:
        yield
    except RNNGuardError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        fact = f"{doing} failed{origin(error)} with {type(error).__name__}: {said}."
        cure = "Correct that; `--debug` shows the traceback."
        if isinstance(error, SystemExit):
            cure = 'Put what a script does under `if __name__ == "__main__":`.'
        elif "relative import" in said:
            cure = "The file belongs to a package: write `package.module:attr` with `--app-dir`."
        raise bad_target(text, fact, cure) from error


def _call(target: Target, found: Any, *first: Any) -> Any:
    name = f"{target.place}:{'.'.join(target.names)}" if target.names else target.text
    if not callable(found):
        fact = f"a {type(found).__name__} cannot be called."
        raise bad_target(target.text, fact, f"Write `{name}`.")
    try:
        inspect.signature(found).bind(*first, *target.args, **target.kwargs)
    except ValueError:  # some callables written in C say nothing of their arguments
        pass
    except TypeError as error:
        parameters = list(inspect.signature(found).parameters.values())[len(first) :]
        needed = [p.name for p in parameters if p.default is p.empty and "VAR" not in p.kind.name]
        cure = f"Call it as `{name}({', '.join(f'{n}=...' for n in needed)})`."
        raise bad_target(target.text, f"it cannot be called so: {error}.", cure) from error
    with _user_code(target.text, "calling it"):
        return found(*first, *target.args, **target.kwargs)


def _choose(target: Target, app_dir: Path) -> Any:
    """The model of a module that is named alone: `model`, the only one built, or a factory."""
    from torch import nn

    if target.place.endswith(".py"):
        raise bad_target(target.text, "it does not say what in the file.", _meant(target))
    module = _load(target, app_dir)
    names = vars(module)
    # Without parameters it is a loss or an activation.
    built = [n for n, v in names.items() if isinstance(v, nn.Module) and list(v.parameters())]
    own = [n for n, v in names.items() if getattr(v, "__module__", "") == module.__name__]
    classes = [n for n in own if inspect.isclass(names[n]) and issubclass(names[n], nn.Module)]
    factories = [name for name in FACTORIES if callable(names.get(name))]
    for found in (["model"] if "model" in names else [], built, factories, classes):
        if len(found) == 1:
            return names[found[0]]
        if found:
            cure = f"Write one: {_listed([f'{target.place}:{name}' for name in found])}."
            raise bad_target(target.text, "it holds more than one model.", cure)
    cure = f"Name one: `{target.place}:NAME`."
    raise bad_target(target.text, "there is no model in it, nor a function to build one.", cure)


def _meant(target: Target) -> str:
    """The targets in a file, read from its source, since to run a script may be to train."""
    path = Path(target.place)
    names: list[str] = []
    if path.is_file():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        defined = [n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        names = [n for n in defined if n in FACTORIES] or [n for n in defined if n != "main"]
    name = names[0] if names else FACTORIES[0]
    return f"Did you mean `{path.stem}:{name}` or `{target.place}:{name}`?"


def _interpret(text: str, found: Any) -> dict[str, Any]:
    """A model, (model, inputs), (model, optimizer[, inputs]) or a dict, as arguments."""
    from torch import nn
    from torch.optim import Optimizer

    match found:
        case nn.Module():
            return {"model": found}
        case (nn.Module() as model, Optimizer() as optimizer):
            return {"model": model, "optimizer": optimizer}
        case (nn.Module() as model, Optimizer() as optimizer, inputs):
            return {"model": model, "optimizer": optimizer, "inputs": inputs}
        case (nn.Module() as model, inputs):
            return {"model": model, "inputs": inputs}
        case {"model": nn.Module()}:
            known = (*AUDIT_ARGUMENTS, *STABILIZE_ONLY)
            for name in found:
                if name not in known:
                    cure = _nearest(str(name), known, f"Known: {_listed(known)}.")
                    raise bad_target(text, f"{name!r} is not an argument of stabilize.", cure)
            return {name: found[name] for name in found if name in AUDIT_ARGUMENTS}
    cure = "Give the model, (model, inputs), (model, optimizer), (model, optimizer, inputs) or a "
    fact = f"it is a {type(found).__name__}, not a model: {reprlib.repr(found)}."
    raise bad_target(text, fact, f"{cure}dict of stabilize's arguments.")
