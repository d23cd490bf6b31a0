"""The movement of W in the output of a layer that tensor parallelism has split: its input and output are parts, too.

    colwise:  y[:, I] -= (x B') A'[I].T          rowwise:  y -= sum over ranks of (x[:, J] B'[:, J].T) A'.T

DTensor forms these products from the placements of W, x and y, with the gradients. A plain tensor is what the layer's
plan has made of one: all of it on each rank, or this rank's columns, which its size tells.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaopt.layouts import MatrixView
from deltaopt.lowrank import Term, joined
from deltaopt.sharding import is_sharded

KNOWN = ("linear", "transposed")


def split_problem(
    output: object, x: object, W: Tensor, view: MatrixView, module: nn.Module, at_rest: bool
) -> str | None:
    """Say why the movement of a split W cannot be taken out of an output; None if it can.

    Args:
        output: of the layer.
        x: its input.
        W: a DTensor, as it is in the forward pass.
        view: of W.
        module: whose output it is.
        at_rest: True if W is the tensor that is there between forward passes, too.
    """
    if at_rest and is_unit_of_fsdp2(module):
        return (
            "its W is sharded by FSDP2 as a unit of its own, so that it is in parts again by now: let fully_shard wrap "
            "the block around it"
        )
    split = f"its W is split over the ranks {sorted(_mesh(W).mesh.flatten().tolist())} (tensor parallelism)"
    if view.layout not in KNOWN:
        return f"{split}, which is known here for nn.Linear and Conv1D, not for the layout {view.layout!r}"
    if not isinstance(output, Tensor) or not isinstance(x, Tensor) or not output.dim() or not x.dim():
        return f"{split}, and its input and output are no tensors"
    if any(placement.is_partial() for placement in _placements(W)):
        return f"{split}, and its parts have yet to be summed up"
    c, d = (W.shape[-1], W.shape[-2]) if view.layout == "transposed" else (W.shape[-2], W.shape[-1])
    for name, tensor, side, size in (("input", x, 1, d), ("output", output, 0, c)):
        known = {size, _size_here(W, view, side)}
        if (is_sharded(tensor) and tensor.shape[-1] != size) or tensor.shape[-1] not in known:
            return f"{split}, and its {name} has {tensor.shape[-1]} columns, of {size} in all and {min(known)} here"
    if x.shape[:-1] != output.shape[:-1]:
        return (
            f"{split}, and its input of {tuple(x.shape)} and its output of {tuple(output.shape)} have other rows "
            "(sequence parallelism)"
        )
    return None


def is_whole(output: object, x: object, W: Tensor, view: MatrixView, module: nn.Module) -> bool:
    """Tell if FSDP2 had W as a whole here for this forward pass, and has put it back into parts since.

    The arguments are those of `split_problem`; W is the tensor that is there between forward passes, too.
    """
    if not is_unit_of_fsdp2(module) or not isinstance(output, Tensor) or not isinstance(x, Tensor):
        return False
    if is_sharded(output) or is_sharded(x):
        return False
    if view.layout not in KNOWN:  # tensor parallelism of other layers is refused where W is not at rest
        return bool(_mesh(W).ndim == 1)
    c, d = (W.shape[-1], W.shape[-2]) if view.layout == "transposed" else (W.shape[-2], W.shape[-1])
    return bool(x.shape[-1:] == (d,) and output.shape[-1:] == (c,))


def split_change(output: Tensor, x: Tensor, W: Tensor, terms: Sequence[Term], view: MatrixView) -> Tensor:
    """Return what the sum of the terms adds to the output, laid out so that it can be added to it.

    Args:
        output: of the layer; `split_problem` says nothing of it.
        x: its input.
        W: a DTensor, as it is in the forward pass.
        terms: of W, all of them; at least one.
        view: of W.
    """
    dtype = torch.promote_types(terms[0].A.dtype, W.dtype)
    A, B, _ = joined([term.to(W.device, dtype) for term in terms])
    if not view.moves_all:
        A, B = view.padded(A, B, torch.empty(W.shape, device="meta"))
    x = _spread(x, W, view, 1, B.shape[-1]).to(dtype)
    hidden = functional.linear(x, _placed(B, W, view, 1))
    hidden = hidden.redistribute(placements=[_placement("Replicate")] * _mesh(W).ndim)  # type: ignore[attr-defined]
    change: Any = functional.linear(hidden, _placed(A, W, view, 0))
    if is_sharded(output):
        return change  # type: ignore[no-any-return]
    whole = output.shape[-1] == A.shape[0]
    kinds = [_placement("Replicate")] * _mesh(W).ndim if whole else _last_dimension(W, view, 0, change.dim())
    return change.redistribute(placements=kinds).to_local()  # type: ignore[no-any-return]


def is_unit_of_fsdp2(module: nn.Module) -> bool:
    """Tell if FSDP2 shards the parameters of this module, or of one in it, as soon as that has been called."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in module.modules())


def mask_of(rows: Sequence[int], change: Tensor) -> Tensor:
    """Return ones in some rows and zeros in the others, laid out so that a change can be multiplied with it."""
    mask = torch.zeros(change.shape[0], *[1] * (change.dim() - 1), dtype=change.dtype, device=change.device)
    mask[list(rows)] = 1
    if not is_sharded(change):
        return mask
    mesh = _mesh(change)
    return _distributed(mask, mesh, [_placement("Replicate")] * mesh.ndim)


def _spread(x: Tensor, W: Tensor, view: MatrixView, side: int, size: int) -> Any:
    """Return a plain tensor as the DTensor that it is a part of: the whole of it, or the columns that are here."""
    if is_sharded(x):
        return x
    mesh = _mesh(W)
    whole = x.shape[-1] == size
    kinds = [_placement("Replicate")] * mesh.ndim if whole else _last_dimension(W, view, side, x.dim())
    shape = (*x.shape[:-1], size)
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    module: Any = sys.modules["torch.distributed.tensor"]
    return module.DTensor.from_local(
        x.contiguous(), mesh, kinds, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _placed(factor: Tensor, W: Tensor, view: MatrixView, side: int) -> Tensor:
    """Cut a factor that all ranks have along the side that it has in common with W, as W is cut there."""
    return _distributed(factor.contiguous(), _mesh(W), _last_dimension(W, view, side, side + 1))


def _last_dimension(W: Tensor, view: MatrixView, side: int, dims: int) -> list[Any]:
    """Return placements of a tensor whose last of `dims` dimensions is a side of W: 0 for rows, 1 for columns."""
    stored = side if view.layout == "linear" else 1 - side
    return [
        _placement("Shard", dims - 1) if not kind.is_replicate() and kind.dim == stored else _placement("Replicate")
        for kind in _placements(W)
    ]


def _size_here(W: Any, view: MatrixView, side: int) -> int:
    return int(W.to_local().shape[side if view.layout == "linear" else 1 - side])


def _distributed(tensor: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    module: Any = sys.modules["torch.distributed.tensor"]
    return module.distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # type: ignore[no-any-return]


def _placement(kind: str, *dim: int) -> Any:
    return getattr(sys.modules["torch.distributed.tensor"], kind)(*dim)


def _mesh(tensor: Any) -> Any:
    return tensor.device_mesh


def _placements(tensor: Any) -> Sequence[Any]:
    return tensor.placements  # type: ignore[no-any-return]
