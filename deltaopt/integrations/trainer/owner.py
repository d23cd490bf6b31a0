"""The Trainer that a callback belongs to: Trainer tells its callbacks everything about a run, and not itself."""

from __future__ import annotations

import gc
from typing import Any

from transformers import Trainer, TrainerCallback


def trainer_of(callback: TrainerCallback, args: Any) -> Trainer:
    """Return the Trainer with these arguments that has `callback` among its callbacks.

    It is looked for among all objects in memory, once for each run.

    Raises:
        ValueError: if there is none.
    """
    for found in gc.get_objects():
        if issubclass(type(found), Trainer) and getattr(found, "args", None) is args and is_owned(callback, found):
            return found
    raise ValueError(
        f"{type(callback).__name__}: no Trainer with these arguments has it among its callbacks. Hand it to Trainer, "
        "callbacks=[DeltaLoRACallback()], or name the Trainer: trainer.add_callback(DeltaLoRACallback(trainer))"
    )


def is_owned(callback: TrainerCallback, trainer: Any) -> bool:
    """Tell if a Trainer has this very callback."""
    handler = getattr(trainer, "callback_handler", None)
    return handler is not None and any(each is callback for each in handler.callbacks)
