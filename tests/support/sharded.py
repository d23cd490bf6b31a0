"""Triples of sharded tensors, and the same run on one process: both get the same gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from deltaopt import DeltaLoRAOptimizer, LoRATriple

S0, S1, R = Shard(0), Shard(1), Replicate()
WHOLE = None
"""In the place of placements: a plain tensor on each rank."""
SCALING = 0.5


@dataclass(frozen=True)
class Layer:
    """The shapes of one layer as stored, and options of its triple."""

    W: tuple[int, ...]
    A: tuple[int, ...]
    B: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def linear(c: int, d: int, r: int) -> Layer:
    return Layer((c, d), (c, r), (r, d))


def transposed(c: int, d: int, r: int, layout: str = "transposed") -> Layer:
    return Layer((d, c), (c, r), (r, d), {"layout": layout})


class Run:
    """Some steps of an optimizer on layers, whole or sharded.

    Args:
        layers: the shapes.
        dtype: of W.
        placements: of W, A and B, for each dimension of the mesh; `WHOLE` for a plain tensor.
        mesh: of the ranks; None on one process.
        **options: of the optimizer.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        dtype: torch.dtype,
        placements: Sequence[Any] = (WHOLE, WHOLE, WHOLE),
        mesh: Any = None,
        zero: bool = False,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mesh, self.generator = mesh, torch.Generator().manual_seed(1)
        self.tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in layers:
            numbers = [torch.randn(shape, generator=generator) for shape in (layer.W, layer.A, layer.B)]
            numbers[0] = numbers[0].to(dtype)
            if zero:
                numbers[1].zero_()
            W, A, B = (self.placed(t, place) for t, place in zip(numbers, placements, strict=True))
            self.tensors.append((nn.Parameter(W, requires_grad=False), nn.Parameter(A), nn.Parameter(B)))
        triples = [
            LoRATriple(*tensors, scaling=SCALING, name=f"layer {i}", **layer.options)
            for i, (tensors, layer) in enumerate(zip(self.tensors, layers, strict=True))
        ]
        self.optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.05, **options)

    def placed(self, tensor: Tensor, placements: Any) -> Tensor:
        if self.mesh is None or placements is WHOLE:
            return tensor
        return distribute_tensor(tensor, self.mesh, placements, src_data_rank=None)

    def steps(self, count: int) -> None:
        for _ in range(count):
            for _, *factors in self.tensors:
                for factor in factors:
                    gradient = torch.randn(factor.shape, generator=self.generator)
                    factor.grad = self.placed(gradient, factor.placements if isinstance(factor, DTensor) else WHOLE)
            self.optimizer.step()

    def displacements(self) -> list[Tensor]:
        return [self.optimizer.displacement(f"layer {i}").product() for i in range(len(self.tensors))]


def part(tensor: Tensor) -> Tensor:
    """A copy of what this rank holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def result_on_rank(
    rank: int,
    shape: Sequence[int],
    placements: Any,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    events: str,
    options: Any,
    expected: Sequence[Tensor],
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Return this rank's part of every W with its part of what is expected, and the displacements."""
    run = Run(layers, dtype, placements, init_device_mesh("cpu", tuple(shape)), **options)
    EVENTS[events](run)
    parts = [
        (part(W), part(run.placed(W_0, placements[0]))) for (W, *_), W_0 in zip(run.tensors, expected, strict=True)
    ]
    return parts, run.displacements()


def result_alone(
    layers: Sequence[Layer], dtype: torch.dtype, events: str, options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    run = Run(layers, dtype, **options)
    EVENTS[events](run)
    return [W.detach().clone() for W, *_ in run.tensors], run.displacements()


def _restart(run: Run) -> None:
    run.steps(2)
    run.optimizer.restart()
    run.steps(2)


def _resync(run: Run) -> None:
    run.steps(2)
    with torch.no_grad():
        for _, A, B in run.tensors:
            A.mul_(0.5)
            B.mul_(2.5)
    run.optimizer.resync()
    run.steps(1)


def _rebase(run: Run) -> None:
    run.steps(2)
    run.optimizer.rebase()
    run.steps(2)


def _changed_outside(run: Run) -> None:
    run.steps(2)
    with torch.no_grad():
        for _, A, _ in run.tensors:
            A.mul_(0.5)
    run.steps(2)


def _ratio_off_and_on(run: Run) -> None:
    for ratio in (2.0, 0.0, 1.0, 1.0, 3.0):
        run.optimizer.groups[0].update_ratio = ratio
        run.steps(1)


EVENTS: dict[str, Callable[[Run], None]] = {
    "steps": lambda run: run.steps(5),
    "restart": _restart,
    "resync": _resync,
    "rebase": _rebase,
    "changed outside": _changed_outside,
    "ratio off and on": _ratio_off_and_on,
}
