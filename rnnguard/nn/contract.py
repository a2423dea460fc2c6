"""What every module of rnnguard.nn says where it cannot do what torch's own would."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NoReturn

from torch import nn

from rnnguard.errors import Refusal, RefusedError, RNNGuardWarning


def is_ours(module: nn.Module) -> bool:
    """Whether the module's class is one of rnnguard.nn, which a rewrite may have put there."""
    return type(module).__module__.startswith(f"{__package__}.")


def redraw_own(module: nn.RNNBase) -> None:
    """Torch's own draw for torch's own parameters; those of children stay."""
    reach = module.hidden_size**-0.5
    for weight in module.parameters(recurse=False):
        nn.init.uniform_(weight, -reach, reach)


def refuse_script(module: nn.Module) -> NoReturn:
    """What torch.jit.script is told; its own error would name an annotation."""
    fact = f"torch.jit.script cannot compile this {type(module).__name__}."
    cure = "Use torch.jit.trace, torch.export or torch.onnx.export."
    raise RefusedError.of("RG923", "", fact, cure)


def warn_of_older_checkpoint(prefix: str, added: Iterable[str]) -> None:
    """Tells why the keys of the children `added` are missing, beside torch's own error.

    Not an error, since torch does not say here whether the load is a strict one.
    """
    names = " and ".join(f"`{name}`" for name in added)
    if not names:
        return
    fact = f"the checkpoint is from before the rewrite, which has added {names}."
    cure = (
        "Load it into the plain model (`report.undo(structure=True)` gives it back), or "
        "with `strict=False` to keep what was added as it is."
    )
    said = str(Refusal("RG915", prefix.removesuffix("."), fact, cure))
    warnings.warn(said, RNNGuardWarning, stacklevel=3)
