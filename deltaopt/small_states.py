"""States of an optimizer for checkpoints that hold the adapter and not W."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from deltaopt.checkpoint.format import without_compensation
from deltaopt.wrappers import unwrap


def leave_out_compensation(optimizer: Any) -> RemovableHandle:
    """Let every later `state_dict()` leave out what compensated rounding has cut off from each W.

    For runs whose checkpoints hold the adapter and not W, as those of Trainer with a PEFT model do: W and what was cut
    off from it are rebuilt from the base there, as exactly as in float32, and the state need not hold 2 bytes for each
    element of W. With the whole model saved it is needed to resume bit for bit. With another rounding nothing changes.

    Args:
        optimizer: a DeltaLoRAOptimizer, or what wraps one.

    Returns:
        A handle whose `remove()` lets states be complete again. Copies of the optimizer save complete states.

    Raises:
        TypeError: for another optimizer.
    """
    return unwrap(optimizer).register_state_dict_post_hook(_without_compensation)


def _without_compensation(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return without_compensation(state_dict)
