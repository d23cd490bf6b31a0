"""What compensated rounding has cut off, as a checkpoint holds it: bytes.

In memory it is int16, which neither gloo nor NCCL sends. In a state it is uint8 with one more dimension, of two bytes.
So the dimensions of W stay, and a sharded one is cut where W is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaopt.sharding import gather_all, part_like, placed_in_whole, with_local_part

if TYPE_CHECKING:
    from deltaopt.weight import WeightState


def saved_compensation(weight: WeightState, bits: Tensor) -> Tensor:
    """Return what a state holds of the compensation of W: bytes; of a sharded W sharded as W is.

    Where some rows or columns of a sharded W move, all of that part is gathered; all ranks have to call this.
    """
    found, piece = compensation_bytes(bits), weight.piece
    if piece is None:
        return found
    if piece.view.moves_all:
        return with_local_part(weight.tensors.W, found, trailing=(2,))
    return placed_in_whole(found, piece, weight.tensors.W)


def is_compensation(weight: WeightState, kept: object) -> bool:
    """Tell if this is a compensation of W, as a state of this or an earlier version holds it.

    Args:
        weight: with its tensors resolved.
        kept: in one piece, or sharded in any way.
    """
    if not isinstance(kept, Tensor):
        return False
    shape = saved_shape(weight)
    return (kept.dtype, kept.shape) in ((torch.uint8, (*shape, 2)), (torch.int16, shape))  # int16 of schema 4 and 5


def loaded_compensation(weight: WeightState, kept: Tensor) -> Tensor:
    """Return a saved compensation as int16, this rank's part of it where W is sharded.

    Where it is sharded in another way than W, all of it is gathered; all ranks have to call this then.

    Args:
        weight: with its tensors resolved.
        kept: one of which `is_compensation` is true.
    """
    piece = weight.piece
    if piece is None:
        part = gather_all([kept])[0]
    elif piece.view.moves_all:
        part = part_like(kept, weight.tensors.W, piece.stored)
    else:
        part = part_like(kept, weight.tensors.W, piece.block)
    return compensation_bits(part) if part.dtype == torch.uint8 else part


def saved_shape(weight: WeightState) -> tuple[int, ...]:
    """Return the shape of what a state holds of the compensation, without the dimension of its bytes."""
    piece = weight.piece
    if piece is None:
        return tuple(weight.part().shape)
    return tuple(weight.tensors.W.shape) if piece.view.moves_all else piece.whole


def compensation_bytes(bits: Tensor) -> Tensor:
    """View int16 of any shape and strides as uint8, with a last dimension of 2."""
    return bits.unsqueeze(-1).view(torch.uint8)


def compensation_bits(of_state: Tensor) -> Tensor:
    """Return the int16 that `compensation_bytes` was given; a view where the bytes lie as they did then."""
    even = of_state.clone() if of_state.storage_offset() % 2 else of_state
    return even.contiguous().view(torch.int16).squeeze(-1)
