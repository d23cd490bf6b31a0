"""Factors next to a sharded W that nothing keeps equal on its ranks: compared by hashes, with what the ranks agree on.

A hash h and its complement ~h = -1 - h are both sent where each rank keeps the largest number. Equal hashes come back
as a pair of complements; of different ones the larger h and the larger ~h belong to two ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaopt.checkpoint.fingerprint import content_hash
from deltaopt.messages import Problem, raise_problems
from deltaopt.sharding import local_part, parts_unlinked
from deltaopt.weight import WeightState

DIFFERENT = (
    "W is sharded (FSDP2, tensor parallelism) and its factors are not, or over fewer ranks, and they differ between "
    "ranks, so that each rank would move its part of W by another delta. Nothing keeps such factors equal: average "
    "their gradients over the ranks before step() (DistributedDataParallel, or dist.all_reduce), or shard them with W "
    "(fully_shard)"
)


class FactorsDifferError(ValueError):
    """Factors that nothing keeps equal differ between ranks that would move their blocks of one W by them."""


class Unlinked(NamedTuple):
    """A part of a factor that is here: number `at` of the `of` parts that may differ between the ranks of W."""

    part: Tensor
    of: int
    at: int


def unlinked_parts(weight: WeightState, parts: Sequence[Tensor] | None = None) -> list[Unlinked]:
    """Return the parts here of the parameters of A and B that nothing keeps equal; none of a W that is not sharded.

    Args:
        weight: with its tensors resolved.
        parts: of its parameters on this rank. Default: as they are now.
    """
    if weight.piece is None:
        return []
    tensors = weight.tensors
    if parts is None:
        parts = [local_part(parameter.detach()) for parameter in tensors.parameters]
    return [
        Unlinked(part, *found)
        for parameter, part in zip(tensors.parameters, parts, strict=True)
        if (found := parts_unlinked(parameter, tensors.W)) is not None
    ]


def hashes_of(unlinked: Iterable[Unlinked]) -> list[Tensor]:
    """Return what this rank sends of its parts: 2 * of numbers of each, on its device."""
    sent = []
    for part, of, at in unlinked:
        number = content_hash(part, samples=None)
        hashes = number.new_full((of, 2), torch.iinfo(torch.int64).min)
        hashes[at, 0], hashes[at, 1] = number, ~number
        sent.append(hashes.view(-1))
    return sent


def take_whether_they_differ(agreed: list[int], unlinked: Iterable[Unlinked]) -> bool:
    """Take the largest numbers of all ranks off the front of a list; tell if any of these parts differ."""
    differ = False
    for _, of, _ in unlinked:
        hashes = agreed[: 2 * of]
        del agreed[: 2 * of]
        differ |= any(hashes[i] != ~hashes[i + 1] for i in range(0, 2 * of, 2))
    return differ


def raise_if_they_differ(differing: Iterable[WeightState], headline: str = "W was not moved, on no rank") -> None:
    """Raise FactorsDifferError for these weights, if there are any."""
    raise_problems(FactorsDifferError, headline, [Problem(weight.label, DIFFERENT) for weight in differing])
