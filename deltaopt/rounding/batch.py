"""The 16-bit weights of a step in one batch for the kernel, which is kept while their tensors stay."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.rounding.blocks import GRIDS
from deltaopt.rounding.noise import Keys
from deltaopt.weight import WeightState


class Addition(NamedTuple):
    """W += coef * U @ V for one weight.

    Attributes:
        weight: whose W it is.
        U: (c, k) or (e, c, k).
        V: (k, d) or (e, k, d).
        coef: the factor of the product.
        compensation: what rounding has cut off from W so far; None if this W keeps nothing.
        hashes: one for each matrix of W, a 0-d or (e,) int32 on the CPU, see `deltaopt.rounding.noise.label_hashes`.
        place: its number among those that are kept or not.
        first_row: where W's matrix is a block of a larger one, the place of its first row there. Its noise is that
            block of the larger matrix's.
        first_column: the place of its first column there.
    """

    weight: WeightState
    U: Tensor
    V: Tensor
    coef: float
    compensation: Tensor | None
    hashes: Tensor
    place: int
    first_row: int = 0
    first_column: int = 0


class KernelBatch:
    """Adds products by a kernel.

    Args:
        kernel: the module that has it, see `fused_kernel`.
    """

    def __init__(self, kernel: ModuleType) -> None:
        self._kernel = kernel
        self._made_for: list[tuple[object, ...]] = []
        self._matrices: list[int] = []
        self._batch: Any = None
        self._reordered: dict[int, Tensor] = {}

    def add_(
        self, additions: Sequence[Addition], keep: Tensor, keys: Keys | None, launched: list[Any] | None = None
    ) -> None:
        """Add those of the products whose place in `keep`, (n,) bool on the device, is true.

        Args:
            additions: of different weights.
            keep: (n,) bool.
            keys: of the noise; None rounds to nearest. Where there is a compensation, it decides.
            launched: one entry for each launch, appended with it. After an exception a call makes the other launches.
        """
        additions = [self._in_columns_of_W(addition) for addition in additions]
        made_for = [_identity(addition) for addition in additions]
        if made_for != self._made_for:
            self._made_for = []
            products = [(number, p) for number, addition in enumerate(additions) for p in _products(addition)]
            self._matrices = [number for number, _ in products]
            self._batch = self._kernel.Batch([self._kernel.Product(*p) for _, p in products])
            self._made_for = made_for
        self._batch.add_([additions[number].coef for number in self._matrices], keep, keys, launched)
        written = [addition.weight.here for addition in additions]
        written += [addition.compensation for addition in additions if addition.compensation is not None]
        torch.autograd.graph.increment_version(written)  # as any operation in place would

    def _in_columns_of_W(self, addition: Addition) -> Addition:
        """Put the columns of V in W's order; where that needs a copy, the copy stays in the same place."""
        weight, V = addition.weight, addition.V
        ordered = weight.view.ordered(V, weight.here)
        if ordered.data_ptr() == V.data_ptr():
            return addition
        kept = self._reordered.get(addition.place)
        if kept is None or kept.shape != ordered.shape:
            kept = self._reordered[addition.place] = torch.empty_like(ordered)
        return addition._replace(V=kept.copy_(ordered))


_usable: dict[torch.device, ModuleType | None] = {}
"""The kernel of each device that was tried."""


def fused_kernel(device: torch.device) -> ModuleType | None:
    """Return the module with the kernel for this device; None where blocks of torch operations do its work."""
    if device.type != "cuda":
        return None
    if device not in _usable:
        _usable[device] = _tried_kernel(device)
    return _usable[device]


def _tried_kernel(device: torch.device) -> ModuleType | None:
    """Run each kind of rounding on one number and return the module: Triton may be too old, or lack a C compiler."""
    try:
        from deltaopt.rounding import _triton

        if not _triton.is_available(device):
            return None
        try_out(_triton, device)
    except Exception as error:
        warnings.warn(
            f"the kernel for 16-bit weights cannot be used on {device}, so they are written by torch operations, in "
            f"blocks, which is slower: {error!r}",
            RuntimeWarning,
            stacklevel=9,
        )
        return None
    return _triton


def try_out(kernel: ModuleType, device: torch.device) -> None:
    """Add one number to another in each kind of rounding."""
    one, keep = torch.ones(1, 1, device=device), torch.ones(1, dtype=torch.bool, device=device)
    for dtype in GRIDS:
        W = torch.zeros(1, 1, dtype=dtype, device=device)
        for kept, keys in ((None, None), (None, Keys(0, 0)), (W.to(torch.int16), None)):
            kernel.Batch([kernel.Product(W, one, one, kept, 0, 0)]).add_([1.0], keep, keys)


def _products(addition: Addition) -> Iterator[tuple[Any, ...]]:
    """Give the fields of a `Product` of the kernel for each matrix."""
    weight, U, V, _, bits, hashes, place, *firsts = addition
    kept = None if bits is None else weight.view.part_matrix(bits)
    matrix = weight.matrix()
    if matrix.dim() == 2:
        yield matrix, U, V, kept, int(hashes), place, *firsts
        return
    for e, hash in enumerate(hashes.tolist()):
        yield matrix[e], U[e], V[e], None if kept is None else kept[e], hash, place, *firsts


def _identity(addition: Addition) -> tuple[object, ...]:
    """Return what has to be the same for the products of a W to be the same."""
    tensors = (addition.weight.here, addition.U, addition.V, addition.compensation)
    places = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors if t is not None]
    return addition.weight, addition.place, addition.first_row, addition.first_column, *places
