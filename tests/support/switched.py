"""Layers of a user's own, with LoRA branches in their forward pass that can be switched off one by one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaopt import DeltaLoRAOptimizer, LoRATriple

C, D, R = 5, 7, 3
"""Rows and columns of the matrix that a branch moves, and the rank of the branch."""


class Branch(nn.Module):
    """A (c, r) and B (r, d1, ...) next to a weight or a part of it, with a product that is not zero.

    Args:
        options: of its triple: how W is stored, and which part of it the branch belongs to.
        d1: the shape of B without its first dimension.
    """

    def __init__(self, options: dict[str, Any], *d1: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(C, R) / 2), nn.Parameter(torch.randn(R, *d1) / 2)
        self.scaling, self.on, self.options = 0.5, True, options

    def is_on(self) -> bool:
        return self.on

    def product(self, W: Tensor) -> Tensor:
        """Return scaling * A @ B, stored as W is."""
        return self.placed(self.scaling * self.A @ self.B.flatten(1), W).to(W.dtype)

    def placed(self, dense: Tensor, W: Tensor) -> Tensor:
        """Store a (c, d) matrix as W is, zero where the branch does not belong."""
        if self.options["layout"] == "conv":
            return dense.view(W.shape)
        rows, columns = self.options.get("rows"), self.options.get("columns")
        c, d = W.shape if self.options["layout"] == "linear" else W.shape[::-1]
        whole = dense.new_zeros(c, d)
        whole[slice(*rows or (0, c)), slice(*columns or (0, d))] = dense
        return whole if self.options["layout"] == "linear" else whole.mT

    def triple(self, layer: nn.Module, name: str = "q", **options: Any) -> LoRATriple:
        options = {"is_active": self.is_on, **self.options, **options}
        return LoRATriple((layer, "weight"), (self, "A"), (self, "B"), scaling=(self, "scaling"), name=name, **options)


class Layer(nn.Module):
    """Adds the product of each branch that is on to what it computes from its weight."""

    branches: nn.ModuleDict

    def computed(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.computed(self.weight, self.bias, x)
        for branch in self.branches.values():
            if branch.on:
                out = out + self.computed(branch.product(self.weight), None, x)
        return out

    def with_branches(self, **branches: Branch) -> "Layer":
        self.branches = nn.ModuleDict(branches)
        self.weight.requires_grad_(False)
        return self.double()

    def triples(self, **options: Any) -> list[LoRATriple]:
        return [branch.triple(self, name, **options) for name, branch in self.branches.items()]


class Linear(Layer, nn.Linear):
    def computed(self, weight, bias, x):
        return functional.linear(x, weight, bias)


class Transposed(Layer):
    """Stores its weight as (d, c), as GPT-2 does."""

    def __init__(self, d: int, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, c)), nn.Parameter(torch.randn(c))

    def computed(self, weight, bias, x):
        return functional.linear(x, weight.mT, bias)


class Embedding(Layer, nn.Embedding):
    bias = None

    def computed(self, weight, bias, x):
        return functional.embedding(x, weight)


class Conv1d(Layer, nn.Conv1d):
    def computed(self, weight, bias, x):
        return self._conv_forward(x, weight, bias)


class Conv2d(Layer, nn.Conv2d):
    def computed(self, weight, bias, x):
        return self._conv_forward(x, weight, bias)


class Conv3d(Layer, nn.Conv3d):
    def computed(self, weight, bias, x):
        return self._conv_forward(x, weight, bias)


def _conv(cls: type, kernel: tuple[int, ...]) -> Callable[[], Layer]:
    def build() -> Layer:
        return cls(4, C, kernel, padding=1, padding_mode="circular").with_branches(
            q=Branch({"layout": "conv"}, 4, *kernel)
        )

    return build


def _fused() -> Layer:
    parts = {name: (C * i, C * (i + 1)) for i, name in enumerate("qkv")}
    return Linear(D, 3 * C).with_branches(
        **{name: Branch({"layout": "linear", "rows": rows}, D) for name, rows in parts.items()}
    )


LAYERS: dict[str, Callable[[], Layer]] = {
    "linear": lambda: Linear(D, C).with_branches(q=Branch({"layout": "linear"}, D)),
    "transposed": lambda: Transposed(D, C).with_branches(q=Branch({"layout": "transposed"}, D)),
    "embedding": lambda: Embedding(D, C).with_branches(q=Branch({"layout": "embedding"}, D)),
    "conv1d": _conv(Conv1d, (3,)),
    "conv2d": _conv(Conv2d, (3, 2)),
    "conv3d": _conv(Conv3d, (3, 2, 1)),
    "fused": _fused,
    "columns": lambda: Linear(D + 4, C).with_branches(q=Branch({"layout": "linear", "columns": (2, 2 + D)}, D)),
    "transposed_rows": lambda: Transposed(D, 3 * C).with_branches(
        q=Branch({"layout": "transposed", "rows": (C, 2 * C)}, D)
    ),
}
"""By how the weight is stored, and which part of it moves."""


def layer_and_input(
    kind: str = "linear", dtype: torch.dtype = torch.float64, factors: torch.dtype | None = None, seed: int = 0
) -> tuple[Layer, Tensor]:
    """Return a layer whose W is of this dtype, with `factors` of that one or of another, and an input."""
    torch.manual_seed(seed)
    layer = LAYERS[kind]().to(dtype)
    layer.branches.to(factors or dtype)
    sizes = {"conv1d": (4, 6), "conv2d": (4, 6, 5), "conv3d": (4, 4, 4, 4), "columns": (3, D + 4)}
    x = torch.randint(D, (2, 3)) if kind == "embedding" else torch.randn(2, *sizes.get(kind, (3, D)), dtype=dtype)
    return layer, x


def optimizer_of(layer: Layer, **options: Any) -> DeltaLoRAOptimizer:
    """Return an optimizer of all branches of a layer; it moves W from the second step on."""
    options = {"lr": 2e-2, "start_step": 1, **options}
    return DeltaLoRAOptimizer(options.pop("inner", torch.optim.AdamW), layer.triples(), **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 0.5).square().mean().backward()
        optimizer.step()


@contextmanager
def off(layer: Layer, *names: str) -> Iterator[None]:
    """Switch these branches off; all of them if none is named."""
    chosen = [layer.branches[name] for name in names] if names else list(layer.branches.values())
    for branch in chosen:
        branch.on = False
    try:
        yield
    finally:
        for branch in chosen:
            branch.on = True


@torch.no_grad()
def base_output(layer: Layer, x: Tensor) -> Tensor:
    """Return what a layer gives with all of its branches switched off."""
    with off(layer):
        return layer(x)
