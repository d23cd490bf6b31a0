"""The whole change of the effective weight as one low-rank adapter, or merged into W."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaopt.ledger import add_terms_, branch_of, full_part, whole_change
from deltaopt.lowrank import LowRank
from deltaopt.optimizer import DeltaLoRAOptimizer


@torch.no_grad()
def export_adapter(
    optimizer: DeltaLoRAOptimizer, rank: int | None = None, *, from_pristine: bool = False
) -> dict[str, LowRank]:
    """What training did to each effective weight W + scaling * A @ B, as the factors of one adapter on the base.

    Beside W as it was before its first move, an adapter with the factors returned (and a scaling of 1) gives what
    the trained W and its branch give. It is exact, to the rounding of the factors: with a constant `update_ratio` of
    rank 2r at most, and r where the product at `start_step` was zero, as at LoRA's usual start.

    What is exported is what W was asked to move by. A 16-bit W did so in the mean only with stochastic rounding, whose
    noise is left out, and hardly with rounding to nearest.

    Args:
        optimizer: after training.
        rank: compress each layer to this inner size, by QR and SVD of the factors: the best approximation in the
            Frobenius norm. Default: exact.
        from_pristine: count from the weight before the start of A and B was taken out of it (PiSSA, OLoRA, ..), for
            layers that `find_triples` found to have such a start. Default: from W as it was registered.

    Returns:
        By name of the triple: A (c, r), B (r, d), or (e, c, r) and (e, r, d) for experts, and in `error` the relative
        error (Frobenius norm) of leaving out what does not fit `rank`.

    Raises:
        ValueError: if `rank` is not positive.
        RuntimeError: if the displacement of a layer is not known any more, with the reason; or in `base_weights`.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is a positive int or None, got {rank!r}")
    exported = {}
    for triple, ledger in optimizer.accounts():
        whole = whole_change(triple, ledger, from_pristine)
        exported[triple.label] = whole if rank is None or whole.rank <= rank else whole.compressed(rank)
    return exported


@torch.no_grad()
def merged_weights(optimizer: DeltaLoRAOptimizer) -> dict[str, Tensor]:
    """Each W with its branch added, W + scaling * A @ B, for a model without adapters.

    The model is not changed. With PEFT, `model.merge_and_unload()` in the training process gives these weights too, but
    for rounding in 16 bits: what compensated rounding has cut off from W is added here, and PEFT does not know of it.

    Returns:
        By name of the triple: a tensor of W's shape and dtype, computed in float64 and rounded once. Triples of rows or
        columns of one weight get all of it, with all of their branches.

    Raises:
        RuntimeError: if a W can not be read (quantized, offloaded), or in `base_weights`.
    """
    accounts = optimizer.accounts()
    found = [f"{triple.label}: {problem}" for triple, _ in accounts for problem in triple.weight_problems()]
    if found:
        raise RuntimeError("these W can not be merged with their branch:\n  " + "\n  ".join(found))
    merged = {}
    for triple, _ in accounts:
        W = triple.W.detach().clone()
        for other, ledger in accounts:
            if other.W.data_ptr() == triple.W.data_ptr():  # rows or columns of one fused weight
                part = full_part(other, ledger)
                add_terms_(other, part, [branch_of(other)])
                largest = torch.finfo(W.dtype).max
                other.moved_part(W).copy_(part.clamp_(-largest, largest) if W.element_size() == 2 else part)
        merged[triple.label] = W
    return merged
