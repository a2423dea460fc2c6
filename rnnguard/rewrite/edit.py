"""The only place that changes a model or an optimizer; every verb logs its way back first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from rnnguard.errors import Refusal, RefusedError, RewriteError, RNNGuardError, UndoError
from rnnguard.probe.snapshot import same_bits
from rnnguard.rewrite.footprint import Footprint
from rnnguard.rewrite.stepguard import GuardSettings, StepGuard, guard_of

Options = dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Inverse:
    """The way back from one verb; right also when the verb got only half-way."""

    run: Callable[[], None]
    path: str = ""
    stays: str | None = None
    """What stays, in words, where taking it back would destroy later training."""


class Edit:
    """The changes made to one model and its optimizer, with the way back from each.

    A verb that finds everything as it should be does nothing and logs nothing.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model = model
        self._optimizer = optimizer
        self._log: list[_Inverse] = []
        self._footprint = Footprint(model)

    def write_(self, param: Tensor, value: Tensor) -> None:
        """Gives `param` the values of `value` in its own dtype; its stale gradient goes."""
        if value.shape != param.shape:
            raise ValueError(f"a value of shape {tuple(value.shape)} for {tuple(param.shape)}")
        if same_bits(param, value.to(param)):
            return
        old, gradient, touched = param.detach().clone(), param.grad, self._footprint.saved()

        def inverse() -> None:
            param.detach().copy_(old)
            param.grad = gradient
            self._footprint.restore(touched)

        self._log.append(_Inverse(inverse, self._footprint.name(param), "the written value"))
        # Not through .data: the backward pass of a graph in flight must raise, not go wrong.
        # Not in a no_grad block: an interrupt at its end would leave gradients off for good.
        param.detach().copy_(value.detach())
        param.grad = None
        self._footprint.touch(param)

    def morph_(self, module: nn.Module, cls: type[nn.Module], **children: nn.Module) -> None:
        """Makes `module` a `cls` with these child modules; it stays the same object."""
        for name in children:
            if hasattr(module, name):
                raise ValueError(f"{type(module).__name__} has an attribute {name!r} already")
        before, touched = type(module), self._footprint.saved()

        def inverse() -> None:
            for name, child in children.items():
                if getattr(module, name, None) is child:
                    delattr(module, name)
            module.__class__ = before
            self._footprint.restore(touched)

        self._log.append(_Inverse(inverse, self.path_of(module), f"the class {cls.__name__}"))
        like = next(module.parameters(), None)
        for child in children.values():
            if like is not None:
                child.to(device=like.device, dtype=like.dtype)
            for part in child.modules():
                part.training = module.training
        module.__class__ = cls
        for name, child in children.items():
            module.add_module(name, child)
        self._footprint.touch_untouched(module.parameters())

    def adopt_(self, params: Mapping[str, nn.Parameter], like: nn.Parameter) -> None:
        """Lets the optimizer train `params` in the group that holds `like`, if one does."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        home = next((g for g in groups if any(p is like for p in g["params"])), None)
        if home is None:
            return
        optimizer = self._present_optimizer()
        if isinstance(optimizer, LBFGS) and optimizer.state:
            fact = "LBFGS has taken a step and cannot take up parameters any more."
            raise RefusedError.of("RG906", "", fact, "Stabilize before the first step.")
        held = {id(param) for group in groups for param in group["params"]}
        new = {name: param for name, param in params.items() if id(param) not in held}
        if not new:
            return

        def inverse() -> None:
            for group in optimizer.param_groups:
                _take_out_(group, {id(param) for param in new.values()})
            for param in new.values():
                optimizer.state.pop(param, None)

        self._log.append(_Inverse(inverse, "", f"the training of {', '.join(new)}"))
        # In place: a new group breaks schedulers, and LBFGS keeps an alias of the list.
        home["params"].extend(new.values())
        if "param_names" in home:
            home["param_names"].extend(new)

    def hook_(self, settings: GuardSettings) -> StepGuard:
        """The optimizer's one guard, which now does what `settings` ask for as well."""
        optimizer = self._present_optimizer()
        present = guard_of(optimizer)
        guard = StepGuard(settings) if present is None else present
        earlier = guard.settings
        if present is not None and earlier.merged(settings) == earlier:
            return guard

        def inverse() -> None:
            guard.settings = earlier
            if present is None:
                guard.remove(optimizer)

        self._log.append(_Inverse(inverse))
        guard.settings = earlier.merged(settings)
        if present is None:
            guard.install(optimizer)
        return guard

    def tune_(self, key: str, value: object) -> None:
        """Sets one option in every parameter group that has it."""
        optimizer = self._present_optimizer()
        if key == "amsgrad" and value:
            self._add_largest_moments_(optimizer)
        self._set_(lambda: [g for g in optimizer.param_groups if key in g], {key: value})

    def retype_(self, cls: type[Optimizer]) -> None:
        """Makes the optimizer a `cls` with its form of weight decay; options and state stay."""
        optimizer = self._present_optimizer()
        before = type(optimizer)
        if before is cls:
            return
        # Schedulers bind the step function that they find to the optimizer object.
        if "step" in vars(optimizer) and inspect.unwrap(cls.step) != inspect.unwrap(before.step):
            fact = f"a schedule has bound {before.__name__}.step to the optimizer."
            raise RefusedError.of("RG906", "", fact, "Build the schedule after stabilizing.")
        # torch makes `step` call hooks class by class, when a first instance is built.
        build: Callable[..., Optimizer] = cls
        defaults = build([torch.zeros(1, device="cpu")]).defaults
        new = {key: value for key, value in defaults.items() if key not in optimizer.defaults}
        if "decoupled_weight_decay" in defaults:
            new["decoupled_weight_decay"] = defaults["decoupled_weight_decay"]

        def inverse() -> None:
            optimizer.__class__ = before

        self._log.append(_Inverse(inverse))
        optimizer.__class__ = cls
        self._set_(lambda: [optimizer.defaults], new)
        self._set_(lambda: optimizer.param_groups, new)

    def path_of(self, module: nn.Module) -> str:
        """The first path that leads to the module; the model itself has none."""
        return next((path for path, known in self._model.named_modules() if known is module), "")

    def mark(self) -> int:
        """The present end of the log, to roll back to."""
        return len(self._log)

    def rollback_(self, mark: int = 0) -> None:
        """Takes back all that was done after `mark`, newest first."""
        self._take_back_(self._log[mark:])

    def undo_(self) -> None:
        """Takes everything back, except what training has built on since.

        Raises UndoError (RG917) that names what stays: as soon as one written tensor or
        one tensor of a morphed module differs by a bit, values, classes and adopted
        parameters stay, and only the optimizer's guard and options are taken back.
        A second call changes nothing.
        """
        changed = self._footprint.changed()
        if not changed:
            return self.rollback_()
        staying = [inverse for inverse in self._log if inverse.stays is not None]
        self._take_back_([inverse for inverse in self._log if inverse.stays is None])
        why = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if changed[3:] else "")
        cure = "Build the model anew to be without it."
        facts = [f"{inverse.stays} stays, since {why} changed afterwards." for inverse in staying]
        paths = [inverse.path for inverse in staying]
        reasons = [Refusal("RG917", *place, cure) for place in zip(paths, facts, strict=True)]
        raise UndoError(*reasons)

    def _take_back_(self, inverses: list[_Inverse]) -> None:
        failures: list[Exception] = []
        for inverse in reversed(inverses):
            try:
                inverse.run()
            except Exception as error:  # the others must be taken back all the same
                failures.append(error)
            self._log.remove(inverse)
        if failures:
            raise ExceptionGroup("some changes could not be taken back", failures)

    def _present_optimizer(self) -> Optimizer:
        if self._optimizer is None:
            raise ValueError("there is no optimizer to change")
        return self._optimizer

    def _set_(self, places: Callable[[], list[Options]], new: Options) -> None:
        """Updates option dicts; `places` finds them anew, since loading replaces groups."""
        olds = [{key: place[key] for key in new if key in place} for place in places()]
        if all(old == new for old in olds):
            return

        def inverse() -> None:
            for place, old in zip(places(), olds, strict=False):
                for key, value in new.items():
                    if key not in place or place[key] != value:
                        continue  # not reached, or chosen by the user since
                    if key in old:
                        place[key] = old[key]
                    else:
                        del place[key]

        self._log.append(_Inverse(inverse))
        for place in places():
            place.update(new)

    def _add_largest_moments_(self, optimizer: Optimizer) -> None:
        """Gives Adam's existing state what amsgrad reads: the largest second moment so far."""
        groups = [g for g in optimizer.param_groups if not g.get("amsgrad", True)]
        every = [param for group in groups for param in group["params"]]
        lacking = [p for p in every if "max_exp_avg_sq" not in optimizer.state.get(p, {})]
        if not lacking:
            return

        def inverse() -> None:
            for param in lacking:
                optimizer.state.get(param, {}).pop("max_exp_avg_sq", None)

        self._log.append(_Inverse(inverse))
        for param in lacking:
            state = optimizer.state.get(param, {})
            if "exp_avg_sq" in state:
                state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()


@contextmanager
def transaction(edit: Edit) -> Iterator[Edit]:
    """The edit, whose changes in this block are all kept or, after any exception, all undone.

    Raises RewriteError (RG916) from whatever was raised inside; errors of this
    package, KeyboardInterrupt and SystemExit pass through as they are.
    """
    mark = edit.mark()
    try:
        yield edit
    except BaseException as error:
        edit.rollback_(mark)
        if isinstance(error, RNNGuardError) or not isinstance(error, Exception):
            raise
        fact = f"{type(error).__name__} while rewriting: {error}."
        cure = "The model and optimizer were restored."
        raise RewriteError.of("RG916", "", fact, cure) from error


def _take_out_(group: Options, gone: set[int]) -> None:
    params, names = group["params"], group.get("param_names", [])
    for i in reversed(range(len(params))):
        if id(params[i]) in gone:
            del params[i]
            del names[i : i + 1]
