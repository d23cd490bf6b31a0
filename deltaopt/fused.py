"""The 16-bit W's of a step that the kernel writes, gathered into one batch that is kept while their tensors stay."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.ledger import Ledger
from deltaopt.noise import Keys
from deltaopt.rounding import GRIDS
from deltaopt.triple import LoRATriple
from deltaopt.writing import Write


class Addition(NamedTuple):
    """W += coef * U @ V for one triple.

    Attributes:
        triple: whose W it is.
        ledger: of this W.
        W: as it is stored.
        U: (c, k) or (e, c, k).
        V: (k, d) or (e, k, d).
        coef: the factor of the product.
        hashes: one for each matrix of W, a 0-d or (e,) int32 on the CPU, see `deltaopt.noise.label_hashes`.
        place: its number among those that are kept or not.
    """

    triple: LoRATriple
    ledger: Ledger
    W: Tensor
    U: Tensor
    V: Tensor
    coef: float
    hashes: Tensor
    place: int


class FusedWrites:
    """Adds products by a kernel.

    Args:
        kernel: the module that has it, see `fused_kernel`.
    """

    def __init__(self, kernel: ModuleType) -> None:
        self._kernel = kernel
        self._made_for: list[tuple[object, ...]] = []
        self._counts: list[int] = []
        self._batch: Any = None
        self._reordered: dict[int, Tensor] = {}

    def add_(self, additions: Sequence[Addition], keep: Tensor, write: Write) -> None:
        """Add those of the products whose place in `keep`, (n,) bool on the device, is true."""
        additions = [self._in_columns_of_W(addition) for addition in additions]
        kept = [write.compensation(addition.triple, addition.ledger, addition.W) for addition in additions]
        made_for = [_identity(addition, bits) for addition, bits in zip(additions, kept, strict=True)]
        if made_for != self._made_for:
            self._made_for = []
            products = [list(_products(addition, bits)) for addition, bits in zip(additions, kept, strict=True)]
            self._counts = [len(matrices) for matrices in products]
            self._batch = self._kernel.Batch([self._kernel.Product(*p) for matrices in products for p in matrices])
            self._made_for = made_for
        coefs = [a.coef for a, count in zip(additions, self._counts, strict=True) for _ in range(count)]
        self._batch.add_(coefs, keep, write.keys if write.stochastic else None)
        written = [addition.W for addition in additions] + [bits for bits in kept if bits is not None]
        torch.autograd.graph.increment_version(written)  # as any operation in place would

    def _in_columns_of_W(self, addition: Addition) -> Addition:
        """The addition with the columns of V in W's order; where that needs a copy, it stays in the same place."""
        V = addition.triple.columns_of(addition.W, addition.V)
        if V.data_ptr() == addition.V.data_ptr():
            return addition
        kept = self._reordered.get(addition.place)
        if kept is None or kept.shape != V.shape:
            kept = self._reordered[addition.place] = torch.empty_like(V)
        return addition._replace(V=kept.copy_(V))


_usable: dict[torch.device, ModuleType | None] = {}
"""The kernel for a device, once it was tried."""


def fused_kernel(device: torch.device) -> ModuleType | None:
    """The module with the kernel for this device; None where blocks of torch operations do it."""
    if device.type != "cuda":
        return None
    if device not in _usable:
        _usable[device] = _tried_kernel(device)
    return _usable[device]


def _tried_kernel(device: torch.device) -> ModuleType | None:
    """The module, once each kind of rounding has run on one number: Triton may be too old, or lack a C compiler."""
    try:
        from deltaopt import _triton

        if not _triton.is_available(device):
            return None
        try_out(_triton, device)
    except Exception as error:
        warnings.warn(
            f"the kernel for 16-bit weights can not be used on {device}, so they are written by torch operations, in "
            f"blocks, which is slower: {error!r}",
            RuntimeWarning,
            stacklevel=8,
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


def _products(addition: Addition, bits: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The fields of a `Product` of the kernel for each matrix."""
    triple, _, W, U, V, _, hashes, place = addition
    kept = None if bits is None else triple.part_matrix(bits)
    matrix = triple.weight_matrix(W)
    if matrix.dim() == 2:
        yield matrix, U, V, kept, int(hashes), place
        return
    for e, hash in enumerate(hashes.tolist()):
        yield matrix[e], U[e], V[e], None if kept is None else kept[e], hash, place


def _identity(addition: Addition, bits: Tensor | None) -> tuple[object, ...]:
    """What has to be the same for the products of a W to be the same."""
    tensors = [t for t in (addition.W, addition.U, addition.V, bits) if t is not None]
    places = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]
    return addition.triple, addition.place, *places
