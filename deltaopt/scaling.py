"""The scaling of a branch: where the number is, how it is read, compared and set."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy, deepcopy
from operator import attrgetter
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from deltaopt.plain import as_float

ScalingSource: TypeAlias = "float | Tensor | tuple[nn.Module, str]"
"""A number, a 0-d tensor, or a module and the dotted name of an attribute that is one of these."""
SetScaling: TypeAlias = Callable[[float], object]


class BranchScaling:
    """The place of one branch's scaling.

    Args:
        source: the number itself, which cannot be set; a 0-d tensor, or ``(module, "attribute.path")``, which the
            forward pass multiplies by.
        setter: sets the number in another way.
        label: names the layer in messages.

    Attributes:
        first: the number when this object was made.
        folded: the update_ratio that was folded into the branch since.

    Raises:
        ValueError, TypeError: if it is no number, or one that is zero or not finite.
    """

    def __init__(self, source: ScalingSource, setter: SetScaling | None, label: str) -> None:
        if isinstance(source, tuple) and not (
            len(source) == 2 and isinstance(source[0], nn.Module) and isinstance(source[1], str)
        ):
            raise TypeError(f"{label}: scaling is a number, a 0-d tensor or (module, 'attribute.path'), got {source!r}")
        if setter is not None and not callable(setter):
            raise TypeError(f"{label}: set_scaling is a function of the new scaling, got {setter!r}")
        self._source = source
        self._setter = setter
        self._label = label
        self.folded = 0.0
        try:
            self.first = checked_scaling(self._number(label), label)
        except AttributeError as error:
            raise ValueError(f"{label}: its scaling is not where it was registered: {error}") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> BranchScaling:
        if isinstance(self._setter, FunctionType):
            raise TypeError(
                f"{self._label}: set_scaling is a plain function, which knows its layer by itself, so that a copy "
                "would set the scaling of the original's layer: give a method of the layer, "
                "functools.partial(function, layer), or scaling=(module, 'attribute'), which are copied with it"
            )
        twin = copy(self)
        memo[id(self)] = twin
        twin._source, twin._setter = deepcopy((self._source, self._setter), memo)
        return twin

    def problem(self) -> str | None:
        """Say why the scaling cannot be set; None if it can."""
        if self._setter is not None or isinstance(self._source, Tensor):
            return None
        if isinstance(self._source, tuple):
            holder, name = holder_of(*self._source)
            found = getattr(type(holder), name, None)
            if not isinstance(found, property) or found.fset is not None:
                return None
            return (
                f"its scaling is {self._source[1]}, a property of {type(holder).__name__} that cannot be set: "
                "register the attribute that it is made from, or a function set_scaling="
            )
        return (
            'its scaling is a number that cannot be set, and weight_update="folded" has to multiply it by '
            '1 + update_ratio: register where the forward pass takes it from, scaling=(module, "attribute") or a 0-d '
            'tensor, or a function set_scaling=; or use weight_update="in_place"'
        )

    def place(self) -> object:
        """Return a value that is equal for branches that take their scaling from one place."""
        if isinstance(held := self._held(), Tensor):
            return id(held)
        if isinstance(self._source, tuple):
            holder, name = holder_of(*self._source)
            return id(holder), name
        return id(self)

    def tensor(self) -> Tensor | None:
        """Return the tensor itself, where it was registered so."""
        return self._source if isinstance(self._source, Tensor) else None

    def module(self) -> nn.Module | None:
        """Return the module that the scaling was registered with, if one was."""
        return self._source[0] if isinstance(self._source, tuple) else None

    def is_stored(self) -> bool:
        """Tell if the scaling is a buffer that a state_dict of its module holds."""
        if not isinstance(self._source, tuple):
            return False
        holder, name = holder_of(*self._source)
        if not isinstance(holder, nn.Module):
            return False
        return name in holder._buffers and name not in holder._non_persistent_buffers_set

    def differs_from(self, expected: float) -> float | None:
        """Return what the branch multiplies by now, if that is another number than `expected`; else None.

        A plain number tells nothing of the branch, and reading a tensor on a device would wait for it: None.
        """
        if not isinstance(self._source, (Tensor, tuple)):
            return None
        now = self._held()
        tolerance = 1e-12
        if isinstance(now, Tensor):
            if now.device.type != "cpu":
                return None
            tolerance = max(tolerance, torch.finfo(now.dtype).eps)
        value = float(now)
        return None if math.isclose(value, expected, rel_tol=tolerance) else value

    def rounded(self, value: float) -> float:
        """Return what the branch would multiply by after `value` is set: a tensor has a dtype."""
        held = self._held() if self._setter is None and isinstance(self._source, (Tensor, tuple)) else None
        return float(torch.tensor(value, dtype=held.dtype, device="cpu")) if isinstance(held, Tensor) else value

    def set(self, value: float) -> None:
        """Let the branch multiply by `value`."""
        if self._setter is not None:
            self._setter(value)
        elif isinstance(held := self._held(), Tensor):
            held.detach().fill_(value)
        elif isinstance(self._source, tuple):
            setattr(*holder_of(*self._source), value)

    def _held(self) -> Any:
        if not isinstance(self._source, tuple):
            return self._source
        module, path = self._source
        return attrgetter(path)(module)

    def _number(self, label: str) -> Any:
        held = self._held()
        if not isinstance(held, Tensor):
            return held
        if held.dim() or held.requires_grad or not held.is_floating_point():
            raise ValueError(
                f"{label}: a scaling that is a tensor is 0-d, of floating point, and does not require grad, got "
                f"{held.dtype} of shape {tuple(held.shape)}, requires_grad={held.requires_grad}"
            )
        return float(held)


def checked_scaling(scaling: object, label: str) -> float:
    """Return a scaling as a float, or raise an error that names the layer."""
    number = as_float(scaling)
    if number is None:
        raise TypeError(f"{label}: scaling is a number (alpha / r), got {scaling!r}")
    if not math.isfinite(number) or number == 0:
        raise ValueError(f"{label}: scaling must be finite and not zero, got {scaling}")
    return number


def holder_of(module: nn.Module, path: str) -> tuple[Any, str]:
    """Return the object that has the attribute ``path`` of a module, and the attribute's own name there."""
    owner, _, name = path.rpartition(".")
    return (attrgetter(owner)(module) if owner else module), name
