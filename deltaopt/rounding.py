"""Writing a float32 or float64 result into W, rounded once.

A weight in the dtype of the computation takes the product in one `torch.addmm_`. Another one, as of 16
bits, is lifted to it in blocks of rows of bounded size, so that the sum is rounded once, to nearest, and no dense
copy of W is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deltaopt.triple import LoRATriple

BLOCK_ELEMENTS = 1 << 20
"""Elements of W that are lifted at a time: 4 MiB in float32."""


def add_to_weight_(triple: LoRATriple, W: Tensor, U: Tensor, V: Tensor, coef: float) -> None:
    """The part of W that `triple` moves += coef * U @ V, with U (c, k) and V (k, d) as `triple` has its factors."""
    add_product_(triple.weight_matrix(W), U, triple.columns_of(W, V), coef)


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


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 or bf16 shortcut in float32 products: the delta has few bits to spare."""
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
