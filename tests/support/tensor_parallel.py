"""A model of nn.Linear with low-rank branches, split by `parallelize_module`, and its twin in one process."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from deltaopt import DeltaLoRAOptimizer, LoRATriple

SCALING, RANK = 0.5, 3


class Adapted(nn.Module):
    """base(x) + scaling * lora_B(lora_A(x)), as PEFT has it; without the branch if `active` is False."""

    def __init__(self, d: int, c: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.base = nn.Linear(d, c, bias=bias, dtype=dtype).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(d, RANK, bias=False), nn.Linear(RANK, c, bias=False)
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x.to(next(self.base.parameters()).dtype))
        return out + SCALING * self.lora_B(self.lora_A(x.float())) if self.active else out.clone()


class Block(nn.Module):
    """Two layers of which the first is split by the columns of x @ W.T, and the second by its rows."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = Adapted(8, 16, dtype, bias), Adapted(16, 6, dtype, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def block(dtype: torch.dtype = torch.float32, bias: bool = False) -> Block:
    model, generator = Block(dtype, bias), torch.Generator().manual_seed(0)
    for p in model.parameters():  # by a generator of its own, as ranks may be threads
        p.data.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model


def split(model: Block, mesh: DeviceMesh) -> Block:
    """Split the base layers and the factors on their sides; the others of A and B stay whole on each rank."""
    plan = {
        "up.base": ColwiseParallel(),
        "up.lora_B": ColwiseParallel(),
        "down.base": RowwiseParallel(),
        "down.lora_A": RowwiseParallel(),
    }
    parallelize_module(model, mesh, plan)
    return model


def triples_of(model: Block, **settings: Any) -> list[LoRATriple]:
    return [
        LoRATriple(
            (layer.base, "weight"),
            (layer.lora_B, "weight"),
            (layer.lora_A, "weight"),
            scaling=SCALING,
            name=name,
            **settings,
        )
        for name, layer in (("up", model.up), ("down", model.down))
    ]


def batch(step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 + step))


def train(model: Block, optimizer: torch.optim.Optimizer, steps: Sequence[int], rows: slice = slice(None)) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)[rows]).float().square().mean().backward()
        optimizer.step()


def fully_sharded_weight(W: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """What FSDP2 along "dp" makes of a W that tensor parallelism has sharded over "tp" along a dimension of it."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(W, mesh["tp"], [Shard(dim)], src_data_rank=None))
    return fully_shard(layer, mesh=mesh["dp"]).weight


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, by torch's own collectives; a copy of another tensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


class Course(NamedTuple):
    """What a split model has gone through, all of it whole: W at the end, A and B after each step."""

    weights: list[Tensor]
    displacements: list[Tensor]
    factors: list[list[Tensor]]


def factors_of(model: Block) -> list[Tensor]:
    return [factor for triple in triples_of(model) for factor in (triple.A, triple.B)]


def course(model: Block, steps: int, rows: slice = slice(None), **settings: Any) -> tuple[Course, DeltaLoRAOptimizer]:
    """Train a model, with these rows of each batch."""
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples_of(model), lr=1e-2, **settings)
    factors = []
    for step in range(steps):
        train(model, optimizer, [step], rows)
        factors.append([whole(factor) for factor in factors_of(model)])
    weights = [whole(triple.W) for triple in optimizer.triples]
    displacements = [optimizer.displacement(triple.name).product() for triple in optimizer.triples]
    return Course(weights, displacements, factors), optimizer


class Following(torch.optim.Optimizer):
    """Gives its parameters the values that those of another run have had."""

    def __init__(self, params: Any, values: Iterable[Sequence[Tensor]]) -> None:
        super().__init__(params, {})
        self._values = iter(values)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, value in zip(self.param_groups[0]["params"], next(self._values), strict=True):
            p.copy_(value)


def followed(model: Block, factors: Sequence[Sequence[Tensor]], **settings: Any) -> Course:
    """The same course of W in one process, whose factors are those of another run."""
    optimizer = DeltaLoRAOptimizer(Following, triples_of(model), values=factors, **settings)
    for p in factors_of(model):
        p.grad = torch.zeros_like(p)
    for _ in factors:
        optimizer.step()
    weights = [triple.W.detach() for triple in optimizer.triples]
    displacements = [optimizer.displacement(triple.name).product() for triple in optimizer.triples]
    return Course(weights, displacements, list(factors))


def assert_same_course(found: Course, expected: Course) -> None:
    """Bits in 16 bits, and the last place in float32, where a product depends on the sizes."""
    for W, other in zip(found.weights, expected.weights, strict=True):
        if W.dtype is torch.float32:
            torch.testing.assert_close(W, other, rtol=0, atol=5e-7)
        else:
            assert torch.equal(W, other)
    for moved, other in zip(found.displacements, expected.displacements, strict=True):
        torch.testing.assert_close(moved, other, rtol=1e-5, atol=1e-6)
