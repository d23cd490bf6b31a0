"""Norms, cosines and ranks of sums of low-rank products; the dense matrices are not formed, or by blocks of rows.

All wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaopt.ledger import combined
from deltaopt.lowrank import LowRank, Term, joined

if TYPE_CHECKING:
    from deltaopt.weight import WeightState

ELEMENTS = 1 << 20
"""Elements of a matrix that are looked at at a time."""


def product_of(terms: Iterable[Term]) -> LowRank | None:
    """Return the sum of the terms as one product; None if it is zero. Terms that cancel leave nothing behind."""
    terms = [term for term in combined(terms) if not term.is_zero()]
    return joined(terms) if terms else None


def norm_of(D: LowRank | None, is_matrix: bool = False, eps: float | None = None) -> float:
    """Return the Frobenius norm of a product, or of a stack of them as one vector; 0.0 for None.

    What rounding alone has made is zero; NaN stays NaN.

    Args:
        D: the product.
        is_matrix: it is kept as a matrix and an identity, which has no smaller core.
        eps: the spacing at 1 of the numbers that the factors were computed in. Default: that of the computation here.
    """
    if D is None:
        return 0.0
    if is_matrix:
        return math.sqrt(_square_by_rows(D))
    core, noise = _core(D, eps)
    norms = core.norm(dim=(-2, -1))
    return float(torch.where(norms <= noise, torch.zeros_like(norms), norms).norm())


def singular_values(D: LowRank) -> Tensor:
    """Return the singular values of each product of a stack, (..., R); what rounding alone has made is zero."""
    core, noise = _core(D)
    sigma = torch.linalg.svdvals(core)
    return torch.where(sigma > noise.unsqueeze(-1), sigma, torch.zeros_like(sigma))


def effective_rank(sigma: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values; of a stack, the mean of those not 0."""
    sigma = sigma[sigma.sum(-1) > 0]
    p = sigma / sigma.sum(-1, keepdim=True)
    return float(torch.special.entr(p).sum(-1).exp().mean())


def cosines_to_base(
    weight: WeightState, held: LowRank | None, *ends: LowRank | None
) -> tuple[float, list[float | None]]:
    """Return ||W0||, and for each D of `ends` the cosine of W0 + D and W0 as vectors; None where one is zero.

    Of a sharded W each rank looks at its block; all have to call this.

    Args:
        weight: whose W can be read, as it is now.
        held: the product that W0 was changed by to become W; None for none.
        ends: products; None for zero.
    """
    W = weight.matrix().detach()
    sums = torch.zeros(1 + 2 * len(ends), dtype=_double(W), device=W.device)
    for rows in _rows_of(W, _here(weight, held), [_here(weight, D) for D in ends]):
        W0, *moved = rows
        numbers = [W0 * W0, *(W1 * W1 for W1 in moved), *(W0 * W1 for W1 in moved)]
        sums += torch.stack([number.sum(dtype=sums.dtype) for number in numbers])
    base, *others = weight.summed(sums).tolist()
    squares, inner = others[: len(ends)], others[len(ends) :]
    found = [
        product / math.sqrt(base * square) if base > 0 and square > 0 else None
        for product, square in zip(inner, squares, strict=True)
    ]
    return math.sqrt(base), found


def _here(weight: WeightState, D: LowRank | None) -> LowRank | None:
    """Return the rows and columns of a product that W's matrix has here, in its order of columns."""
    if D is None:
        return None
    A, B = weight.cut(D.A, D.B)
    return LowRank(A, weight.view.ordered(B, weight.here))


def _core(D: LowRank, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """Return a small matrix with the singular values of D, and the size of what rounding makes; of a stack, of each."""
    A, B = (factor.to(_double(factor)) for factor in (D.A, D.B))
    spacing = torch.finfo(A.dtype).eps if eps is None else eps
    noise = (A.norm(dim=-2) * B.norm(dim=-1)).sum(-1) * spacing
    return torch.linalg.qr(A).R @ torch.linalg.qr(B.mT).R.mT, noise


def _rows_of(W: Tensor, held: LowRank | None, ends: Iterable[LowRank | None]) -> Iterator[tuple[Tensor, ...]]:
    """Yield W0, and W0 + D for each D of `ends`, in blocks of rows, in the dtype of the computation."""
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    for e, matrix in enumerate(_stacked(W)):
        height = _height(matrix.shape[-1])
        for start in range(0, matrix.shape[0], height):
            rows = slice(start, start + height)
            W0 = matrix[rows].to(dtype)
            if held is not None:
                W0 = W0 - _block(held, e, rows)
            yield W0, *(W0 if D is None else W0 + _block(D, e, rows) for D in ends)


def _square_by_rows(D: LowRank) -> float:
    return math.fsum(
        _sum(rows.square())
        for A, B in zip(_stacked(D.A), _stacked(D.B), strict=True)
        for rows in (block @ B for block in A.split(_height(B.shape[-1])))
    )


def _block(D: LowRank, e: int, rows: slice) -> Tensor:
    return _stacked(D.A)[e][rows] @ _stacked(D.B)[e]


def _stacked(matrices: Tensor) -> Tensor:
    return matrices if matrices.dim() == 3 else matrices.unsqueeze(0)


def _height(columns: int) -> int:
    return max(1, ELEMENTS // max(1, columns))


def _sum(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=_double(tensor)))


def _double(tensor: Tensor) -> torch.dtype:
    """Return the widest dtype that the tensor's device has."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
