"""The arguments of `rnnguard.audit` that settings stand for; loading them runs the user's code."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from rnnguard import targets
from rnnguard.decision.settings import COMMAND_LINE, Settings
from rnnguard.settings_file import home_of

NAMED = ("data", "inputs", "loss", "step", "train_step", "optimizer")


def arguments_of(settings: Settings, app_dir: Path | None = None) -> dict[str, Any]:
    """What the target gives, under what the command line says, over what a file says.

    Targets of a file are found from its own folder. `rules` end with the settings themselves.
    """
    import numpy
    import torch

    if settings.target is None:
        cure = "Name one, or set `target` in [tool.rnnguard]."
        raise targets.bad_target("TARGET", "no target is named.", cure)
    seed = settings.seed or 0
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    arguments = targets.audit_arguments(*_placed(settings, "target", app_dir))
    for name in NAMED:
        if getattr(settings, name) and (name not in arguments or _was_said(settings, name)):
            text, folder = _placed(settings, name, app_dir)
            arguments[name] = _loaded(name, text, folder, arguments["model"])
    for name in ("memory", "trial", "seed"):
        value = getattr(settings, name)
        if value is not None and (name not in arguments or _was_said(settings, name)):
            arguments[name] = value
    more = arguments.get("rules") or ()
    more = [more] if isinstance(more, str | Path) else list(more)
    return {"seed": seed} | arguments | {"rules": [*more, settings]}


def _was_said(settings: Settings, name: str) -> bool:
    return settings.origins.get(name) == COMMAND_LINE


def _loaded(name: str, text: str, folder: Path, model: Any) -> Any:
    if name == "optimizer":
        return targets.load_optimizer(text, folder, model)
    return targets.load_value(text, folder, from_function=name in ("data", "inputs"))


def _placed(settings: Settings, key: str, app_dir: Path | None) -> tuple[str, Path]:
    """A target and the folder where its module is found; files as seen from that folder."""
    text, home = str(getattr(settings, key)), home_of(settings, key)
    if home is None:
        return text, app_dir or Path()
    is_file = ".py" in text and targets.parse(text).place.endswith(".py")
    return str(home / text) if is_file else text, app_dir or home
