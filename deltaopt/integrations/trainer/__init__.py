"""transformers' Trainer, and TRL's trainers: the optimizer for their model, and what follows their checkpoints."""

from deltaopt.integrations.trainer.callback import DeltaLoRACallback
from deltaopt.integrations.trainer.factory import DeltaLoRAFactory

__all__ = ["DeltaLoRACallback", "DeltaLoRAFactory"]
