"""Views of stored tensors as the matrices W (c, d), A (c, r) and B (r, d) of the mathematics.

GPT-2 keeps W as (d, c), a convolution as (c, d1, kh, kw), a mixture of experts as (e, c, d). loralib views the product
of its factors, (c k, d1 k), as a convolution's (c, d1, k, k), element by element in order. The matrix of W is
always a *view*, because it is written in place: `view`, `mT`, `permute` and `narrow`, never `reshape`, which may copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deltaopt.factors import INSTEAD_OF_VIEWS
from deltaopt.plain import as_int


@dataclass(frozen=True)
class Layout:
    """One way in which libraries store W, A and B.

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
    """Order the dimensions of a convolution's W, input ones by falling stride, so that they flatten as a view.

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


def _conv_in_order(W: Tensor) -> Tensor:
    return W.view(W.shape[0] * W.shape[-1], -1)


def _experts_left(A: Tensor, W: Tensor) -> Tensor:
    return A if A.dim() == 3 else A.unflatten(1, (-1, W.shape[0])).permute(2, 0, 1)


def _experts_right(B: Tensor, W: Tensor) -> Tensor:
    return B if B.dim() == 3 else B.unflatten(0, (W.shape[0], -1))


LAYOUTS: dict[str, Layout] = {
    "linear": Layout("(c, d)", (2,), lambda W: W, _as_it_is, _as_it_is, _as_it_is),
    "transposed": Layout("(d, c)", (2,), lambda W: W.mT, _as_it_is, _as_it_is, _as_it_is),
    "embedding": Layout("(rows d, width c)", (2,), lambda W: W.mT, _as_it_is, _as_it_is, _as_it_is),
    "conv": Layout("(c, d1, *kernel)", (3, 4, 5), _conv_weight, _conv_left, _conv_right, _conv_columns),
    "conv_in_order": Layout("(c, d1, *kernel)", (3, 4, 5), _conv_in_order, _as_it_is, _as_it_is, _as_it_is),
    "experts": Layout("(e, c, d)", (3,), lambda W: W, _experts_left, _experts_right, _as_it_is),
    "transposed_experts": Layout("(e, d, c)", (3,), lambda W: W.mT, _experts_left, _experts_right, _as_it_is),
}


class MatrixView(NamedTuple):
    """The view of one triple's stored tensors as matrices: a layout, and the rows and columns of W that move.

    Attributes:
        layout: a key of `LAYOUTS`.
        rows: (start, stop) of the (c, d) matrix; None for all of them.
        columns: the same for its columns.
    """

    layout: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    @classmethod
    def checked(cls, layout: str, rows: object, columns: object, label: str) -> MatrixView:
        """Return the view that a user asked for.

        Raises:
            ValueError: for an unknown layout, bounds that are no range, or columns of a convolution.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"{label}: layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
        if layout == "conv" and columns is not None:
            raise ValueError(
                f"{label}: columns is not for layout 'conv', whose columns are channels and places of the kernel "
                "together: give B all of them, zero where W is not to move"
            )
        return cls(layout, _checked_range(rows, f"{label}: rows"), _checked_range(columns, f"{label}: columns"))

    @property
    def moves_all(self) -> bool:
        """True if all of W moves, and not some rows or columns of it."""
        return self.rows is None and self.columns is None

    def meets(self, other: MatrixView) -> bool:
        """Tell if the parts of one W that two views move have elements in common."""
        return _meet(self.rows, other.rows) and _meet(self.columns, other.columns)

    def weight(self, W: Tensor) -> Tensor:
        """View W, or the part of it that moves, as a (c, d) or (e, c, d) matrix; it shares W's storage."""
        matrix = LAYOUTS[self.layout].weight(W)
        if self.rows is not None:
            matrix = matrix.narrow(-2, self.rows[0], self.rows[1] - self.rows[0])
        if self.columns is not None:
            matrix = matrix.narrow(-1, self.columns[0], self.columns[1] - self.columns[0])
        return matrix

    def factors(self, W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """View A as (c, r) and B as (r, d), with a leading e for experts. To be read, not written."""
        layout = LAYOUTS[self.layout]
        return layout.left(A, W), layout.right(B, W)

    def ordered(self, V: Tensor, W: Tensor) -> Tensor:
        """Put the columns of V (r, d) in the order of W's matrix: another one for convolutions in channels_last."""
        return LAYOUTS[self.layout].columns(V, W)

    def in_order_of_factors(self, matrix: Tensor, W: Tensor) -> Tensor:
        """Copy a matrix like W's with its columns in the order of B's: undo `ordered`."""
        order = self.ordered(torch.arange(matrix.shape[-1], device=matrix.device).unsqueeze(0), W)[0]
        return matrix[..., order.argsort()]

    def part(self, W: Tensor) -> Tensor:
        """View the part of W that moves: W itself, in an order that does not depend on strides, where all of it moves.

        Fingerprints, copies and compensations are of this form.
        """
        return W if self.moves_all else self.weight(W)

    def part_matrix(self, part: Tensor) -> Tensor:
        """View a tensor that is like `part` as the (c, d) or (e, c, d) matrix that `weight` gives."""
        return LAYOUTS[self.layout].weight(part) if self.moves_all else part

    def padded(self, A: Tensor, B: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """Extend the factors of the part of W that moves to factors for all of W, with zeros."""
        c, d = LAYOUTS[self.layout].weight(W).shape[-2:]
        if self.rows is not None:
            start, stop = self.rows
            A = functional.pad(A, (0, 0, start, c - stop))
        if self.columns is not None:
            start, stop = self.columns
            B = functional.pad(B, (start, d - stop))
        return A, B

    def shape_problems(self, W: Tensor, A: Tensor, B: Tensor) -> list[str]:
        """Say in sentences why the three do not fit together as (c, d), (c, r) and (r, d)."""
        layout = LAYOUTS[self.layout]
        if W.dim() not in layout.ndim:
            return [
                f"layout {self.layout!r} expects W stored as {layout.stored}, got {shape(W)}. If W is a shard of "
                "a flattened parameter (FSDP1, DeepSpeed ZeRO-3), this optimizer cannot move it"
            ]
        try:
            matrix = self.weight(W)
        except RuntimeError as error:
            return [f"no matrix view of W {shape(W)} with strides {W.stride()}: {error}"]
        if self._fits(matrix, W, A, B):
            return []
        if self._fits(matrix, W, B, A):
            return [
                f"A {shape(A)} and B {shape(B)} are swapped: W is {shape(matrix)} = (c, d), so A is "
                "(c, r) and B is (r, d). PEFT's lora_B is A here, and its lora_A is B"
            ]
        c, d = matrix.shape[-2:]
        several = A.dim() == B.dim() == 2 and A.shape[1] and B.shape[0] > A.shape[1] and not B.shape[0] % A.shape[1]
        return [
            f"A {shape(A)} and B {shape(B)} do not fit W {shape(W)} (layout {self.layout!r}, matrix "
            f"{shape(matrix)}): expected A of shape ({c}, r) and B of shape (r, {d})"
            + (f". If they hold several branches, each is a triple: {INSTEAD_OF_VIEWS}" if several else "")
        ]

    def product_problems(self, W: Tensor, A: Tensor, B: Tensor) -> list[str]:
        """Say in a sentence why A and B have no product; for a W that cannot be read as a matrix itself."""
        A, B = self.factors(W, A, B)
        fits = A.dim() == B.dim() >= 2 and A.shape[-1] == B.shape[-2]
        return [] if fits else [f"A {shape(A)} and B {shape(B)} have no product: expected (c, r) and (r, d)"]

    def _fits(self, matrix: Tensor, W: Tensor, A: Tensor, B: Tensor) -> bool:
        try:
            A, B = self.factors(W, A, B)
        except (RuntimeError, ValueError, IndexError):
            return False
        *lead, c, d = matrix.shape
        r = A.shape[-1] if A.dim() else 0
        return r > 0 and list(A.shape) == [*lead, c, r] and list(B.shape) == [*lead, r, d]


def shape(tensor: Tensor) -> str:
    """Write a tensor's shape for a message."""
    return str(tuple(tensor.shape))


def _meet(one: tuple[int, int] | None, other: tuple[int, int] | None) -> bool:
    return one is None or other is None or (one[0] < other[1] and other[0] < one[1])


def _checked_range(bounds: object, what: str) -> tuple[int, int] | None:
    if bounds is None:
        return None
    if isinstance(bounds, tuple) and len(bounds) == 2:
        start, stop = map(as_int, bounds)
        if start is not None and stop is not None and 0 <= start < stop:
            return start, stop
    raise ValueError(f"{what} is (start, stop) with 0 <= start < stop, got {bounds!r}")
