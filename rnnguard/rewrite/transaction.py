"""All changes of a block are kept, or after any exception all are taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from rnnguard.errors import Refusal, RewriteError, RNNGuardError, UndoError
from rnnguard.rewrite.edit import Edit


@contextmanager
def transaction(edit: Edit) -> Iterator[Edit]:
    """The edit, whose changes in this block are all kept or, after any exception, all undone.

    At the end the optimizer must train what was added. Raises RewriteError (RG916) from
    whatever was raised inside; errors of this package, KeyboardInterrupt and SystemExit pass
    through as they are. What could not be taken back is told too (RG917).
    """
    mark = edit.mark()
    # Tensors made in inference mode could never be trained.
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    try:
        with outside:
            yield edit
        edit.check_commit()
    except BaseException as error:
        lost, interrupt = rolled_back(edit, mark)
        if lost:
            error.add_note("\n".join(map(str, lost)))
        if interrupt is not None:
            raise interrupt from error
        if not isinstance(error, Exception) or (isinstance(error, RNNGuardError) and not lost):
            raise
        fact = f"{type(error).__name__} while rewriting: {error}."
        restored = "The model and optimizer were restored."
        cure = "Build model and optimizer anew." if lost else restored
        raise RewriteError(Refusal("RG916", "", fact, cure), *lost) from error


def rolled_back(edit: Edit, mark: int = 0) -> tuple[tuple[Refusal, ...], BaseException | None]:
    """What could not be taken back, and the interrupt that has waited until all else was."""
    interrupt: BaseException | None = None
    while True:
        try:
            edit.rollback_(mark)
            return (), interrupt
        except UndoError as failure:
            return failure.reasons, interrupt
        except (KeyboardInterrupt, SystemExit) as caught:
            interrupt = caught
