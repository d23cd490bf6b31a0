"""A small model without any library, its triples and a run of plain LoRA next to it, for tests on several ranks."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deltaopt import LoRATriple
from tests.support.distributed import WORLD

RATIO, LR = 2.0, 1e-2


class LoRALinear(nn.Module):
    """W (c, d), A (c, 3) at zero and B (3, d), in modules that are sharded as others are."""

    def __init__(self, d: int, c: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(d, c, bias=False, dtype=dtype).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.zeros(c, 3)), nn.Parameter(torch.randn(3, d) / 2)
        self.scaling = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.weight.mT.float() + self.scaling * (x @ self.B.mT) @ self.A.mT


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LoRALinear(8, 17, dtype), nn.Tanh(), LoRALinear(17, 6, dtype))


def triples_of(model: nn.Module) -> list[LoRATriple]:
    """The triples, found again at each step."""
    return [
        LoRATriple((layer.base, "weight"), (layer, "A"), (layer, "B"), scaling=(layer, "scaling"), name=f"layer{i}")
        for i, layer in enumerate(module for module in model.modules() if isinstance(module, LoRALinear))
    ]


def small_batches(count: int, rank: int | None = None, first: int = 0) -> Iterator[Tensor]:
    """Batches of 8 rows; those of one rank are its share of them."""
    generator = torch.Generator().manual_seed(first)
    for _ in range(count):
        batch = torch.randn(8, 8, generator=generator)
        yield batch if rank is None else batch.chunk(WORLD)[rank]


def small_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def average_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= WORLD


def dense_run(count: int) -> list[Tensor]:
    """The effective weights, in float64, after steps of AdamW on whole batches by the paper's loop."""
    model = small_model().double()
    for layer in (model[0], model[2]):
        layer.forward = lambda x, layer=layer: x @ layer.base.weight.mT + layer.scaling * (x @ layer.B.mT) @ layer.A.mT
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    for batch in small_batches(count):
        before = [layer.A.detach() @ layer.B.detach() for layer in (model[0], model[2])]
        inner.zero_grad()
        small_loss(model, batch.double()).backward()
        inner.step()
        for layer, product in zip((model[0], model[2]), before, strict=True):
            layer.base.weight.data += RATIO * layer.scaling * (layer.A.detach() @ layer.B.detach() - product)
    return effective(model)


def effective(model: nn.Module) -> list[Tensor]:
    """W + s A B of each layer, in float64, by the scaling that the branch has now."""
    return [
        layer.base.weight.detach().double() + layer.scaling * layer.A.detach().double() @ layer.B.detach().double()
        for layer in model.modules()
        if isinstance(layer, LoRALinear)
    ]
