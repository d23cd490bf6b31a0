"""Tensors that are sharded over the ranks of a job: told from others, gathered. The only file that knows DTensor."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, as FSDP2 and tensor parallelism make of parameters."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # nothing is one before that was imported
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank, which all have to ask for it; another tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """What of a sharded tensor is on this rank; another tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
