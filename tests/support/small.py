"""The smallest things that an optimizer takes: one layer as three tensors, and one whose ledger is lost."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.compare import refused
from tests.support.internals import change_ledger
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
    """The optimizer of a layer that is large enough for its ledger to be much smaller, and its W, A and B."""
    A = torch.zeros(width, rank, dtype=torch.float64, requires_grad=True)
    B = torch.randn(rank, width, dtype=torch.float64, requires_grad=True)
    W = torch.randn(width, width, dtype=torch.float64)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [(W, A, B)], lr=0.01, update_ratio=update_ratio, **options)
    return optimizer, W, A, B


LOST = (
    "the displacement is not known as low-rank terms any more: update_ratio changed so often that its rank passed 134, "
    "the limit for a weight of 300 x 300"
)
"""What a state says that an earlier version has saved: it gave up a ledger whose terms had become as large as W."""


def run_without_displacement(**options: Any) -> tuple[DeltaLoRAOptimizer, Tensor, Tensor]:
    """(optimizer, W, W before) of a run that was resumed from such a state."""
    optimizer, W, A, B = wide_layer(1.5, **options)
    W0 = W.clone()
    noisy_step(optimizer, A, B)
    state = optimizer.state_dict()
    change_ledger(state, "triple0", lambda record: record.update(lost=LOST, terms=[]))
    optimizer.load_state_dict(state)
    return optimizer, W, W0
