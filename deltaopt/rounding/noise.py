"""Random bits for stochastic rounding: cheap, without a state, and the same wherever they are made.

The noise of the element in row i and column j of a matrix is the upper bits of R_i * C_j mod 2^32, R and C being
odd random numbers. Multiplying by an odd number permutes the odd numbers, so each product is uniform over them, and any
two elements are independent of each other: every sum of rounding errors has the variance that independent noise
would give it. It costs one multiplication for each element. (R_i + C_j is as cheap and pairwise independent too, but
its errors line up into matrices of low rank: docs/method.md.)

R and C come from a counter through a hash, so nothing is drawn from a generator: ranks of a job, devices, and a run
that is resumed have the same noise, and a piece of a matrix has the piece of its noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

WEYL = -0x61C88647  # 2^32 / golden ratio, as int32: multiples of it are spread evenly
MIX = ((16, 0x7FEB352D), (15, -0x7B935975))
LAST_SHIFT = 16

Int32 = TypeVar("Int32", int, Tensor)
"""A tensor of int32, or a number that fits one."""

EVENTS = ("move", "restart", "resync", "resume")


class Keys(NamedTuple):
    """The keys of one event's noise: two int32, for rows and for columns."""

    rows: int
    columns: int

    @classmethod
    def of(cls, seed: int, event: str, step: int, repeat: int = 0) -> Keys:
        """Return the keys of `event`, one of `EVENTS`, for the `repeat`-th time in step `step` with this seed."""
        words = (seed, seed >> 32, EVENTS.index(event) + repeat * len(EVENTS), step)
        rows, columns = 0, WEYL
        for word in map(_int32, words):
            rows = mixed(_int32((rows ^ word) + WEYL))
            # Scrambled first: of one word for both, another seed would have the two keys the other way round.
            columns = mixed(_int32((columns ^ mixed(_int32(word + WEYL))) + WEYL))
        return cls(rows, columns)


def label_hashes(labels: Sequence[str], lead: Sequence[int]) -> Tensor:
    """Return (n, *lead) int32, one number for each matrix of the triples `labels`, of which one has `lead` matrices."""
    hashes = torch.tensor([_int32(_label_hash(label)) for label in labels], dtype=torch.int32, device="cpu")
    for e in lead:
        hashes = hashes.unsqueeze(-1) + torch.arange(e, dtype=torch.int32, device="cpu")
    return hashes


def noise_factors(
    keys: Keys, hashes: Tensor, c: int, d: int, first_row: int = 0, first_column: int = 0
) -> tuple[Tensor, Tensor]:
    """Return R (..., c, 1) and C (..., 1, d), int32 and odd, for each of the matrices with the hashes (...).

    Args:
        keys: of the event.
        hashes: (...) int32, see `label_hashes`.
        c: the number of rows.
        d: the number of columns.
        first_row: of a block of larger matrices, the place of its first row there. The noise of a block is the block
            of the noise.
        first_column: the place of its first column there.
    """
    R = _scrambled(hashes, keys.rows, first_row, c)
    C = _scrambled(hashes, keys.columns, first_column, d)
    return R.unsqueeze(-1), C.unsqueeze(-2)


def _scrambled(hashes: Tensor, key: int, first: int, n: int) -> Tensor:
    """Return (..., n) odd random numbers, those with the indices from `first` on."""
    start = mixed(hashes ^ key).unsqueeze(-1)
    return mixed(start + torch.arange(first, first + n, dtype=torch.int32, device=hashes.device) * WEYL) | 1


def mixed(x: Int32) -> Int32:
    """Scramble each int32, one-to-one: xor-shifts and odd multiplications."""
    for shift, factor in MIX:
        product = (x ^ _shifted(x, shift)) * factor
        x = _int32(product) if isinstance(product, int) else product  # tensors wrap around by themselves
    return x ^ _shifted(x, LAST_SHIFT)


def _shifted(x: Int32, shift: int) -> Int32:
    """Shift right and bring in zeros: the shift of int32 brings in the sign."""
    return (x >> shift) & ((1 << (32 - shift)) - 1)


def _label_hash(label: str) -> int:
    """Hash by FNV-1a: the same in every process, as Python's own hash is not."""
    value = 0x811C9DC5
    for byte in label.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def _int32(word: int) -> int:
    """Return the lowest 32 bits of an int, as int32."""
    return ((word & 0xFFFFFFFF) ^ (1 << 31)) - (1 << 31)
