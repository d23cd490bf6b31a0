"""What Trainer's checkpoints under FSDP hold of the optimizer: no ``optimizer.pt``, but what accelerate writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from deltaopt.optimizer import DeltaLoRAOptimizer


def is_of_fsdp(trainer: Any) -> bool:
    """Tell if a Trainer leaves its optimizer's state to accelerate's functions for FSDP."""
    return bool(getattr(trainer, "is_fsdp_enabled", False))


def resync_from(folder: Path, trainer: Any, optimizer: DeltaLoRAOptimizer) -> None:
    """Move every W to where it was in a checkpoint, whose A and B have been loaded; all processes have to call it.

    torch reads a sharded state into the present one, so that the inner optimizer has the moments of the checkpoint too.

    Args:
        folder: of the checkpoint.
        trainer: that has written it in this run.
        optimizer: that trains its model.

    Raises:
        ValueError: as `DeltaLoRAOptimizer.resync`.
    """
    from accelerate.utils.fsdp_utils import load_fsdp_optimizer

    accelerator = trainer.accelerator
    load_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, _Resynced(optimizer), trainer.model, str(folder))


class _Resynced(Optimizer):
    """An optimizer that is resynced with the state that somebody loads into it."""

    def __init__(self, optimizer: DeltaLoRAOptimizer) -> None:
        # Not torch's, which would make groups of its own.
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.resync(state_dict)
