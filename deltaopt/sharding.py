"""Sharded tensors: recognised and gathered. The only file that knows DTensor."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell if this is a DTensor, as FSDP2 and tensor parallelism make of parameters."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # nothing is one before that was imported
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor; every rank has to call this. Another tensor comes back as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def put_whole_(tensor: Tensor, whole: Tensor) -> None:
    """Copy all of a tensor into a sharded one, each rank its part, or into another one."""
    tensor = tensor.detach()
    if is_sharded(tensor):
        module: Any = sys.modules["torch.distributed.tensor"]
        like: Any = tensor
        whole = whole.to(like.to_local().device)
        whole = module.distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    tensor.copy_(whole)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; another tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
