"""Adding a product to W in float32 or float64 and rounding the sum into W's dtype, once.

A weight in the dtype of the computation takes the product in one `torch.addmm_`. One of 16 bits is lifted in blocks of
rows of bounded size, so that the sum is exact to float32 and no dense copy of W is made. Then it is rounded

- to nearest, which loses every update that is small compared with the spacing of W's values;
- stochastically: up with the probability of the fraction that is cut off, which keeps the mean;
- with compensation: to nearest, and what was cut off is kept and added the next time. Both halves together
  are W in float32.

Rounding works on the bits of float32. Those of bfloat16 are its upper half. Below float16's smallest normal number,
2^-14, its values stay 2^-24 apart while those of float32 draw closer: there 2^-14 is added, so that the spacing is
right, and taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltaopt.all_or_nothing import note

BLOCK_ELEMENTS = 1 << 20
"""Elements of W that are lifted at a time: 4 MiB in float32."""

NoiseFactors: TypeAlias = "tuple[Tensor, Tensor]"
"""R (c, 1) and C (1, d), or (e, c, 1) and (e, 1, d): see deltaopt.rounding.noise."""


class Scratch:
    """Memory for blocks of W, used for one W after another: touching fresh pages takes as long as the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def block(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor shaped like `like`, in the memory last handed out for this name and dtype."""
        key, n = (name, dtype, like.device), like.numel()
        kept = self._kept.get(key)
        if kept is None or kept.numel() < n:
            kept = self._kept[key] = torch.empty(n, dtype=dtype, device=like.device)
        return kept[:n].view(like.shape)


class Grid(NamedTuple):
    """The values of a 16-bit dtype among those of float32."""

    cut: int
    """Bits of float32 below the last one of the dtype."""
    largest: float
    subnormal: float
    """Below this the spacing stays, and that of float32 does not; 0 where both do the same."""

    @property
    def subnormal_bits(self) -> int:
        """The bits of `subnormal` as a float32."""
        return int(torch.tensor(self.subnormal, dtype=torch.float32, device="cpu").view(torch.int32))


GRIDS = {
    torch.bfloat16: Grid(16, torch.finfo(torch.bfloat16).max, 0.0),
    torch.float16: Grid(13, torch.finfo(torch.float16).max, torch.finfo(torch.float16).smallest_normal),
}


def add_product_(
    W: Tensor,
    U: Tensor,
    V: Tensor,
    coef: float,
    noise: NoiseFactors | None = None,
    compensation: Tensor | None = None,
    scratch: Scratch | None = None,
    written: list[Any] | None = None,
) -> None:
    """Compute W += coef * U @ V in the dtype of U and V, rounded once into W's.

    With `noise` or `compensation` that is by way of float32. A sum beyond a 16-bit W's largest finite value becomes
    that. A W in the dtype of U and V is always rounded to nearest.

    Args:
        W: (c, d) or (e, c, d), any strides, written in place.
        U: (c, k) or (e, c, k), float32 or float64.
        V: (k, d) or (e, k, d).
        coef: the factor of the product.
        noise: rounds stochastically.
        compensation: of W's shape, int16: what was cut off before, in units of float32's last place. It is added, and
            written in place.
        scratch: memory to compute in, which the next call may use too. Default: memory of its own.
        written: one entry for each block that was written, appended with the write (`note`). After an exception a call
            with the same arguments writes the other blocks.
    """
    if not W.numel():
        return
    written = [] if written is None else written
    if W.dtype == U.dtype:
        if not written:
            note(written, partial(W.baddbmm_ if W.dim() == 3 else W.addmm_, U, V, alpha=coef))
        return
    scratch = scratch or Scratch()
    for number, block in enumerate(_blocks(W, U, V, noise, compensation)):
        if number >= len(written):
            note(written, block.sum(coef, scratch))


def lifted(W: Tensor, compensation: Tensor | None = None) -> Tensor:
    """Return a 16-bit W in float32, with what was cut off; of W's shape."""
    full = W.to(torch.float32)
    if compensation is not None:
        marks = torch.empty_like(full, dtype=torch.int32)
        _restore_(full, compensation.to(torch.int32), marks, GRIDS[W.dtype])
    return full


def cut_off(W: Tensor, full: Tensor) -> Tensor:
    """Return the compensation, int16, of a 16-bit W that is `full` (float32) rounded to nearest.

    `full` may differ in its last bits from what was rounded, and so lie just on the far side of a tie from W: half a
    spacing is kept there, the most that rounding to nearest cuts off. Where W is no rounding of `full`, nothing is.
    """
    grid = GRIDS[W.dtype]
    full, near = full.clamp(-grid.largest, grid.largest), W.to(torch.float32)
    # Just below its smallest normal number float16 is spaced as above it; float32, in which is counted, twice as fine.
    finer = (near.abs() == grid.subnormal) & near.ne(0.0)
    if grid.subnormal:
        offset = _offset(near, torch.empty_like(near, dtype=torch.int32), grid)
        exact, near = full + offset, near + offset
    else:
        exact = full
    away = exact.view(torch.int32).long() - near.view(torch.int32).long()
    half = 1 << (grid.cut - 1)
    below = torch.where(finer, -2 * half - 1, -half)
    is_rounding = (
        (away < 2 * half)
        & (away > below - half - finer * half)
        & (full.signbit() == near.signbit())
        & W.isfinite()
        & full.isfinite()
    )
    return torch.maximum(away, below).clamp_(max=half - 1).masked_fill_(~is_rounding, 0).to(torch.int16)


class _Block(NamedTuple):
    """Some rows of a matrix that is written in another dtype than that of the computation, and what is added there."""

    W: Tensor
    U: Tensor
    V: Tensor
    noise: NoiseFactors | None
    compensation: Tensor | None

    def sum(self, coef: float, scratch: Scratch) -> Callable[[], object]:
        """Compute W + coef * U @ V, rounded, in `scratch`; return the call that writes it, in one piece."""
        W, U, V, noise, compensation = self
        grid = GRIDS.get(W.dtype)
        if grid is None or (noise is None and compensation is None):
            total = scratch.block("sum", W, U.dtype).copy_(W).addmm_(U, V, alpha=coef)
            return partial(W.copy_, total if grid is None else total.clamp_(-grid.largest, grid.largest))
        x = scratch.block("sum", W, torch.float32).copy_(W)
        bits = scratch.block("bits", W, torch.int32)
        marks = scratch.block("marks", W, torch.int32) if grid.subnormal or compensation is not None else bits
        if compensation is not None:
            _restore_(x, bits.copy_(compensation), marks, grid)
        total = x if U.dtype == x.dtype else scratch.block("sum", W, U.dtype).copy_(x)
        total.addmm_(U, V, alpha=coef)
        if compensation is not None:
            x.copy_(total.clamp_(-grid.largest, grid.largest)).nan_to_num_(torch.nan)
            exact = scratch.block("exact", W, torch.float32).copy_(x) if grid.subnormal else x
            return partial(torch._foreach_copy_, [W, compensation], _rounded_and_kept(x, exact, bits, marks, grid))
        assert noise is not None
        x.copy_(total)
        if grid.subnormal:
            x.nan_to_num_(torch.nan)
        _round_stochastically_(x, torch.mul(*noise, out=bits), marks, grid)
        return partial(W.copy_, x.clamp_(-grid.largest, grid.largest))


def _blocks(
    W: Tensor, U: Tensor, V: Tensor, noise: NoiseFactors | None, compensation: Tensor | None
) -> Iterator[_Block]:
    """Split a product into blocks of rows; of its transpose, where the columns of W lie together in memory."""
    if W.dim() == 3:
        for e, (W_e, U_e, V_e) in enumerate(zip(W, U, V, strict=True)):
            noise_e = None if noise is None else (noise[0][e], noise[1][e])
            yield from _blocks(W_e, U_e, V_e, noise_e, None if compensation is None else compensation[e])
        return
    if W.stride(0) < W.stride(1):
        W, U, V = W.mT, V.mT, U.mT
        noise = None if noise is None else (noise[1].mT, noise[0].mT)
        compensation = None if compensation is None else compensation.mT
    rows = max(1, BLOCK_ELEMENTS // W.shape[1])
    for start in range(0, W.shape[0], rows):
        piece = slice(start, start + rows)
        yield _Block(
            W[piece],
            U[piece],
            V,
            None if noise is None else (noise[0][piece], noise[1]),
            None if compensation is None else compensation[piece],
        )


# Passes over a block of integers cost a tenth of comparisons, `where` and `copysign`, so those are made of bits here.
# To a NaN with all bits set nothing can be added, or it becomes a number. A lifted float16 may be such, and what
# `clamp_` returns; of a lifted bfloat16 the lower half is 0, and sums leave it.

SIGN, MAGNITUDE = -1 << 31, (1 << 31) - 1


def _round_stochastically_(x: Tensor, noise: Tensor, marks: Tensor, grid: Grid) -> None:
    """Round x to a neighbour on the grid: away from zero with the probability of the fraction that is cut off.

    Args:
        x: float32, written in place. What is beyond the grid's largest value stays so, or becomes infinite.
        noise: int32, whose upper bits are uniform; written over.
        marks: int32, to be written over.
        grid: of W's dtype.
    """
    noise.bitwise_right_shift_(32 - grid.cut).bitwise_and_((1 << grid.cut) - 1)
    offset = _put_on_(x, marks, grid)
    x.view(torch.int32).add_(noise).bitwise_and_(-1 << grid.cut)
    _take_off_(x, offset)


def _rounded_and_kept(x: Tensor, exact: Tensor, scratch: Tensor, marks: Tensor, grid: Grid) -> list[Tensor]:
    """Return x rounded to the nearest value of the grid, in float32, and what was cut off, in int32.

    Args:
        x: float32, no larger than the grid's largest; written over.
        exact: a copy of it, where the grid is subnormal somewhere; written over.
        scratch: int32, to be written over.
        marks: int32, to be written over.
        grid: of W's dtype.
    """
    offset = _put_on_(x, marks, grid)
    bits = torch.add(x.view(torch.int32), 1 << (grid.cut - 1), out=scratch).bitwise_and_(-1 << grid.cut)
    if offset is None:
        return [bits.view(torch.float32), x.view(torch.int32).sub_(bits)]
    x.copy_(bits.view(torch.float32))
    _take_off_(x, offset)
    # What is kept counts from the rounded value, which is all there is to tell the spacing when it is added again.
    offset = _offset(x, marks, grid)
    kept = exact.add_(offset).view(torch.int32)
    return [x, kept.sub_(offset.add_(x).view(torch.int32))]


def _restore_(full: Tensor, kept: Tensor, marks: Tensor, grid: Grid) -> None:
    """Add to a W in float32 what was cut off from it: `kept`, int32."""
    offset = _put_on_(full, marks, grid)
    bits = full.view(torch.int32)
    if offset is None:
        # Nothing is below a zero, unless somebody else has written it; its bits less something would be a NaN's.
        nonzero = torch.bitwise_and(bits, MAGNITUDE, out=marks).neg_().bitwise_right_shift_(31)  # all bits, or none
        bits.add_(nonzero.bitwise_and_(kept))
        return
    bits.add_(kept)
    _take_off_(full, offset)


def _put_on_(x: Tensor, marks: Tensor, grid: Grid) -> Tensor | None:
    """Bring the numbers below the grid's normal ones to where float32 is spaced as they are; returns what it added."""
    if not grid.subnormal:
        return None
    offset = _offset(x, marks, grid)
    x += offset
    return offset


def _take_off_(x: Tensor, offset: Tensor | None) -> None:
    """Undo `_put_on_`. A zero keeps its sign. The offset is written over."""
    if offset is not None:
        magnitude = x.sub_(offset).view(torch.int32).bitwise_and_(MAGNITUDE)
        magnitude.bitwise_or_(offset.view(torch.int32).bitwise_and_(SIGN))


def _offset(x: Tensor, marks: Tensor, grid: Grid) -> Tensor:
    """Return what `_put_on_` adds: the smallest normal number where x is below it, else zero, with the sign of x.

    It is made in `marks`, int32.
    """
    bits, smallest = x.view(torch.int32), grid.subnormal_bits
    below = torch.bitwise_and(bits, MAGNITUDE, out=marks).sub_(smallest).bitwise_right_shift_(31)  # all bits, or none
    return (
        below.bitwise_and_(smallest).bitwise_xor_(bits).bitwise_and_(MAGNITUDE).bitwise_xor_(bits).view(torch.float32)
    )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast and the TF32 and bf16 shortcuts of float32 products: the delta has few bits to spare."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if before in ("none", "ieee"):
            yield
            return
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "none"  # as it was, if what was read came from torch.backends.fp32_precision
            if matmul.fp32_precision != before:
                matmul.fp32_precision = before
