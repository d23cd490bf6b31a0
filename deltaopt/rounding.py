"""Writing a float32 or float64 result into W, rounded once.

A weight in the dtype of the computation takes the product in one `torch.addmm_`. A 16-bit weight is
lifted to float32 in blocks of rows of bounded size, so that the sum is rounded once, to nearest, and no
dense copy of W is made.
"""

from __future__ import annotations

from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""Elements of W that are lifted at a time: 4 MiB in float32."""


def add_product_(W: Tensor, U: Tensor, V: Tensor, coef: float) -> None:
    """W += coef * U @ V, computed in the dtype of U and V and rounded once, to nearest, into W's.

    Args:
        W: (c, d) or (e, c, d), any strides, written in place.
        U: (c, k) or (e, c, k).
        V: (k, d) or (e, k, d).
        coef: the factor of the product.
    """
    if W.dtype != U.dtype:
        _add_product_in_blocks_(W, U, V, coef)
    elif W.dim() == 3:
        W.baddbmm_(U, V, alpha=coef)
    else:
        W.addmm_(U, V, alpha=coef)


def _add_product_in_blocks_(W: Tensor, U: Tensor, V: Tensor, coef: float) -> None:
    if W.dim() == 3:
        for W_e, U_e, V_e in zip(W, U, V, strict=True):
            _add_product_in_blocks_(W_e, U_e, V_e, coef)
        return
    if W.stride(0) < W.stride(1):  # a transposed view: blocks of its columns lie together in memory
        W, U, V = W.mT, V.mT, U.mT
    rows = max(1, BLOCK_ELEMENTS // W.shape[1])
    lifted = U.new_empty(min(rows, W.shape[0]), W.shape[1])
    for W_rows, U_rows in zip(W.split(rows), U.split(rows), strict=True):
        block = lifted[: W_rows.shape[0]]
        W_rows.copy_(block.copy_(W_rows).addmm_(U_rows, V, alpha=coef))
