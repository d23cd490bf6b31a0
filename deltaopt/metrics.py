"""Figures of how far the weights have moved, for logs: from the low-rank displacement and one reading of each W."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from deltaopt.norms import cosines_to_base, effective_rank, norm_of, product_of, singular_values
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.tensors import outside_inference_mode
from deltaopt.weight import WeightState
from deltaopt.wrappers import unwrap


class Figures(NamedTuple):
    """Figures of one matrix W0 that was asked to move by D; of a stack of them as one vector.

    Attributes:
        displacement: ||D||.
        base: ||W0||; None if W cannot be read.
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

        The second and third are left out where no W can be read (quantized, offloaded), and those layers are left out
        of them. The fourth is left out where nothing has moved; layers whose D is kept as a matrix as large as W, after
        a ratio that changed often, are left out of it. A stack of experts counts as one layer.

    Raises:
        RuntimeError: if a displacement is not known any more; or in `base_weights`.
    """
    optimizer = unwrap(optimizer)
    with outside_inference_mode():
        layers = [_figures(weight) for weight in optimizer.weights()]
    metrics = {"displacement_norm": math.hypot(*(layer.displacement for layer in layers))}
    read = [layer for layer in layers if layer.base is not None]
    base = math.hypot(*(layer.base for layer in read if layer.base is not None))
    if base > 0:
        metrics["relative_displacement"] = math.hypot(*(layer.displacement for layer in read)) / base
    cosines = [layer.cosine for layer in layers if layer.cosine is not None]
    if cosines:
        metrics["cosine_to_base"] = math.fsum(cosines) / len(cosines)
    ranks = [layer.rank for layer in layers if layer.rank is not None]
    if ranks:
        metrics["effective_rank"] = math.fsum(ranks) / len(ranks)
    metrics["moved_weights"] = float(sum(layer.displacement > 0 for layer in layers))
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


def _figures(weight: WeightState) -> Figures:
    asked, is_matrix = product_of(weight.asked_terms()), weight.ledger.is_matrix
    sigma = None if asked is None or is_matrix else singular_values(asked)
    norm = norm_of(asked, is_matrix) if sigma is None else float(sigma.norm())
    rank = None if sigma is None or norm == 0 else effective_rank(sigma)
    if weight.weight_problems():
        return Figures(norm, None, None, rank)
    base, (cosine,) = cosines_to_base(weight, product_of(weight.displacement()), asked)
    return Figures(norm, base, cosine, rank)
