"""The kernel: the sum of blocks.py for many 16-bit weights at once. W is read, rounded and written once.

Matrices of the same shape, dtype and strides share a launch. What differs between them (where they lie, the hash of
their noise and where it begins, their place in `keep`) is in a table on the device, and their coefficients next to it,
which are copied there only when they are other ones than before. Nothing waits for the device. Each program makes one
tile of W. The product is summed in float32, without TF32.

This is the only file that imports Triton. Where that is not installed, `is_available` says so and nothing else works.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.all_or_nothing import note
from deltaopt.rounding import noise
from deltaopt.rounding.blocks import GRIDS
from deltaopt.rounding.noise import Keys

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:
    INTERPRETED = triton.knobs.runtime.interpret
    TABLE_COLUMNS = tl.constexpr(8)
    SIGN = tl.constexpr(-1 << 31)
    QUIET_NAN = tl.constexpr(0x7FC00000)
    WEYL = tl.constexpr(noise.WEYL % 2**32)
    SHIFT_0, SHIFT_1, SHIFT_2 = (tl.constexpr(shift) for shift in (*dict(noise.MIX), noise.LAST_SHIFT))
    FACTOR_0, FACTOR_1 = (tl.constexpr(factor % 2**32) for _, factor in noise.MIX)

UNKNOWN = "unknown"
"""Stands for a launch that may have been made."""

TILE_SIDE = 64
"""Rows and columns of a tile of W at most: a row is a cache line, and U and V are read once for 64 columns and rows."""
TILE_DEPTH = 16
"""How much of k is loaded at a time."""
THREAD_ELEMENTS = 16
"""Elements of W for each thread: with their sums they stay in 80 registers or so, of which an SM has enough for 24
warps. The sizes are fixed, as a search for better ones would run the kernel on W many times."""


class Product(NamedTuple):
    """One matrix and the factors of what is added to it: W += coef * U @ V.

    Attributes:
        W: (c, d), bfloat16 or float16, any strides, no two elements in the same place; written in place.
        U: (c, k), float32, any strides.
        V: (k, d), float32, any strides.
        compensation: (c, d), int16, any strides: rounds with compensation (see blocks.py), written in place.
        hash: which noise the matrix gets, an int32 (see `deltaopt.rounding.noise.label_hashes`).
        place: its index in `keep`.
        first_row: of a W that is a block of a larger matrix, the place of its first row there: its noise is that block
            of the larger matrix's.
        first_column: the place of its first column there.
    """

    W: Tensor
    U: Tensor
    V: Tensor
    compensation: Tensor | None
    hash: int
    place: int
    first_row: int = 0
    first_column: int = 0


class Batch:
    """Products of any shapes on one device, in a launch for each group of matrices that are alike.

    It has written down where its tensors lie, and does not hold on to them: keep them, or make another batch.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        alike: dict[_Likeness, dict[int, Product]] = defaultdict(dict)
        for number, product in enumerate(products):
            if product.W.numel():
                turned = product.W.stride(0) < product.W.stride(1)
                product = _turned(product) if turned else product
                alike[_Likeness.of(product, turned)][number] = product
        self.groups = [_Group(likeness, members) for likeness, members in alike.items()]

    def add_(self, coefs: Sequence[float], keep: Tensor, keys: Keys | None, launched: list[Any] | None = None) -> None:
        """Add each product to its W. Autograd does not see it.

        Args:
            coefs: the factor of each product.
            keep: (n,) bool, on the device. A W for whose place it is False is left as it is, not even read.
            keys: round stochastically, save where there is a compensation. None: to nearest.
            launched: one entry for each launch, appended with it. After an exception a call makes the other launches.

        Raises:
            RuntimeError: if a Ctrl-C came while the kernel was being launched, which is done in Python: nobody knows
                then whether it was.
        """
        launched = [] if launched is None else launched
        with torch.cuda.device_of(keep):
            if UNKNOWN in launched:
                raise RuntimeError(
                    "the launch of a kernel was interrupted, so it is not known whether it has moved its 16-bit W: "
                    "load the weights and the optimizer state of a checkpoint"
                )
            for number, group in enumerate(self.groups[len(launched) :], len(launched)):
                try:
                    note(launched, partial(group.add_, coefs, keep, keys))
                except Exception:
                    raise  # the launch has failed
                except BaseException:
                    if len(launched) == number:
                        launched.append(UNKNOWN)
                    raise


