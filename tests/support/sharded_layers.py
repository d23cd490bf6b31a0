"""Layers whose W, A and B are laid out over a mesh of ranks, trained by gradients that are known whole.

All numbers are eighths and small, so that sums of products are exact in float32, in whatever order they are formed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from deltaopt import DeltaLoRAOptimizer, LoRATriple


class OnPartOfTheMesh(NamedTuple):
    """A placement on one dimension of a mesh: of a tensor that the ranks along the others hold separately."""

    dimension: str
    placement: Any


Placements = Sequence[Any] | OnPartOfTheMesh | None
"""Of a DTensor; None for a plain tensor."""


class Spread(NamedTuple):
    """One layer and where its tensors are: `placements` of W, A and B."""

    shape: tuple[int, int, int]
    layout: str
    placements: tuple[Placements, Placements, Placements]


def placed(tensor: Tensor, mesh: DeviceMesh | None, placements: Placements) -> Tensor:
    """This rank's part of a tensor that all ranks know; the tensor itself without a mesh."""
    if mesh is None or placements is None:
        return tensor.clone()
    if isinstance(placements, OnPartOfTheMesh):
        mesh, placements = mesh[placements.dimension], [placements.placement]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def here(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; another tensor as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _eighths(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(-8, 9, tuple(shape), generator=generator) / 8


def triples_of(layers: Sequence[Spread], dtype: torch.dtype, mesh: DeviceMesh | None = None) -> list[LoRATriple]:
    """Triples with the same numbers on every mesh."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, ((c, d, r), layout, placements) in enumerate(layers):
        shapes = [(c, d), (c, r), (r, d)]
        if layout == "transposed":
            shapes[0] = (d, c)
        W, A, B = (_eighths(shape, generator) for shape in shapes)
        W, A, B = (placed(t, mesh, p) for t, p in zip((W.to(dtype), A, B), placements, strict=True))
        parameters = nn.Parameter(W, requires_grad=False), nn.Parameter(A), nn.Parameter(B)
        found.append(LoRATriple(*parameters, scaling=0.5, layout=layout, name=f"layer{i}"))
    return found


def set_gradients(triples: Sequence[LoRATriple], step: int) -> None:
    """Give A and B gradients that all ranks know."""
    generator = torch.Generator().manual_seed(1000 + step)
    for factor in (factor for triple in triples for factor in (triple.A, triple.B)):
        grad = _eighths(factor.shape, generator)
        is_spread = isinstance(factor, DTensor)
        factor.grad = placed(grad, factor.device_mesh, factor.placements) if is_spread else grad


def trained(
    layers: Sequence[Spread], dtype: torch.dtype, steps: int, mesh: DeviceMesh | None = None, **settings: Any
) -> DeltaLoRAOptimizer:
    """Train the layers by SGD, whose steps on an element need no other one."""
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples_of(layers, dtype, mesh), lr=1.0, **settings)
    for step in range(steps):
        set_gradients(optimizer.triples, step)
        optimizer.step()
    return optimizer
