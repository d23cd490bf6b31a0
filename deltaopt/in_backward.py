"""Optimizers that step within the backward pass: A and B then change where no `step()` sees it, and W cannot follow.

They are refused by what they are, by what they leave on a parameter, and at last by what they do: `step()` finds no
gradient, and other factors than the time before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaopt.messages import layers
from deltaopt.sharding import local_part

if TYPE_CHECKING:
    from deltaopt.weight import WeightState

STEPS_IN_BACKWARD: dict[str, str] = {}
"""By an attribute that such an optimizer has and others have not: what it is.

`deltaopt.integrations.inner_optimizers` fills it.
"""

INSTEAD = (
    "Take an optimizer that changes A and B in step(), such as torch.optim.AdamW: the gradients of LoRA's factors are "
    "small, so that little memory is lost"
)


def check_steps_by_itself(inner: Any) -> None:
    """Raise TypeError for an optimizer, or a class, that steps each parameter within the backward pass."""
    found = [kind for attribute, kind in STEPS_IN_BACKWARD.items() if hasattr(inner, attribute)]
    if found:
        name = inner.__name__ if isinstance(inner, type) else type(inner).__name__
        raise TypeError(
            f"the inner {name} changes A and B within the backward pass ({found[0]}): step() would find nothing to "
            f"do, and W would never move. {INSTEAD}"
        )


def check_not_in_backward(weights: Iterable[WeightState]) -> None:
    """Raise ValueError for factors that `torch.distributed.optim._apply_optimizer_in_backward` has given optimizers."""
    labels = [weight.label for weight in weights if any(map(_own_optimizers, weight.tensors.parameters))]
    if labels:
        raise ValueError(
            f"A and B of {layers(labels)} have optimizers that step within the backward pass "
            f"(_apply_optimizer_in_backward), which W cannot follow. Build the model without them. {INSTEAD}"
        )


def check_outside_backward() -> None:
    """Raise RuntimeError within a backward pass."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "step() was called within a backward pass (by a hook such as register_post_accumulate_grad_hook): A and B "
            "get their gradients one after the other, so that each backward pass would count as several steps, and W "
            "would change under it. Call it once after the backward pass"
        )


class BackwardWatch:
    """Tells by what they do optimizers that step within the backward pass.

    Where a step finds no gradient at all, the factors that have hooks are kept, as the step leaves them, until the next
    one. An inner optimizer may change them without gradients: it evaluates the loss, or has the gradients elsewhere.
    """

    def __init__(self) -> None:
        self._kept: dict[WeightState, list[Tensor]] = {}
        self._bare: list[WeightState] = []  # weights of a step that found no gradient

    def forget(self) -> None:
        """Forget the factors: an event of the optimizer changes them."""
        self._kept, self._bare = {}, []

    def look(self, weights: Sequence[WeightState]) -> None:
        """Look at the factors before a step without a closure.

        Raises:
            RuntimeError: if no factor has a gradient, as before the last step, and some have changed since.
        """
        factors = {weight: weight.tensors.parameters for weight in weights}
        if any(factor.grad is not None for pair in factors.values() for factor in pair):
            self.forget()
            return
        check_not_in_backward(weights)
        labels = [
            weight.label
            for weight, kept in self._kept.items()
            if weight in factors and not all(map(_is_same, kept, map(local_part, factors[weight])))
        ]
        if labels:
            raise RuntimeError(
                f"A and B of {layers(labels)} changed since the last step, and no factor has a gradient now or had one "
                "then: it looks as if another optimizer trains them within the backward pass, from a hook "
                "(register_post_accumulate_grad_hook, for example), where W cannot follow. Remove that hook, and let "
                f"this optimizer alone train A and B. {INSTEAD}"
            )
        self._kept = {}
        self._bare = [weight for weight, parameters in factors.items() if any(map(_has_hooks, parameters))]

    def note(self) -> None:
        """Keep the factors after a step that `look` has found without gradients."""
        self._kept = {
            weight: [local_part(factor).detach().clone() for factor in weight.tensors.parameters]
            for weight in self._bare
        }
        self._bare = []


def _own_optimizers(factor: Tensor) -> bool:
    return bool(getattr(factor, "_in_backward_optimizers", None))


def _has_hooks(factor: Tensor) -> bool:
    return bool(getattr(factor, "_post_accumulate_grad_hooks", None) or factor._backward_hooks)


def _is_same(kept: Tensor, now: Tensor) -> bool:
    return kept.shape == now.shape and kept.device == now.device and torch.equal(kept, now)
