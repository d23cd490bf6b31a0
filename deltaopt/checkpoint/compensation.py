"""What compensated rounding has cut off, as a checkpoint holds it: bytes.

In memory it is int16, which neither gloo nor NCCL sends. In a state it is uint8 with one more dimension, of two bytes.
So the dimensions of W stay, and a sharded one is cut where W is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compensation_bytes(bits: Tensor) -> Tensor:
    """View int16 of any shape and strides as uint8, with a last dimension of 2."""
    return bits.unsqueeze(-1).view(torch.uint8)


def compensation_bits(of_state: Tensor) -> Tensor:
    """Return the int16 that `compensation_bytes` was given; a view where the bytes lie as they did then."""
    even = of_state.clone() if of_state.storage_offset() % 2 else of_state
    return even.contiguous().view(torch.int16).squeeze(-1)
