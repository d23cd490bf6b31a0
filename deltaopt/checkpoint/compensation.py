"""What compensated rounding has cut off, as a checkpoint holds it: bytes.

In memory it is int16, which neither gloo nor NCCL sends. In a state it is uint8 with one more dimension, of two bytes.
So the dimensions of W stay, and a sharded one is cut where W is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaopt.sharding import is_sharded, local_part, placed_in_whole, with_local_part

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


def loaded_compensation(weight: WeightState, kept: Tensor) -> Tensor | None:
    """Return a saved compensation as int16, this rank's part of it where W is sharded; None if it is of no such W.

    Args:
        weight: with its tensors resolved.
        kept: as a state of this or an earlier version holds it, sharded as W is, or whole.
    """
    piece, shape = weight.piece, weight.part().shape
    if piece is not None and not is_sharded(kept):
        expected = weight.tensors.W.shape if piece.view.moves_all else piece.whole
        if kept.shape[: len(expected)] != torch.Size(expected):
            return None
        block = piece.stored if piece.view.moves_all else piece.block
        kept = kept[tuple(slice(*bounds) for bounds in block)]
    part = local_part(kept)
    if part.dtype == torch.uint8 and part.shape == (*shape, 2):
        return compensation_bits(part)
    return part if part.dtype == torch.int16 and part.shape == shape else None  # of schema 4 and 5


def compensation_bytes(bits: Tensor) -> Tensor:
    """View int16 of any shape and strides as uint8, with a last dimension of 2."""
    return bits.unsqueeze(-1).view(torch.uint8)


def compensation_bits(of_state: Tensor) -> Tensor:
    """Return the int16 that `compensation_bytes` was given; a view where the bytes lie as they did then."""
    even = of_state.clone() if of_state.storage_offset() % 2 else of_state
    return even.contiguous().view(torch.int16).squeeze(-1)