def is_available(device: torch.device) -> bool:
    """Tell if Triton is installed and compiles for `device`, or interprets for a CPU (TRITON_INTERPRET=1)."""
    if triton is None:
        return False
    if INTERPRETED:
        return device.type == "cpu"
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class _Likeness(NamedTuple):
    """The properties that the matrices of one launch share."""

    dtype: torch.dtype
    c: int
    d: int
    k: int
    strides: tuple[int, ...]
    """Of W, U, V and the compensation."""
    compensated: bool
    turned: bool

    @classmethod
    def of(cls, product: Product, turned: bool) -> _Likeness:
        W, U, V, compensation = product[:4]
        kept_strides = (0, 0) if compensation is None else compensation.stride()
        strides = (*W.stride(), *U.stride(), *V.stride(), *kept_strides)
        c, d = W.shape
        return cls(W.dtype, c, d, U.shape[1], strides, compensation is not None, turned)


class _Group:
    """Matrices that are alike, and how they are launched."""

    def __init__(self, likeness: _Likeness, members: dict[int, Product]) -> None:
        self.likeness = likeness
        self.numbers = list(members)
        products = list(members.values())
        rows = [[*_addresses(p), p.hash, p.place, p.first_row, p.first_column] for p in products]
        self.device = products[0].W.device
        self.table = _sent(torch.tensor(rows, dtype=torch.int64, device="cpu"), self.device)
        self.known_coefs: list[float] = []
        self.coefs: Tensor | None = None
        self.options = options(likeness, aligned=all(address % 16 == 0 for row in rows for address in row[:4]))
        tiles = [-(-n // self.options[tile]) for n, tile in ((likeness.c, "BLOCK_C"), (likeness.d, "BLOCK_D"))]
        self.programs = tiles[0] * tiles[1] * len(products)

    def add_(self, coefs: Sequence[float], keep: Tensor, keys: Keys | None) -> None:
        _, c, d, k, strides, compensated, turned = self.likeness
        mine = [coefs[number] for number in self.numbers]
        if mine != self.known_coefs:
            self.coefs = _sent(torch.tensor(mine, dtype=torch.float32, device="cpu"), self.device)
            self.known_coefs = mine
        stochastic = keys is not None and not compensated
        rows, columns = keys or (0, 0)
        if turned:
            rows, columns = columns, rows
        _add[(self.programs,)](
            self.table, self.coefs, keep, c, d, k, *strides, rows, columns, STOCHASTIC=stochastic, **self.options
        )


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t


def _turned(product: Product) -> Product:
    """The product in the transpose of its W: (U V)^T = V^T U^T."""
    W, U, V, kept, *_, first_row, first_column = product
    kept = None if kept is None else kept.mT
    return product._replace(W=W.mT, U=V.mT, V=U.mT, compensation=kept, first_row=first_column, first_column=first_row)


def _addresses(product: Product) -> list[int]:
    kept = product.compensation
    return [product.W.data_ptr(), product.U.data_ptr(), product.V.data_ptr(), 0 if kept is None else kept.data_ptr()]


def options(likeness: _Likeness, aligned: bool) -> dict[str, Any]:
    """Return what the kernel is compiled for, but for the choice of stochastic rounding."""
    cut, largest, subnormal = GRIDS[likeness.dtype]
    rows, columns = (min(TILE_SIDE, _power_of_two(n)) for n in (likeness.c, likeness.d))
    return {
        "FLOAT16": likeness.dtype == torch.float16,
        "CUT": cut,
        "LARGEST": largest,
        "SUBNORMAL": subnormal,
        "COMPENSATED": likeness.compensated,
        "ALIGNED": aligned,
        "BLOCK_C": rows,
        "BLOCK_D": columns,
        "BLOCK_K": TILE_DEPTH,
        "num_warps": max(1, rows * columns // (32 * THREAD_ELEMENTS)),
        "enable_fp_fusion": True,  # Triton 3.9 warns where this is left to it, as its default is about to change
    }


def _power_of_two(n: int) -> int:
    """The next one, and no less than 16, the smallest side of a product on the device."""
    return max(16, 1 << (n - 1).bit_length())


def _jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`; without Triton nothing, as nothing calls the kernel then."""
    return triton.jit(**options) if triton is not None else lambda function: function


# The keys are other ones at every step: they must not be looked at to compile a kernel for them.
@_jit(do_not_specialize=["row_key", "column_key"])
def _add(
    table: tl.tensor,
    coefs: tl.tensor,
    keep: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    k: tl.tensor,
    W_0: tl.tensor,
    W_1: tl.tensor,
    U_0: tl.tensor,
    U_1: tl.tensor,
    V_0: tl.tensor,
    V_1: tl.tensor,
    kept_0: tl.tensor,
    kept_1: tl.tensor,
    row_key: tl.tensor,
    column_key: tl.tensor,
    STOCHASTIC: tl.constexpr,
    FLOAT16: tl.constexpr,
    CUT: tl.constexpr,
    LARGEST: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    COMPENSATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of one W: program = matrix * tiles of a matrix + tile, on one axis, as the others end at 65535."""
    tiles_d = tl.cdiv(d, BLOCK_D)
    tiles = tl.cdiv(c, BLOCK_C) * tiles_d
    program = tl.program_id(0)
    matrix = table + (program // tiles) * TABLE_COLUMNS
    coef = tl.load(coefs + program // tiles)
    if not tl.load(keep + tl.load(matrix + 5)):
        return
    tile = program % tiles
    rows = (tile // tiles_d) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    # A matrix may have more than 2^31 elements, or its rows may lie far apart.
    i, j = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    inside = (i < c) & (j < d)
    W = _pointer(matrix, tl.int16, ALIGNED) + (i * W_0 + j * W_1)
    U = _pointer(matrix + 1, tl.float32, ALIGNED) + i * U_0
    V = _pointer(matrix + 2, tl.float32, ALIGNED) + j * V_1

    w = tl.load(W, mask=inside, other=0)
    total = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + depth
        u = tl.load(U + at[None, :] * U_1, mask=(i < c) & (at[None, :] < k), other=0.0)
        v = tl.load(V + at[:, None] * V_0, mask=(at[:, None] < k) & (j < d), other=0.0)
        total = tl.dot(u, v, total, input_precision="ieee")

    x = _lifted(w, FLOAT16)
    if COMPENSATED:
        kept = _pointer(matrix + 3, tl.int16, ALIGNED) + (i * kept_0 + j * kept_1)
        x = _restored(x, tl.load(kept, mask=inside, other=0), SUBNORMAL)
    x = tl.clamp(x + coef * total, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if COMPENSATED:
        rounded = _rounded(x, 1 << (CUT - 1), CUT, SUBNORMAL)
        tl.store(kept, _cut_off(x, rounded, SUBNORMAL), mask=inside)
        x = rounded
    elif STOCHASTIC:
        label = tl.load(matrix + 4).to(tl.uint32)
        R = _scrambled(label, row_key, rows + tl.load(matrix + 6))
        C = _scrambled(label, column_key, columns + tl.load(matrix + 7))
        x = _rounded(x, ((R[:, None] * C[None, :]) >> (32 - CUT)).to(tl.int32), CUT, SUBNORMAL)
    elif not FLOAT16:
        x = _rounded(x, ((_bits(x) >> CUT) & 1) + ((1 << (CUT - 1)) - 1), CUT, SUBNORMAL)
    tl.store(W, _lowered(x, FLOAT16), mask=inside)


@_jit()
def _pointer(cell: tl.tensor, dtype: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    pointer = tl.load(cell).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@_jit()
def _lifted(w: tl.tensor, FLOAT16: tl.constexpr) -> tl.tensor:
    """The float32 of a 16-bit number that was loaded as an integer. bfloat16 is its upper half."""
    return w.to(tl.float16, bitcast=True).to(tl.float32) if FLOAT16 else _number(w.to(tl.int32) << 16)


@_jit()
def _lowered(x: tl.tensor, FLOAT16: tl.constexpr) -> tl.tensor:
    """The 16-bit number, as an integer; to nearest in float16."""
    return x.to(tl.float16).to(tl.int16, bitcast=True) if FLOAT16 else (_bits(x) >> 16).to(tl.int16)


@_jit()
def _rounded(x: tl.tensor, addend: tl.tensor, CUT: tl.constexpr, SUBNORMAL: tl.constexpr) -> tl.tensor:
    """The neighbour of x on the grid that adding `addend` to the bits below it leads to."""
    size = tl.abs(x)
    small = size < SUBNORMAL
    size = _number((_spread(size, small, SUBNORMAL) + addend) & (-1 << CUT))
    return _signed(tl.where(small, size - SUBNORMAL, size), x)


@_jit()
def _cut_off(x: tl.tensor, rounded: tl.tensor, SUBNORMAL: tl.constexpr) -> tl.tensor:
    """Return what rounding took from x, counted from the rounded value, which tells where the spacing changes."""
    size = tl.abs(rounded)
    small = size < SUBNORMAL
    return (_spread(tl.abs(x), small, SUBNORMAL) - _spread(size, small, SUBNORMAL)).to(tl.int16)


@_jit()
def _restored(x: tl.tensor, kept: tl.tensor, SUBNORMAL: tl.constexpr) -> tl.tensor:
    """A lifted W with what was cut off from it."""
    size = tl.abs(x)
    small = size < SUBNORMAL
    if SUBNORMAL == 0:
        # Nothing is below a zero, unless somebody else has written it; its bits less something would be a NaN's.
        kept = tl.where(size > 0, kept, 0)
    size = _number(_spread(size, small, SUBNORMAL) + kept)
    return _signed(tl.where(small, size - SUBNORMAL, size), x)


@_jit()
def _spread(size: tl.tensor, small: tl.tensor, SUBNORMAL: tl.constexpr) -> tl.tensor:
    """The bits of a number without its sign, a `small` one brought to where float32 is spaced as the grid is."""
    # A NaN may have all its bits set, to which nothing can be added.
    return tl.minimum(_bits(tl.where(small, size + SUBNORMAL, size)), QUIET_NAN)


@_jit()
def _signed(size: tl.tensor, x: tl.tensor) -> tl.tensor:
    return _number((_bits(size) & ~SIGN) | (_bits(x) & SIGN))


@_jit()
def _bits(x: tl.tensor) -> tl.tensor:
    return x.to(tl.int32, bitcast=True)


@_jit()
def _number(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)


@_jit()
def _scrambled(label: tl.tensor, key: tl.tensor, n: tl.tensor) -> tl.tensor:
    """Return the odd random numbers of `deltaopt.rounding.noise` with the indices n."""
    return _mixed(_mixed(label ^ key.to(tl.uint32)) + n.to(tl.uint32) * WEYL) | 1


@_jit()
def _mixed(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> SHIFT_0)) * FACTOR_0
    x = (x ^ (x >> SHIFT_1)) * FACTOR_1
    return x ^ (x >> SHIFT_2)
