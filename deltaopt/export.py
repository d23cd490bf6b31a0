"""The whole change of the effective weight as one low-rank adapter, or merged into W."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaopt.checks import weight_problems
from deltaopt.lowrank import LowRank
from deltaopt.messages import problems_of, raise_problems
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.outside import warn_before_export
from deltaopt.roll_call import RollCall
from deltaopt.rounding.writer import add_terms_
from deltaopt.sharding import is_same_memory, with_local_part
from deltaopt.tensors import outside_inference_mode, same_view
from deltaopt.weight import WeightState, looked_up_once
from deltaopt.wrappers import unwrap


@torch.no_grad()
def export_adapter(
    optimizer: DeltaLoRAOptimizer, rank: int | None = None, *, from_pristine: bool = False
) -> dict[str, LowRank]:
    """Return what training did to each effective weight W + scaling * A @ B, as the factors of one adapter on the base.

    Next to W as it was before its first move, an adapter with the factors returned (and a scaling of 1) gives what
    the trained W and its branch give. It is exact, to the rounding of the factors: with a constant `update_ratio` of
    rank 2r at most, and r where the product at `start_step` was zero, as at LoRA's usual start.

    What is exported is what W was asked to move by. A 16-bit W did so in the mean only with stochastic rounding, whose
    noise is left out, and hardly with rounding to nearest.

    Args:
        optimizer: after training; a wrapped one too, see `deltaopt.unwrap`.
        rank: compress each layer to this inner size, by QR and SVD of the factors: the best approximation in the
            Frobenius norm. Default: exact; where `update_ratio` changed often, so that the displacement is kept as a
            matrix, of the smallest rank that is exact to rounding, which takes an SVD of that matrix.
        from_pristine: count from the weight before the start of A and B was taken out of it (PiSSA, OLoRA, ...), for
            layers that `find_triples` found to have such a start. Default: from W as it was registered.

    Returns:
        By name of the triple: A (c, r), B (r, d), or (e, c, r) and (e, r, d) for experts, and in `error` the relative
        error (Frobenius norm) of leaving out what does not fit `rank`.

    Raises:
        ValueError: if `rank` is not positive.
        TypeError: for another optimizer.
        RuntimeError: if the displacement of a layer is not known any more, with the reason; or in `base_weights`.
    """
    optimizer = unwrap(optimizer)
    arguments = {"rank": rank, "from_pristine": from_pristine}
    roll_call = RollCall(optimizer.ranks, "export_adapter()", lambda: arguments)
    with roll_call.told():
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank is a positive int or None, got {rank!r}")
        roll_call.meet()
    exported, weights = {}, optimizer.weights()
    with looked_up_once(weights):
        with outside_inference_mode():
            warn_before_export(weights)
        for weight in weights:
            with outside_inference_mode():
                whole = weight.change(from_pristine)
            fits = not weight.ledger.is_matrix if rank is None else whole.rank <= rank
            exported[weight.label] = whole if fits else whole.compressed(rank)
    return exported


@torch.no_grad()
def merged_weights(optimizer: DeltaLoRAOptimizer) -> dict[str, Tensor]:
    """Return each W with its branch added, W + scaling * A @ B, for a model without adapters.

    The model is not changed. With PEFT, `model.merge_and_unload()` in the training process gives these weights too, but
    for rounding in 16 bits: what compensated rounding has cut off from W is added here, and PEFT does not know of it.

    Args:
        optimizer: after training; a wrapped one too, see `deltaopt.unwrap`.

    Returns:
        By name of the triple: a tensor of W's shape and dtype, computed in float64 and rounded once. Triples of rows or
        columns of one weight get all of it, with all of their branches; so do those of several adapters. Of a sharded
        W it is sharded in the same way, and all ranks have to call this.

    Raises:
        TypeError: for another optimizer.
        RuntimeError: if a W cannot be read (quantized, offloaded), holds its branch already (merged), or in
            `base_weights`.
    """
    weights = unwrap(optimizer).weights()
    raise_problems(
        RuntimeError,
        "these W cannot be merged with their branch",
        [
            *weight_problems(weights),
            *(problem for weight in weights for problem in problems_of(weight.label, weight.triple.merge_problems())),
        ],
    )
    merged = {}
    for weight in weights:
        own = weight.tensors.W
        here = weight.here.detach().clone()
        fused = [other for other in weights if is_same_memory(other.tensors.W, own)]  # rows, columns, adapters
        for other in fused:
            with outside_inference_mode():
                part = other.full_part()
            adapters = [each for each in fused if _is_same_part(each, other)]
            add_terms_(other, part, [each.branch() for each in adapters])
            largest = torch.finfo(here.dtype).max
            other.view.part(here).copy_(part.clamp_(-largest, largest) if here.element_size() == 2 else part)
        merged[weight.label] = with_local_part(own.detach(), here)
    return merged


def _is_same_part(one: WeightState, other: WeightState) -> bool:
    """Tell if two triples of one W move the same part of it."""
    if one.piece is not None:  # what is here of it may be empty
        return one.triple.view == other.triple.view
    return same_view(one.matrix(), other.matrix())
