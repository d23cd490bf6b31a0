"""Random starts of factors, the same on all ranks and devices without any seeding by the user."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from deltaopt.sharding import put_whole_


def start_generator(seed: int, step: int, repeat: int, label: str) -> torch.Generator:
    """Return a generator on the CPU for one layer's start: a function of these numbers and of nothing else.

    Args:
        seed: `rounding_seed` of the optimizer.
        step: the number of the step.
        repeat: the number of restarts and resyncs since that step.
        label: the name of the triple.
    """
    digest = hashlib.blake2b(f"{seed} {step} {repeat} {label}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))


def put_normal_(factor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a factor with normal numbers; of a sharded one each rank draws all and takes its part."""
    put_whole_(factor, _place(factor, generator).normal_(0.0, std, generator=generator))


def put_uniform_(factor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill a factor with numbers that are uniform in +- bound; see `put_normal_`."""
    put_whole_(factor, _place(factor, generator).uniform_(-bound, bound, generator=generator))


def _place(factor: Tensor, generator: torch.Generator) -> Tensor:
    """Return an uninitialised tensor of the factor's shape and dtype where the generator draws."""
    return torch.empty(factor.shape, dtype=factor.dtype, device=generator.device)
