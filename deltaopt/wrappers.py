"""Finding the DeltaLoRAOptimizer within what other libraries wrap around an optimizer."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

from deltaopt.optimizer import DeltaLoRAOptimizer

PLACES = (
    *("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "inner_optimizer", "_inner_optimizer"),
    *("inner", "base", "opt", "optim"),
)
"""Attributes in which wrappers hold the optimizer that they wrap, the usual ones first."""


def unwrap(optimizer: Any) -> DeltaLoRAOptimizer:
    """Return the DeltaLoRAOptimizer within a wrapper of another library; the optimizer itself if it is one.

    Accelerate, Lightning, Fabric and DeepSpeed hand back an object of their own that holds the optimizer, and so do
    optimizers such as Lookahead that are built around another one. They step as ever; everything else that a
    `DeltaLoRAOptimizer` does is asked of what this function returns. Every function of this package that takes an
    optimizer calls it.

    Args:
        optimizer: a DeltaLoRAOptimizer, or what wraps one, at any depth.

    Raises:
        TypeError: if there is none within it, with what was looked at.

    Example:
        >>> import torch, deltaopt
        >>> W, A, B = torch.randn(4, 6), torch.zeros(4, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
        >>> class Wrapper:
        ...     def __init__(self, optimizer):
        ...         self.optimizer, self.step, self.zero_grad = optimizer, optimizer.step, optimizer.zero_grad
        >>> optimizer = deltaopt.DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1)
        >>> deltaopt.unwrap(Wrapper(optimizer)) is optimizer
        True
    """
    if _is_optimizer(optimizer):
        seen, kinds, waiting = {id(optimizer)}, list[str](), deque([optimizer])
        while waiting:
            candidate = waiting.popleft()
            if _is_ours(candidate):
                return candidate  # type: ignore[no-any-return]
            kinds.append(type(candidate).__name__)
            for held in _held_by(candidate):
                if id(held) not in seen and _is_optimizer(held):
                    seen.add(id(held))
                    waiting.append(held)
        raise TypeError(
            f"no DeltaLoRAOptimizer in this {kinds[0]} (looked at {', '.join(kinds)}): hand in the optimizer that "
            "trains the model, or what accelerate, Lightning or another library has wrapped around it"
        )
    raise TypeError(
        f"expected a DeltaLoRAOptimizer, or what wraps one, got {_described(optimizer)}: hand in the optimizer"
        f"{_way_to_it(optimizer)}"
    )


def _is_ours(candidate: Any) -> bool:
    # Lightning and Fabric derive the class of a wrapper from that of the optimizer, so isinstance does not tell.
    return isinstance(candidate, DeltaLoRAOptimizer) and "_weights" in vars(candidate)


def _is_optimizer(candidate: Any) -> bool:
    """Tell if it does what an optimizer does: a trainer has no `step`, a scheduler no `zero_grad`."""
    return not isinstance(candidate, type) and all(callable(_attribute(candidate, n)) for n in ("step", "zero_grad"))


def _held_by(wrapper: Any) -> list[Any]:
    return [held for name in PLACES if (held := _attribute(wrapper, name)) is not None]


def _attribute(holder: Any, name: str) -> Any:
    with suppress(Exception):  # a property of somebody else's class may raise anything
        return getattr(holder, name, None)
    return None


def _described(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def _way_to_it(thing: Any) -> str:
    """Say where a trainer, a scheduler or an accelerator has its optimizer."""
    if isinstance(thing, type):
        return ""
    for name in ("optimizer", "optimizers", "_optimizers"):
        held = _attribute(thing, name)
        if held is not None and not callable(held):
            return f", its .{name}{'[0]' * isinstance(held, list | tuple)}"
    if "optimizer" in getattr(thing, "__dict__", {}):
        return ", which this one makes when it begins to train (its .optimizer is None as yet)"
    return ""
