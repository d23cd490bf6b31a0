"""The base's output by itself: forward hooks that leave the movement of W out wherever its branch takes no part.

W moves for the branch that trains. Whoever shares it (a reference model with the adapter disabled, another adapter, a
row of a batch that asks for another one) computes with a W that is not the base:

    W x - (W - W0) x  =  W0 x,        W - W0 = sum_k coef_k A_k B_k

The displacement is a product of low rank, so the difference costs two thin products for each term, and W is not
touched.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaopt import compiled
from deltaopt.factors import Factor, FactorSource, TensorSource
from deltaopt.layer_output import TIED, Further, forward_of, forward_with, output_problem, product_on, stood_in_for
from deltaopt.layouts import MatrixView
from deltaopt.lowrank import Term
from deltaopt.movement import CopiedMovement, FollowedMovement, Movement, RunningMovement, copied, is_shared
from deltaopt.pickled import IfInstalled
from deltaopt.scaling import holder_of
from deltaopt.sharding import is_sharded
from deltaopt.split_output import is_whole, mask_of, split_change, split_problem

Absence: TypeAlias = "bool | list[int]"
"""Where a branch takes no part: nowhere (False), in all rows of the batch (True), or in these rows."""

NEEDS_THE_BASE = (
    "its W has moved for a branch that takes no part in this forward pass, so that the base's output is needed"
)

WAYS_OUT = (
    'build the optimizer with keep_base="cpu" or "device", or with weight_update="folded", which does not write W '
    "where the product A @ B is zero at start_step"
)

TIED_WAY_OUT = "leave this layer out of target_modules"

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Hook = TypeVar("Hook", bound="OutputHook")


class OutputHook:
    """A forward hook that leaves the movement of one W out of a module's output, where its branch takes no part.

    A module has one for each branch that moves its W. It is copied with the module: the copy of a W keeps the movement
    that it had.

    Args:
        module: which the hook is put on.
        branch: what tells the branches of one module apart.
        view: of W.
        label: names the layer in messages.

    Attributes:
        movement: of W; None before an optimizer is built.
        problem: why the output cannot be computed from the displacement; None if it can.
        tied: True if W is used in another place too, which no hook on this module corrects.
        in_weight: True if W holds the movement; else it is one that W is to be given for a while.
        own_arguments: names of arguments of a forward pass of the module that do not reach the forward pass with W.
    """

    in_weight = True
    own_arguments: frozenset[str] = frozenset()

    def __init__(self, module: nn.Module, branch: object, view: MatrixView, label: str) -> None:
        self.module = module
        self.branch = branch
        self.label = label
        self.movement: Movement | None = None
        self.problem: str | None = None
        self.tied = False
        self._view = view
        self._first = _first_parameter(module)
        self._shared = False  # a copy that has W in common with the original, and no part in moving it
        self._key = compiled.enroll(self)
        self._handles: list[RemovableHandle] = []

    # What kinds of modules differ in.

    def absence(self, module: nn.Module, arguments: Mapping[str, Any]) -> Absence:
        """Tell where the branch takes no part in a forward pass of `module` with these keyword arguments."""
        raise NotImplementedError("a hook has to say when its branch takes no part")

    def holder(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Return the module whose weight W is, and the name that W has there."""
        raise NotImplementedError("a hook has to say whose weight W is")

    def adds_nothing(self, module: nn.Module) -> bool:
        """Tell if the output is that of W alone, when the branch takes no part."""
        return True

    # The hook.

    def register(self) -> list[RemovableHandle]:
        """Register with the module, before the hooks of others: what these add to the output is no movement of W."""
        return [self.module.register_forward_hook(self, with_kwargs=True, prepend=True)]

    def put_on(self) -> None:
        """Put the hook on its module."""
        self._handles = self.register()
        compiled.renew_graphs(self.module)

    def attend(self) -> None:
        """Attend to what has happened to the module since the last event of the optimizer."""

    def take_off(self) -> None:
        """Remove the hook from its module."""
        for handle in self._handles:
            handle.remove()

    def is_on(self) -> bool:
        """Tell if the hook is still where it was put."""
        return any(hook is self for hook in self.module._forward_hooks.values())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Correct the output of a forward pass; torch calls this after it."""
        absence = self._shared or self.absence(module, kwargs)
        if absence is not True:
            self.look(module)
        if absence is False or (torch.compiler.is_exporting() and not self._moves_in_export()):
            return None
        x, further = self._split(args, kwargs)
        rows = absence if isinstance(absence, list) else None
        if not torch.compiler.is_compiling():
            return self._corrected(module, output, x, rows, further)
        if any(further):  # the operation has no place for them
            return torch.compiler.disable(self._corrected)(module, output, x, rows, further)
        return compiled.corrected(output, x, self._key, rows)

    def look(self, module: nn.Module) -> None:
        """Warn in evaluation if W does not belong to A and B; in training the next step does. No graph does it."""
        if torch.compiler.is_compiling() or module.training or not isinstance(self.movement, RunningMovement):
            return
        self.movement.look()

    def _moves_in_export(self) -> bool:
        """Refuse to leave out a movement in an exported program; return False if there is none."""
        if self.movement is None or not self.movement.moved():
            return False
        raise RuntimeError(
            f"{self.label}: {NEEDS_THE_BASE}, which an exported program would look up in a process that does not have "
            "it: export and save within optimizer.base_weights(), or export the model that unload() returns"
        )

    def corrected(self, output: Tensor, x: Tensor, rows: list[int] | None) -> Tensor:
        """Return the output without the movement of W, in these rows; None for all rows."""
        return self._corrected(self.module, output, x, rows)

    def pulled_back(self, grad: Tensor, x: Tensor, rows: list[int] | None) -> Tensor:
        """Return the gradient that x gets by what `corrected` adds to the output."""
        owner, name = self.holder(self.module)
        if is_sharded(getattr(owner, name)):
            raise RuntimeError(
                f"{self.label}: {NEEDS_THE_BASE}, and its gradient cannot be computed in a compiled graph: its W is "
                "split over several ranks (tensor parallelism). Run this pass within optimizer.base_weights(), or "
                "without torch.compile"
            )
        pulled = torch.zeros_like(x)
        chosen = slice(None) if rows is None else rows
        grad = grad[chosen]

        def change(part: Tensor) -> Tensor:
            found = self._change(self.module, part)
            return torch.zeros_like(grad) if found is None else found.to(grad.dtype)

        # Within an operation of a compiled graph `torch.autograd` is switched off, and transforms are not.
        pull = torch.func.vjp(change, x[chosen])[1]
        (pulled[chosen],) = pull(grad)
        return pulled

    def _split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Further]:
        """Return the input of a forward pass, and the arguments after it."""
        named = {name: value for name, value in kwargs.items() if name not in self.own_arguments}
        if args:
            return args[0], (args[1:], named)
        first = self._first if self._first in named else next(n for n, v in named.items() if isinstance(v, Tensor))
        return named.pop(first), ((), named)

    def _corrected(
        self, module: nn.Module, output: Tensor, x: Tensor, rows: list[int] | None, further: Further = ((), {})
    ) -> Tensor:
        owner, name = self.holder(module)
        W = getattr(owner, name)
        if is_sharded(W) and not (self._is_at_rest(W) and is_whole(output, x, W, self._view, module)):
            return self._corrected_part(module, W, output, x, rows)
        if rows is not None:  # further arguments may have rows of their own, or none
            change = self._change(module, x, further) if any(further) else self._change(module, x[rows])
            change = change[rows] if any(further) and change is not None else change
            return output if change is None else output.index_copy(0, *_rows(output, rows, change))
        base = self._base(module)
        if base is not None and self.adds_nothing(module):
            return forward_with(*self.holder(module), base, x, further).to(output.dtype)
        change = self._change(module, x, further)
        return output if change is None else _sum(output, change)

    def _corrected_part(self, module: nn.Module, W: Tensor, output: Any, x: Tensor, rows: list[int] | None) -> Tensor:
        """Return what is here of the output of a layer that tensor parallelism has split, corrected."""
        terms = self._terms(module)
        if not terms:
            return output  # type: ignore[no-any-return]
        problem = self.problem or split_problem(output, x, W, self._view, module, self._is_at_rest(W))
        if problem is not None:
            raise RuntimeError(
                f"{self.label}: {NEEDS_THE_BASE}, and it cannot be computed: {problem}. Run this pass within "
                'optimizer.base_weights(), with keep_base="cpu" or "device" where W has 16 bits'
            )
        change = split_change(output, x, W, _minus(terms), self._view)
        return _sum(output, change if rows is None else change * mask_of(rows, change))

    def _is_at_rest(self, W: Tensor) -> bool:
        """Tell if W is the tensor that is there between forward passes, too."""
        return isinstance(self.movement, RunningMovement) and self.movement.state.has_found(W)

    def _change(self, module: nn.Module, x: Tensor, further: Further = ((), {})) -> Tensor | None:
        """Return what has to be added to the output for x; None if that is nothing."""
        owner, name = self.holder(module)
        base = self._base(module)
        if base is not None:
            return forward_with(owner, name, base, x, further) - forward_of(owner, getattr(owner, name), x, further)
        terms = self._terms(module)
        if not terms:
            return None
        if isinstance(self.movement, RunningMovement):
            self.movement.look_at_base()
        if self.problem is not None:
            raise RuntimeError(
                f"{self.label}: {NEEDS_THE_BASE}, and it cannot be computed: {self.problem}. Run this pass within "
                f"optimizer.base_weights(); or {WAYS_OUT}"
            )
        return product_on(owner, getattr(owner, name), x, _minus(terms), self._view)

    def _base(self, module: nn.Module) -> Tensor | None:
        """Return the copy of the base, if W has moved; of all of W, and nobody else has moved it since."""
        movement = self._movement_of(module)
        if movement is None or not self._view.moves_all or self.others_that_moved(module):
            return None
        return movement.base()

    def others_that_moved(self, module: nn.Module) -> list[OutputHook]:
        """Return the hooks of other branches of the module for which W has moved too."""
        hooks = (hook for hook in module._forward_hooks.values() if isinstance(hook, OutputHook) and hook is not self)
        return [hook for hook in hooks if hook.in_weight and hook.movement is not None and hook.movement.moved()]

    def _terms(self, module: nn.Module) -> Sequence[Term]:
        """Return terms that add up to what W has moved by; empty if it has not."""
        movement = self._movement_of(module)
        return () if movement is None else movement.terms()

    def _movement_of(self, module: nn.Module) -> Movement | None:
        """Return the movement of W, if there is any.

        Raises:
            RuntimeError: if the output cannot be corrected by it.
        """
        movement = self.movement
        if movement is None or not movement.moved():
            return None
        if self.tied:
            raise RuntimeError(
                f"{self.label}: {NEEDS_THE_BASE}, and {TIED}. Run this pass within optimizer.base_weights(), or "
                f"{TIED_WAY_OUT}"
            )
        owner, name = self.holder(module)
        if (problem := movement.problem(self._view.part(stood_in_for(getattr(owner, name))))) is not None:
            raise RuntimeError(f"{self.label}: {NEEDS_THE_BASE}, and {problem}")
        return movement

    # Copies.

    def not_copied(self) -> dict[str, Any]:
        """Return the attributes that belong to this very hook, as a copy has them."""
        return {"_handles": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputHook:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, movement=None)
        twin._key = compiled.enroll(twin)
        twin.__dict__.update(self.not_copied())
        twin.module, twin.branch = deepcopy(self.module, memo), deepcopy(self.branch, memo)
        if self.movement is not None:
            shared = is_shared(self.movement, memo)
            twin._shared |= shared and self.in_weight
            twin.movement = self.movement if shared else self._copied_movement()
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        movement = None if self.movement is None else self._copied_movement()
        moved = () if movement is None else movement.record()
        state = {**self.__dict__, **self.not_copied(), "movement": None, "_key": None, "_view": tuple(self._view)}
        kind = f"{type(self).__module__}:{type(self).__qualname__}"
        # Where this package is missing, `partial` makes a hook of the first argument, which does nothing.
        return IfInstalled(__name__, "unpickled", partial), (nullcontext().__exit__, kind, state, moved)

    def _copied_movement(self) -> CopiedMovement:
        assert self.movement is not None
        owner, name = self.holder(self.module)
        return copied(self.movement, self._view.part(getattr(owner, name)))


class ModuleHook(OutputHook):
    """The hook of a branch that was registered by hand, on the module whose weight W is.

    Args:
        owner: the module.
        name: of W there.
        is_active: tells if the branch takes part in the forward pass that has just run.
        branch: what tells the branches of one module apart.
        view: of W.
        label: names the layer in messages.

    Attributes:
        is_active: as given.
    """

    def __init__(
        self, owner: nn.Module, name: str, is_active: Callable[[], bool], branch: object, view: MatrixView, label: str
    ) -> None:
        super().__init__(owner, branch, view, label)
        self._name = name
        self.is_active = is_active

    @classmethod
    def on(
        cls, W: TensorSource, is_active: Callable[[], bool], branch: FactorSource, view: MatrixView, label: str
    ) -> ModuleHook:
        """Put a hook on the module of W, or return the one that an earlier triple of this branch has put there.

        Args:
            W: what the triple's W was registered as.
            is_active: tells if the branch takes part in the forward pass that has just run.
            branch: what the triple's A was registered as.
            view: of W.
            label: names the layer in messages.

        Raises:
            ValueError: if a product of W and x is not all of the output, or the module rewrites W.
            TypeError: if `is_active` is no function, or W a tensor.
        """
        if not callable(is_active):
            raise TypeError(f"{label}: is_active is a function without arguments, got {is_active!r}")
        if isinstance(W, Tensor):
            raise TypeError(
                f"{label}: is_active needs the module whose output is to be corrected, and W is a tensor: "
                'register ((module, "weight"), A, B)'
            )
        owner, name = holder_of(*W)
        way_out = "use optimizer.base_weights() where the branch is off"
        if view.layout.endswith("experts") or (view.layout == "conv" and not view.moves_all):
            raise ValueError(
                f"{label}: is_active is not for the layout {view.layout!r}"
                f"{' with rows' if view.layout == 'conv' else ''}, whose output is no product of W and x alone: "
                f"{way_out}"
            )
        if view.layout == "conv" and not isinstance(owner, CONVOLUTIONS):
            raise ValueError(
                f"{label}: is_active is not for the layout 'conv' of a {type(owner).__name__}, whose stride and "
                f"padding are not known: derive it from nn.Conv1d, nn.Conv2d or nn.Conv3d, or {way_out}"
            )
        if getattr(owner, "max_norm", None) is not None:
            raise ValueError(
                f"{label}: is_active is not for an embedding with max_norm, which rewrites rows of W in each "
                f"forward pass: {way_out}"
            )
        hook = hook_of(owner, cls, branch)
        if hook is None:
            hook = cls(owner, name, is_active, branch, view, label)
            hook.put_on()
        hook.is_active = is_active
        return hook

    def absence(self, module: nn.Module, arguments: Mapping[str, Any]) -> Absence:
        """Ask the user's function."""
        return not self.is_active()

    def holder(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Return the module itself."""
        return module, self._name

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputHook:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, ModuleHook)
        twin.is_active = deepcopy(self.is_active, memo)  # a method of the copied model, for one of this model
        return twin


class SharerHook(OutputHook):
    """The hook of a module of another model that has the same W, and no part in moving it.

    Args:
        owner: the module.
        name: of W there.
        first: the hook on the layer whose branch moves W.
    """

    def __init__(self, owner: nn.Module, name: str, first: OutputHook) -> None:
        super().__init__(owner, first, first._view, f"a {type(owner).__name__} that shares the W of {first.label}")
        self.problem = output_problem(owner, first._view)
        self.movement = FollowedMovement(first)
        self._name = name

    def absence(self, module: nn.Module, arguments: Mapping[str, Any]) -> Absence:
        """Return True: the branch is in another model."""
        return True

    def holder(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Return the module itself."""
        return module, self._name

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputHook:
        memo.setdefault(id(self.branch), self.branch)  # of the other model, which is not to be copied with this one
        return super().__deepcopy__(memo)

    def __reduce__(self) -> tuple[Any, ...]:
        kind, (instead, name, state, moved) = super().__reduce__()
        return kind, (instead, name, {**state, "branch": None}, moved)


def unpickled(instead: object, kind: str, state: dict[str, Any], moved: tuple[Any, ...]) -> OutputHook:
    """Return the hook of a module that is unpickled.

    Args:
        instead: what takes its place where this package is not installed.
        kind: module and name of its class.
        state: its attributes.
        moved: the record of its movement; empty if it has none.
    """
    module, _, name = kind.partition(":")
    cls = getattr(importlib.import_module(module), name)
    hook: OutputHook = cls.__new__(cls)
    hook.__dict__.update(state, _view=MatrixView(*state["_view"]), _key=compiled.enroll(hook))
    if moved:
        hook.movement = CopiedMovement.of_record(*moved)
    return hook


def hook_of(module: nn.Module, kind: type[Hook], branch: object) -> Hook | None:
    """Return the hook of this kind that a module has for a branch; None if there is none."""
    for hook in module._forward_hooks.values():
        if isinstance(hook, kind) and _is_same(hook.branch, branch):
            return hook
    return None


def subtract_always(
    owner: nn.Module, W: Tensor, view: MatrixView, terms: Sequence[Term], label: str
) -> RemovableHandle:
    """Let the module of a W give W x minus the product of the terms and x, until the handle is removed."""
    return owner.register_forward_hook(_Subtraction(owner, W, view, terms, label), with_kwargs=True, prepend=True)


class _Subtraction:
    """The hook of `subtract_always`. A deep copy of the model keeps it, and so computes with the base for good."""

    def __init__(self, owner: nn.Module, W: Tensor, view: MatrixView, terms: Sequence[Term], label: str) -> None:
        self._W, self._view, self._terms, self._label = W, view, terms, label
        self._name = next((name for name, p in owner.named_parameters(recurse=False) if p is W), None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        W = self._W if self._name is None else getattr(module, self._name)  # FSDP2 brings all of it for this pass
        if not is_sharded(W):
            return _sum(output, product_on(module, self._W, x, _minus(self._terms), self._view))
        if (problem := split_problem(output, x, W, self._view, module, W is self._W)) is not None:
            raise RuntimeError(
                f"{self._label}: the base's output cannot be computed: {problem}. Take base_weights(method='copy'), "
                'with keep_base="cpu" or "device" where W has 16 bits'
            )
        return _sum(output, split_change(output, x, W, _minus(self._terms), self._view))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Subtraction:
        return self  # as a function would be

    def __reduce__(self) -> tuple[Any, ...]:
        raise RuntimeError(
            "a model cannot be pickled while base_weights() corrects the output of its layers by hooks, as W itself "
            "has moved: leave it first, or use base_weights(method='copy') with keep_base or source"
        )


def _minus(terms: Sequence[Term]) -> Sequence[Term]:
    """Return minus the sum of the terms, which takes no pass over an output."""
    return [term._replace(coef=-term.coef) for term in terms]


def _rows(output: Tensor, rows: list[int], change: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of these rows, and what stands in them after the change."""
    index = torch.tensor(rows, device=output.device)
    return index, _sum(output[index], change)


def _is_same(one: object, other: object) -> bool:
    """Compare two names, or two sources of a tensor or a factor."""
    if isinstance(one, Factor):
        return one.is_same(other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return all(map(_is_same, one, other))
    return one is other or (isinstance(one, str) and one == other)


def _sum(output: Tensor, change: Tensor) -> Tensor:
    """Add in the wider dtype, and round once."""
    return (output.to(torch.promote_types(output.dtype, change.dtype)) + change).to(output.dtype)


def _first_parameter(module: nn.Module) -> str | None:
    """Return the name of the first argument of a module's forward pass."""
    own: Any = type(module)
    return next(islice(inspect.signature(own.forward).parameters, 1, None), None)
