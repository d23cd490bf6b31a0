"""The 16-bit W's of a step that the kernel writes, gathered into one batch that is kept while their tensors stay."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.ledger import Ledger
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
        self._batch: Any = None

    def add_(self, additions: list[Addition], keep: Tensor, write: Write) -> None:
        """Add those of the products whose place in `keep`, (n,) bool on the device, is true."""
        products = [product for addition in additions for product in _products(addition, write)]
        made_for = [_identity(product) for product in products]
        if made_for != self._made_for:
            self._batch = self._kernel.Batch([self._kernel.Product(*product) for product in products])
            self._made_for = made_for
        self._batch.add_(keep, write.keys if write.stochastic else None)


_usable: dict[torch.device, bool] = {}
"""Whether the kernel works on a device, once it was tried."""


def fused_kernel(device: torch.device) -> ModuleType | None:
    """The module with the kernel for this device; None where blocks of torch operations do it."""
    if device.type != "cuda":
        return None
    from deltaopt import _triton

    if device not in _usable:
        _usable[device] = _triton.is_available(device) and works(_triton, device)
    return _triton if _usable[device] else None


def works(kernel: ModuleType, device: torch.device) -> bool:
    """Try the kernel on one number; if it can not be compiled, say why. Triton needs a C compiler, for one."""
    try:
        W, keep = torch.zeros(1, 1, dtype=torch.bfloat16, device=device), torch.ones(1, dtype=torch.bool, device=device)
        one = torch.ones(1, 1, device=device)
        kernel.Batch([kernel.Product(W, one, one, 1.0, None, 0, 0)]).add_(keep, None)
    except Exception as error:
        warnings.warn(
            f"the kernel for 16-bit weights can not be used on {device}, so they are written by torch operations, in "
            f"blocks, which is slower: {error!r}",
            RuntimeWarning,
            stacklevel=8,
        )
        return False
    return True


def _products(addition: Addition, write: Write) -> Iterator[tuple[Any, ...]]:
    """The fields of a `Product` of the kernel for each matrix."""
    triple, ledger, W, U, V, coef, hashes, place = addition
    bits = write.compensation(triple, ledger, W)
    kept = None if bits is None else triple.part_matrix(bits)
    matrix, V = triple.weight_matrix(W), triple.columns_of(W, V)
    if matrix.dim() == 2:
        yield matrix, U, V, coef, kept, int(hashes), place
        return
    for e in range(len(matrix)):
        yield matrix[e], U[e], V[e], coef, None if kept is None else kept[e], int(hashes[e]), place


def _identity(product: tuple[Any, ...]) -> tuple[object, ...]:
    """What has to be the same for a product to be the same."""
    W, U, V, coef, kept, _, place = product
    matrices = [W, U, V] if kept is None else [W, U, V, kept]
    return coef, place, *((matrix.data_ptr(), matrix.stride(), matrix.dtype) for matrix in matrices)
