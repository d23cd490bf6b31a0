"""The smallest things that an optimizer takes: one layer as three tensors, and one that loses its ledger."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.compare import refused
from tests.support.runs import noisy_step


def small_layer(c: int = 4, d: int = 6, r: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W (c, d) frozen, A (c, r) and B (r, d) trained, with gradients on A and B."""
    generator = torch.Generator().manual_seed(seed)
    W, A, B = (torch.randn(shape, generator=generator) for shape in ((c, d), (c, r), (r, d)))
    for factor in (A, B):
        factor.requires_grad_()
        factor.grad = torch.randn(factor.shape, generator=generator)
    return W, A, B


def small_triple(name: str = "q", seed: int = 0, **options: Any) -> LoRATriple:
    """A named triple of `small_layer`."""
    return LoRATriple(*small_layer(seed=seed), name=name, **options)


class HandmadeLayer(nn.Linear):
    """Keeps W (5, 7), A and B in one module that says in `merged` whether W holds the branch, as loralib does.

    The forward pass of a test multiplies by `weight + scaling * A @ B`.
    """

    def __init__(self, scaling: float = 0.5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(7, 5, bias=False)
        self.weight.requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 7))
        self.scaling, self.merged = scaling, False
        self.to(dtype)

    def triple(self, name: str = "q") -> LoRATriple:
        return LoRATriple((self, "weight"), (self, "A"), (self, "B"), scaling=(self, "scaling"), name=name)


def random_steps(optimizer: torch.optim.Optimizer, count: int = 1, seed: int = 0) -> None:
    """Take `count` steps on random gradients for everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


def refuses_triples(*triples: Any) -> str:
    """Return the message with which an optimizer refuses these triples."""
    return refused(
        lambda: DeltaLoRAOptimizer(torch.optim.SGD, list(triples), lr=0.1), ValueError, "these triples cannot be used"
    )


def wide_layer(
    update_ratio: float | Callable[[int], float], rank: int = 8, width: int = 300, **options: Any
) -> tuple[DeltaLoRAOptimizer, Tensor, Tensor, Tensor]:
    """The optimizer of a layer that is large enough for its ledger to be given up, and its W, A and B."""
    A = torch.zeros(width, rank, dtype=torch.float64, requires_grad=True)
    B = torch.randn(rank, width, dtype=torch.float64, requires_grad=True)
    W = torch.randn(width, width, dtype=torch.float64)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [(W, A, B)], lr=0.01, update_ratio=update_ratio, **options)
    return optimizer, W, A, B


def run_without_displacement(**options: Any) -> tuple[DeltaLoRAOptimizer, Tensor, Tensor]:
    """(optimizer, W, W before) of a run whose displacement is not known any more."""
    optimizer, W, A, B = wide_layer(lambda step: 1.0 + step / 50, **options)
    W0 = W.clone()

    def train() -> None:
        for _ in range(24):
            noisy_step(optimizer, A, B)

    with pytest.warns(RuntimeWarning, match="not known as low-rank terms"):
        train()
    return optimizer, W, W0
