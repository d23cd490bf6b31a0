"""What training has changed in each layer: of LoRA and Delta-LoRA from low-rank terms, of fine-tuning from two models.

With W0 the weight before training, D what W was asked to move by since, and s A B the branch, a layer computes with
W* = W0 + D + s A B. A folded W stays; its D is the one that it would have moved by in place, so that the figures of
both rules are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltaopt.groups import DeltaGroup, Settings
from deltaopt.lowrank import LowRank
from deltaopt.norms import cosines_to_base, effective_rank, norm_of, product_of, singular_values
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.tensors import FLOATS, is_plain, outside_inference_mode
from deltaopt.triple import LoRATriple
from deltaopt.weight import WeightState
from deltaopt.wrappers import unwrap


class LayerChange(NamedTuple):
    """The change of one layer. Norms are Frobenius norms; of a stack of experts all figures count it as one vector.

    Attributes:
        name: of the triple, or of the parameter.
        base_norm: ||W0||; None if W cannot be read (quantized, offloaded).
        weight_norm: ||D||, how far W was asked to move.
        branch_norm: ||s A B||.
        change_norm: ||W* - W0||.
        cosine: of W* and W0 as vectors (Fig. 3 of the paper); None if W cannot be read or is zero.
        weight_cosine: of W0 + D and W0, as it is without the branch; None likewise.
        effective_rank: of W* - W0, the exponential of the entropy of its singular values over their sum; of a stack the
            mean over the matrices. None if nothing has changed, or the change is kept as a matrix as large as W.
        numerical_rank: of W* - W0, the number of singular values above max(c, d) times the spacing of the factors'
            dtype at the largest of them; of a stack the largest. None likewise.
    """

    name: str
    base_norm: float | None
    weight_norm: float
    branch_norm: float
    change_norm: float
    cosine: float | None
    weight_cosine: float | None
    effective_rank: float | None
    numerical_rank: int | None


@torch.no_grad()
def layer_changes(source: DeltaLoRAOptimizer | Iterable[LoRATriple]) -> list[LayerChange]:
    """Return what training has changed in each layer so far.

    It costs about one reading of every W, thin products, and an SVD of a matrix of the change's inner size. The dense
    change is not formed. What rounding did to a 16-bit W is no part of it.

    Args:
        source: the optimizer (a wrapped one too, see `deltaopt.unwrap`). Or triples whose W has not moved, as of a run
            of plain LoRA: ``find_triples(model)``.

    Returns:
        One row a triple, in their order.

    Raises:
        TypeError: for anything else.
        RuntimeError: if a displacement is not known any more; or in `base_weights`.

    Example:
        >>> import torch
        >>> W, A, B = torch.eye(4), torch.ones(4, 1, requires_grad=True), torch.zeros(1, 4, requires_grad=True)
        >>> optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=1.0, update_ratio=1.0)
        >>> B.grad = torch.tensor([[-1.0, 0.0, 0.0, 0.0]])
        >>> _ = optimizer.step()
        >>> change = layer_changes(optimizer)[0]
        >>> change.weight_norm, change.branch_norm, change.change_norm, change.numerical_rank
        (2.0, 2.0, 4.0, 1)
    """
    with outside_inference_mode():
        return [_layer_change(weight) for weight in _weights(source)]


@torch.no_grad()
def dense_changes(
    before: nn.Module | Mapping[str, Tensor],
    after: nn.Module | Mapping[str, Tensor],
    names: Sequence[str] | None = None,
) -> list[LayerChange]:
    """Return what full fine-tuning, or any other training, has changed in each weight: the same figures.

    Args:
        before: the model as it was before training (a copy), or its ``state_dict()``.
        after: the same after training, on the same device.
        names: of the weights to compare. Default: every parameter of two or more dimensions that `after` has, and that
            has the same shape in `before`.

    Returns:
        One row a weight, with the change as that of W. A weight of more than two dimensions counts as a matrix of its
        first dimension and the rest, as a convolution.

    Raises:
        ValueError: for a name that is missing on one side, or whose shapes differ.
    """
    old, new = _tensors(before), _tensors(after)
    if names is None:
        names = [name for name, W in new.items() if _is_weight(W) and name in old and old[name].shape == W.shape]
    unknown = [name for name in names if name not in old or name not in new or old[name].shape != new[name].shape]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown[:3])} cannot be compared: a weight of the same name and shape is expected before and "
            "after"
        )
    return [_dense_change(name, old[name], new[name]) for name in names]


def _layer_change(weight: WeightState) -> LayerChange:
    triple = weight.triple
    branch = weight.branch()._replace(coef=triple.scaling)
    asked, is_matrix = weight.asked_terms(), weight.ledger.is_matrix
    D, AB, change = product_of(asked), product_of([branch]), product_of([*asked, branch])
    effective, numerical = (None, None) if is_matrix else _ranks(change, _resolution(weight))
    base, cosine, weight_cosine = None, None, None
    if not weight.weight_problems():
        held = product_of(weight.displacement())
        base, (cosine, weight_cosine) = cosines_to_base(weight, held, change, D)
    return LayerChange(
        triple.label,
        base,
        norm_of(D, is_matrix),
        norm_of(AB),
        norm_of(change, is_matrix),
        cosine,
        weight_cosine,
        effective,
        numerical,
    )


def _dense_change(name: str, before: Tensor, after: Tensor) -> LayerChange:
    old, new = (W.detach().double().flatten(1) for W in (before, after))
    moved = new - old
    norm, base, end = float(moved.norm()), float(old.norm()), float(new.norm())
    cosine = float((old * new).sum()) / (base * end) if base > 0 and end > 0 else None
    effective = numerical = None
    if norm > 0:
        sigma = torch.linalg.svdvals(moved)
        effective, numerical = effective_rank(sigma), _numerical_rank(sigma, moved.shape, torch.finfo(after.dtype).eps)
    return LayerChange(name, base, norm, 0.0, norm, cosine, cosine, effective, numerical)


def _ranks(change: LowRank | None, eps: float) -> tuple[float | None, int | None]:
    sigma = None if change is None else singular_values(change)
    if change is None or sigma is None or not bool(sigma.any()):
        return None, None
    return effective_rank(sigma), _numerical_rank(sigma, (change.A.shape[-2], change.B.shape[-1]), eps)


def _numerical_rank(sigma: Tensor, shape: Sequence[int], eps: float) -> int:
    largest = sigma.amax(-1, keepdim=True)
    return int((sigma > max(shape) * eps * largest).sum(-1).max())


def _resolution(weight: WeightState) -> float:
    """Return the spacing at 1 of the numbers that the factors are computed in."""
    return float(torch.finfo(weight.tensors.compute_dtype()).eps)


def _weights(source: object) -> list[WeightState]:
    if isinstance(source, Iterable) and not isinstance(source, (nn.Module, Tensor)):
        triples = list(source)
        if triples and all(isinstance(triple, LoRATriple) for triple in triples):
            weights = [WeightState(triple, DeltaGroup([triple], Settings(0.0, 0, 1.0))) for triple in triples]
            for weight in weights:
                weight.resolve()
            return weights
    optimizer = unwrap(source)
    return list(optimizer.weights())


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() >= 2 and tensor.dtype in FLOATS and is_plain(tensor)
