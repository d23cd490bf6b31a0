"""Figures of how far the weights have moved, for logs: from the low-rank displacement and one reading of each W."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deltaopt.ledger import combined
from deltaopt.lowrank import LowRank, Term, joined
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.tensors import outside_inference_mode
from deltaopt.weight import WeightState
from deltaopt.wrappers import unwrap

ELEMENTS = 1 << 20
"""Elements of W that are looked at at a time."""


class Movement(NamedTuple):
    """Figures of one matrix W0 that was asked to move by D; sums over the matrices of a stack, where there is one.

    Attributes:
        displacement: ||D||^2.
        base: ||W0||^2; None if W cannot be read.
        cosine: of W0 and W0 + D; None if W cannot be read or is zero.
        rank: the effective rank of D; None if D is zero or kept as a dense matrix.
    """

    displacement: float
    base: float | None
    cosine: float | None
    rank: float | None


@torch.no_grad()
def movement_metrics(optimizer: DeltaLoRAOptimizer) -> dict[str, float]:
    r"""Return how far the weights were asked to move since their base, over all layers.

    D is the displacement of a weight (with ``weight_update="folded"`` the one that it would have made in place), W0 the
    weight before its first move. What rounding did to a 16-bit W is no part of D. All waits for the device, and costs
    about one reading of every W, two thin products and an SVD of a matrix of D's inner size; the dense D is not formed.

    Args:
        optimizer: during or after training, between two steps; a wrapped one too, see `deltaopt.unwrap`.

    Returns:
        ``displacement_norm``: :math:`\sqrt{\sum \|D\|_F^2}`, of all weights together.
        ``relative_displacement``: that over :math:`\sqrt{\sum \|W_0\|_F^2}`.
        ``cosine_to_base``: the cosine of W0 and W0 + D as vectors, the mean over the layers.
        ``effective_rank``: of D, :math:`\exp(-\sum p_i \log p_i)` with the singular values over their sum as p; the
        mean over the layers that were asked to move.
        ``moved_weights``: the number of weights whose D is not zero.
        ``skipped_updates``: see `DeltaLoRAOptimizer.skipped_updates`.

        The second and third are left out where no W can be read (quantized, sharded), and those layers are left out of
        them. The fourth is left out where nothing has moved; layers whose D is kept as a matrix as large as W, after a
        ratio that changed often, are left out of it. A stack of experts counts as one layer.

    Raises:
        RuntimeError: if a displacement is not known any more; or in `base_weights`.
    """
    optimizer = unwrap(optimizer)
    with outside_inference_mode():
        moved = [_movement(weight) for weight in optimizer.weights()]
    displacement = math.fsum(each.displacement for each in moved)
    metrics = {"displacement_norm": math.sqrt(displacement)}
    read = [each for each in moved if each.base is not None]
    base = math.fsum(each.base for each in read if each.base is not None)
    if base > 0:
        metrics["relative_displacement"] = math.sqrt(math.fsum(each.displacement for each in read) / base)
    cosines = [each.cosine for each in moved if each.cosine is not None]
    if cosines:
        metrics["cosine_to_base"] = math.fsum(cosines) / len(cosines)
    ranks = [each.rank for each in moved if each.rank is not None]
    if ranks:
        metrics["effective_rank"] = math.fsum(ranks) / len(ranks)
    metrics["moved_weights"] = float(sum(each.displacement > 0 for each in moved))
    metrics["skipped_updates"] = float(optimizer.skipped_updates)
    return metrics


@torch.no_grad()
def has_moved(optimizer: DeltaLoRAOptimizer) -> bool:
    """Tell if any weight was asked to move away from its base; looks at no W. Waits for the device.

    Raises:
        RuntimeError: as `movement_metrics`.
    """
    with outside_inference_mode():
        products = (product_of(weight.asked_terms()) for weight in unwrap(optimizer).weights())
        return any(bool(singular_values(D).any()) for D in products if D is not None)


def _movement(weight: WeightState) -> Movement:
    held, asked = weight.displacement(), weight.asked_terms()
    D = product_of(asked)
    sigma = None if D is None or weight.ledger.is_matrix else singular_values(D)
    displacement = 0.0 if D is None else square_of(D) if sigma is None else float(sigma.square().sum())
    rank = None if sigma is None or displacement == 0 else effective_rank(sigma)
    if weight.weight_problems():
        return Movement(displacement, None, None, rank)
    base, end, both = 0.0, 0.0, 0.0
    for W0, W1 in rows_of(weight.matrix().detach(), product_of(held), D):
        base += float(W0.square().sum(dtype=_double(W0)))
        end += float(W1.square().sum(dtype=_double(W0)))
        both += float((W0 * W1).sum(dtype=_double(W0)))
    cosine = both / math.sqrt(base * end) if base > 0 and end > 0 else None
    return Movement(displacement, base, cosine, rank)


def product_of(terms: list[Term]) -> LowRank | None:
    """Return the sum of the terms as one product; None if it is zero. Terms that cancel leave nothing behind."""
    terms = [term for term in combined(terms) if not term.is_zero()]
    return joined(terms) if terms else None


def singular_values(D: LowRank) -> Tensor:
    """Return the singular values of each product of a stack, (..., R); what rounding alone has made is zero."""
    A, B = (factor.to(_double(factor)) for factor in (D.A, D.B))
    sigma = torch.linalg.svdvals(torch.linalg.qr(A).R @ torch.linalg.qr(B.mT).R.mT)
    noise = (A.norm(dim=-2) * B.norm(dim=-1)).sum(-1, keepdim=True) * torch.finfo(A.dtype).eps
    return torch.where(sigma > noise, sigma, torch.zeros_like(sigma))


def square_of(D: LowRank) -> float:
    """Return ||D||^2 of a product, by rows: for one with an identity as a factor, or of a large inner size too."""
    return math.fsum(
        float(rows.square().sum(dtype=_double(rows)))
        for A, B in zip(_stacked(D.A), _stacked(D.B), strict=True)
        for rows in (block @ B for block in A.split(_height(B.shape[-1])))
    )


def effective_rank(sigma: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values; of a stack, the mean of those not 0."""
    sigma = sigma[sigma.sum(-1) > 0]
    p = sigma / sigma.sum(-1, keepdim=True)
    return float(torch.special.entr(p).sum(-1).exp().mean())


def rows_of(W: Tensor, held: LowRank | None, *ends: LowRank | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield W0, and W0 + D for each D of `ends`, in blocks of rows, in the dtype of the computation.

    Args:
        W: (c, d) or (e, c, d), as it is now.
        held: the product that W0 was changed by to become W; None for none.
        ends: products; None for zero.
    """
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    for e, matrix in enumerate(_stacked(W)):
        height = _height(matrix.shape[-1])
        for start in range(0, matrix.shape[0], height):
            rows = slice(start, start + height)
            W0 = matrix[rows].to(dtype)
            if held is not None:
                W0 = W0 - _block(held, e, rows)
            yield W0, *(W0 if D is None else W0 + _block(D, e, rows) for D in ends)


def _block(D: LowRank, e: int, rows: slice) -> Tensor:
    return _stacked(D.A)[e][rows] @ _stacked(D.B)[e]


def _stacked(matrices: Tensor) -> Tensor:
    return matrices if matrices.dim() == 3 else matrices.unsqueeze(0)


def _height(columns: int) -> int:
    return max(1, ELEMENTS // max(1, columns))


def _double(tensor: Tensor) -> torch.dtype:
    """Return the widest dtype that the tensor's device has."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
