"""A model that one method trains, and what the method does around a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from deltaopt.analysis import LayerChange


def _nothing(step: int) -> None:
    """Do nothing around a step."""


def _empty() -> dict[str, Any]:
    return {}


@dataclass
class Prepared:
    """What the training loop needs of a method; the loop is the same for all of them.

    Attributes:
        model: on its device, with `requires_grad` set on what trains; called as ``model(**batch)`` without labels, it
            gives an output with `logits`.
        optimizer: over all that trains. Its groups' "lr" is `setting.lr` times the method's own factor.
        before_step: called with the number of the step, from 0, before its forward pass.
        after_step: called with the number of the step after ``optimizer.step()``, before the gradients are cleared.
        extra_loss: what the method adds to the loss, after a forward pass; None for nothing.
        before_evaluation: called before the model is evaluated, and `after_evaluation` after it.
        changes: how far each adapted layer's effective weight went from the pretrained one.
        state: what a checkpoint keeps beside the model's and the optimizer's state; `load_state` takes it.
    """

    model: nn.Module
    optimizer: Optimizer
    before_step: Callable[[int], None] = _nothing
    after_step: Callable[[int], None] = _nothing
    extra_loss: Callable[[], Tensor] | None = None
    before_evaluation: Callable[[], None] = field(default=lambda: None)
    after_evaluation: Callable[[], None] = field(default=lambda: None)
    changes: Callable[[], list[LayerChange]] = field(default=list)
    state: Callable[[], dict[str, Any]] = _empty
    load_state: Callable[[dict[str, Any]], None] = field(default=lambda state: None)
