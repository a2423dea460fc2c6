"""The only place that changes a model or an optimizer; every verb logs its way back first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.errors import Refusal, RefusedError, RewriteError, UndoError, refuse
from rnnguard.probe.snapshot import same_bits
from rnnguard.records import TIERS, Tier
from rnnguard.rewrite.footprint import Footprint
from rnnguard.rewrite.requirements import (
    adoption_faults,
    adoption_refusals,
    check_names,
    check_shape,
    given_back,
    group_of,
    lists_without,
    retyping_refusals,
)
from rnnguard.rewrite.stepguard import GuardSettings, StepGuard, guard_of
from rnnguard.rewrite.undolog import InTheWay, Inverse, UndoLog

Options = dict[str, Any]


class Edit:
    """The changes made to one model and its optimizer, with the way back from each.

    A verb that finds everything as it should be does nothing and logs nothing.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model = model
        self._optimizer = optimizer
        self._footprint = Footprint(model)
        self._log = UndoLog(self._footprint)
        self._first: dict[int, tuple[Tensor, Tensor]] = {}
        """Each written tensor with the values that it had at first."""
        self.added: list[tuple[nn.Module, tuple[nn.Module, ...]]] = []
        """Each module that was morphed, with its new children, those taken back among them."""

    def write_(self, param: Tensor, value: Tensor) -> None:
        """Gives `param` the values of `value` in its own dtype; its stale gradient goes."""
        check_shape(param, value)
        if same_bits(param, value.to(param)):
            return
        old, gradient = param.detach().clone(), param.grad

        def inverse() -> None:
            param.detach().copy_(old)
            # The model may have moved to another device since.
            param.grad = None if gradient is None else gradient.to(param.device)

        name = self._footprint.name(param)
        self._log.append(Inverse(inverse, "values", name, "the written value"))
        self._first.setdefault(id(param), (param, old))
        # Not through .data: the backward pass of a graph in flight must raise, not go wrong.
        # Not in a no_grad block: an interrupt at its end would leave gradients off for good.
        param.detach().copy_(value.detach())
        param.grad = None
        self._footprint.touch(param)

    def morph_(self, module: nn.Module, cls: type[nn.Module], **children: nn.Module) -> None:
        """Makes `module` a `cls` with these child modules; it stays the same object."""
        check_names(module, children)
        before, begun = type(module), False

        def inverse() -> None:
            nonlocal begun
            held = any(getattr(module, name, None) is child for name, child in children.items())
            # With the children in its place, the old class is one that the module was baked to.
            if type(module) is not cls and (type(module) is not before or (held and not begun)):
                raise InTheWay(f"the module has become a {type(module).__name__} since")
            begun = True
            module.__class__ = before
            for name, child in children.items():
                if getattr(module, name, None) is child:
                    delattr(module, name)

        self.added.append((module, tuple(children.values())))
        what = f"the class {cls.__name__}"
        self._log.append(Inverse(inverse, "structure", self.path_of(module), what))
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

    def bake_(self, module: nn.Module, plain: type[nn.Module], hook: nn.Module) -> None:
        """Makes `module` torch's own `plain` again; `hook` does what its class did on top."""
        before = type(module)

        def inverse() -> None:
            if type(module) is not plain and type(module) is not before:
                raise InTheWay(f"the module has become a {type(module).__name__} since")
            module.__class__ = before
            for key in [key for key, known in module._forward_hooks.items() if known is hook]:
                del module._forward_hooks[key]

        path = self.path_of(module)
        self._log.append(Inverse(inverse, "structure", path, f"the class {plain.__name__}"))
        module.__class__ = plain
        # Before all other hooks, as it was part of the forward that came before them.
        module.register_forward_hook(hook, prepend=True)

    def adopt_(self, params: Mapping[str, nn.Parameter], like: nn.Parameter) -> None:
        """Lets the optimizer train `params` in the group that holds `like`, if one does."""
        home = group_of(self._optimizer, like)
        if home is None:
            return
        optimizer = self._present_optimizer()
        refuse(adoption_refusals(optimizer))
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        new = {name: param for name, param in params.items() if id(param) not in held}
        if not new:
            return

        remaining: list[tuple[list[Any], list[Any]]] = []

        def inverse() -> None:
            if adoption_refusals(optimizer):
                raise InTheWay("LBFGS has taken a step with them")
            # Known before the first list is cut, since names go by the place of their parameter.
            if not remaining:
                remaining[:] = lists_without(optimizer, {id(param) for param in new.values()})
            for held, kept in remaining:
                held[:] = kept
            remaining.clear()
            for param in new.values():
                optimizer.state.pop(param, None)

        what = f"the training of {', '.join(new)}"
        self._log.append(Inverse(inverse, "structure", "", what))
        # In place: a new group breaks schedulers, and LBFGS keeps an alias of the list.
        home["params"].extend(new.values())
        if "param_names" in home:
            home["param_names"].extend(new)

    def hook_(self, settings: GuardSettings) -> StepGuard:
        """The optimizer's one guard, which now does what `settings` ask for as well."""
        optimizer = self._present_optimizer()
        present = guard_of(optimizer)
        guard = StepGuard(GuardSettings()) if present is None else present
        earlier, asked = guard.settings, guard.settings.merged(settings)
        if present is not None and asked == earlier:
            return guard

        def inverse() -> None:
            try:
                guard.settings = given_back(guard.settings, asked, earlier)
            except RefusedError as senseless:
                raise InTheWay("a later request to the guard rests on it") from senseless
            if guard.settings == GuardSettings():
                guard.remove(optimizer)

        self._log.append(Inverse(inverse, "step"))
        guard.settings = asked
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
        refuse(retyping_refusals(optimizer, cls))
        # torch makes `step` call hooks class by class, when a first instance is built.
        build: Callable[..., Optimizer] = cls
        defaults = build([torch.zeros(1, device="cpu")]).defaults
        new = {key: value for key, value in defaults.items() if key not in optimizer.defaults}
        if "decoupled_weight_decay" in defaults:
            new["decoupled_weight_decay"] = defaults["decoupled_weight_decay"]

        def inverse() -> None:
            if type(optimizer) is not cls and type(optimizer) is not before:
                raise InTheWay(f"the optimizer has become a {type(optimizer).__name__} since")
            optimizer.__class__ = before

        self._log.append(Inverse(inverse, "step"))
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
        """Takes back all that was done after `mark`, newest first.

        Raises UndoError (RG917) where something fails; the rest is taken back all the same.
        """
        if failures := self._log.take_back_(self._log.since(mark)):
            raise UndoError(*failures)

    def undo_(self, *, structure: bool = False) -> tuple[Refusal, ...]:
        """Takes everything back, except what training has built on since; gives what stays.

        As soon as one written tensor or one tensor of a morphed module differs by a bit, the
        written values stay, and so do classes and adopted parameters unless `structure` asks
        for them. Raises UndoError (RG917) with what stays unless `structure` is set. A second
        call changes nothing.
        """
        changed = self._footprint.changed()
        goes: tuple[Tier, ...] = ("step", "structure") if structure else ("step",)
        goes = goes if changed else TIERS
        failures = self._log.take_back_(self._log.since(0, *goes))
        why = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if changed[3:] else "")
        kept = [inverse for inverse in self._log.since(0) if inverse.tier not in goes]
        staying = [inverse.stays(why) for inverse in kept]
        reasons = (*staying, *failures)
        if reasons and not structure:
            raise UndoError(*reasons)
        return reasons

    def made_no_difference(self) -> bool:
        """Whether all that was done since the start has left every bit as it was."""
        written = len(self._log.since(0, "values")) == len(self._log)
        return written and all(same_bits(param, old) for param, old in self._first.values())

    def check_commit(self) -> None:
        """Raises RewriteError (RG916) where the optimizer does not train what was added."""
        if self._optimizer is None:
            return
        faults: list[Refusal] = []
        for module, children in self.added:
            present = [child for child in children if any(child is c for c in module.children())]
            if present:
                faults += adoption_faults(self._optimizer, module, present)
        if faults:
            raise RewriteError(*faults)

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

        self._log.append(Inverse(inverse, "step"))
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

        self._log.append(Inverse(inverse, "step"))
        for param in lacking:
            state = optimizer.state.get(param, {})
            if "exp_avg_sq" in state:
                state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
