"""How stored tensors are seen as the matrices W (c, d), A (c, r) and B (r, d) of the mathematics.

GPT-2 keeps W as (d, c), a convolution as (c, d1, kh, kw), a mixture of experts as (e, c, d). The matrix of W is
always a *view*, because it is written in place: `view`, `mT`, `permute` and `narrow`, never `reshape`, which may copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the storage of W, A and B is seen as matrices (c, d), (c, r) and (r, d).

    Attributes:
        stored: the shape of W as it is stored, for messages.
        ndim: the numbers of dimensions a stored W may have.
        weight: W -> its matrix, a view.
        left: (A, W) -> the (c, r) matrix of A.
        right: (B, W) -> the (r, d) matrix of B.
        columns: (V, W) -> V (r, d) with its columns in the order in which W's matrix has them.
    """

    stored: str
    ndim: tuple[int, ...]
    weight: Callable[[Tensor], Tensor]
    left: Callable[[Tensor, Tensor], Tensor]
    right: Callable[[Tensor, Tensor], Tensor]
    columns: Callable[[Tensor, Tensor], Tensor]


def _as_it_is(factor: Tensor, W: Tensor) -> Tensor:
    return factor


def _kernel_order(W: Tensor) -> list[int]:
    """The dimensions of a convolution's W, input ones by falling stride, so that they flatten as a view.

    In ``torch.channels_last`` the channel is the innermost one.
    """
    return [0, *sorted(range(1, W.dim()), key=W.stride, reverse=True)]


def _conv_weight(W: Tensor) -> Tensor:
    return W.permute(_kernel_order(W)).view(W.shape[0], -1)


def _conv_left(A: Tensor, W: Tensor) -> Tensor:
    return A.flatten(1)


def _conv_right(B: Tensor, W: Tensor) -> Tensor:
    return B.flatten(1)


def _conv_columns(V: Tensor, W: Tensor) -> Tensor:
    kernels: Tensor = V.unflatten(1, W.shape[1:])
    return kernels.permute(_kernel_order(W)).flatten(1)


def _experts_left(A: Tensor, W: Tensor) -> Tensor:
    return A if A.dim() == 3 else A.unflatten(1, (-1, W.shape[0])).permute(2, 0, 1)


def _experts_right(B: Tensor, W: Tensor) -> Tensor:
    return B if B.dim() == 3 else B.unflatten(0, (W.shape[0], -1))


LAYOUTS: dict[str, Layout] = {
    "linear": Layout("(c, d)", (2,), lambda W: W, _as_it_is, _as_it_is, _as_it_is),
    "transposed": Layout("(d, c)", (2,), lambda W: W.mT, _as_it_is, _as_it_is, _as_it_is),
    "embedding": Layout("(rows d, width c)", (2,), lambda W: W.mT, _as_it_is, _as_it_is, _as_it_is),
    "conv": Layout("(c, d1, *kernel)", (3, 4, 5), _conv_weight, _conv_left, _conv_right, _conv_columns),
    "experts": Layout("(e, c, d)", (3,), lambda W: W, _experts_left, _experts_right, _as_it_is),
    "transposed_experts": Layout("(e, d, c)", (3,), lambda W: W.mT, _experts_left, _experts_right, _as_it_is),
}
