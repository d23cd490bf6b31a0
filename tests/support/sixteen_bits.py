"""Numbers of 16 bits: how they are spaced, and their bits."""

import torch
from torch import Tensor

BOTH_DTYPES = (torch.bfloat16, torch.float16)
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
"""The smallest positive number of each dtype."""


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far apart the values of the dtype are at x, float64: the finer distance at a power of two."""
    exponent = torch.frexp(x.abs()).exponent.double() - 1
    return (2.0**exponent * torch.finfo(dtype).eps).clamp(min=SMALLEST[dtype])


def int16_of(t: Tensor) -> Tensor:
    """The bits of a 16-bit tensor, on the CPU."""
    return t.cpu().contiguous().view(torch.int16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
