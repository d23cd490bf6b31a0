"""Sums of products coef * A @ B: joined into one product of a larger inner size, and compressed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """One coef * A @ B, with A (c, r) and B (r, d), both with a leading e for a stack of experts."""

    coef: float
    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """The number of columns of A, and of rows of B."""
        return self.A.shape[-1]

    def is_zero(self) -> bool:
        """Tell if the product is known to be zero, by its coefficient or a factor. Waits for the device."""
        return self.coef == 0 or is_zero(self.A) or is_zero(self.B)

    def cloned(self) -> Term:
        """Return the same term with tensors of its own."""
        return Term(self.coef, self.A.clone(), self.B.clone())

    def to(self, device: torch.device, dtype: torch.dtype) -> Term:
        """Return the same term on another device and in another dtype."""
        return Term(self.coef, self.A.to(device, dtype), self.B.to(device, dtype))


def is_zero(factor: Tensor) -> bool:
    """Tell if all numbers are zero; one column tells of most factors that they are not. Waits for the device."""
    return not (bool(factor[..., :1].any()) or bool(factor.any()))


class LowRank(NamedTuple):
    """A matrix (c, d), or a stack (e, c, d) of them, as the product of two factors.

    Attributes:
        A: (c, r) or (e, c, r).
        B: (r, d) or (e, r, d).
        error: relative error in the Frobenius norm of leaving out what `compressed` left out; 0.0 if nothing was.
    """

    A: Tensor
    B: Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        """The inner size of the product, an upper bound of the rank of the matrix."""
        return self.A.shape[-1]

    def product(self) -> Tensor:
        """Compute the dense matrix A @ B."""
        return self.A @ self.B

    def summed(self) -> LowRank:
        """Return the same matrix as the dense product, formed in float64, and an identity on its shorter side."""
        return LowRank(*matrix_factors((self.A.to(torch.float64) @ self.B.to(torch.float64)).to(self.A.dtype)))

    def compressed(self, rank: int | None = None) -> LowRank:
        """Return the same matrix, or its best approximation, with the smallest inner size.

        The factors go through QR and an SVD of the small core, in float64; the dense product is not formed.

        Args:
            rank: the largest inner size allowed. None leaves out only what is zero to the rounding of the dtype.

        Returns:
            The factors, each with half of the singular values' size, and the relative error, also for a stack.
        """
        A, B = (factor.to(torch.float64) for factor in (self.A, self.B))
        Q_A, R_A = torch.linalg.qr(A)
        Q_B, R_B = torch.linalg.qr(B.mT)
        U, sigma, Vh = torch.linalg.svd(R_A @ R_B.mT, full_matrices=False)
        # What is smaller than the rounding errors of the columns times rows that were summed is none of the matrix.
        summands = A.norm(dim=-2) * B.norm(dim=-1)
        noise = summands.sum(-1, keepdim=True) * torch.finfo(self.A.dtype).eps
        kept = max(1, int((sigma > noise).sum(-1).max()))
        if rank is not None:
            kept = min(kept, rank)
        left_out, whole = sigma[..., kept:].norm(), sigma.norm()
        error = float(left_out / whole) if rank is not None and float(whole) > 0 else 0.0
        root = sigma[..., :kept].sqrt()
        A = Q_A @ (U[..., :kept] * root.unsqueeze(-2))
        B = (root.unsqueeze(-1) * Vh[..., :kept, :]) @ Q_B.mT
        return LowRank(A.to(self.A.dtype), B.to(self.B.dtype), error)


def joined(terms: Iterable[Term]) -> LowRank:
    """Return the sum of the terms as one product, in their dtype: factors side by side, the coefficients in A."""
    terms = list(terms)
    A = torch.cat([term.A * term.coef for term in terms], dim=-1)
    B = torch.cat([term.B for term in terms], dim=-2)
    return LowRank(A, B)


def change_of(terms: Sequence[Term]) -> LowRank | None:
    """Return the sum as a product in which nothing large cancels: of one term, or of the change of a product.

    The change coef (A'B' - AB) is coef [A' - A | A] @ [B' ; B' - B], as in a step. None for other sums, which have to
    be formed in float64.
    """
    if not terms or len(terms) > 2 or (len(terms) == 2 and terms[0].coef != -terms[1].coef):
        return None
    coef, A, B = terms[-1]
    if len(terms) == 1:
        return LowRank(A * coef, B)
    _, A0, B0 = terms[0]
    if A0.shape != A.shape:
        return None
    return LowRank(torch.cat([A - A0, A0], dim=-1) * coef, torch.cat([B, B - B0], dim=-2))


def matrix_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of a dense (c, d) or (e, c, d) matrix: itself, and an identity on its shorter side."""
    *lead, c, d = matrix.shape
    identity = torch.eye(min(c, d), dtype=matrix.dtype, device=matrix.device).expand(*lead, -1, -1)
    return (matrix, identity) if d <= c else (identity, matrix)
