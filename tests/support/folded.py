"""Layers for what is the folded rule's own: where the scaling is, what holds the optimizer, what W cannot be read."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import strategies
from tests.support.runs import LayerRun

DEFAULT_RATIO = 2.0
"""The `update_ratio` that an optimizer has by itself: folded into a scaling of 0.5 it gives 1.5."""


def in_place_and_folded(
    steps: int = 0, micro: int = 1, clip: str | None = None, **options: Any
) -> tuple[LayerRun, LayerRun]:
    """(in place, folded): two runs of the same layer after the same steps."""
    in_place, folded = (LayerRun(rule, **options) for rule in strategies.RULES)
    return in_place.train(steps, micro, clip), folded.train(steps, micro, clip)


def linear_layer(name: str, seed: int, zero: bool = True) -> tuple[strategies.Stored, Tensor, LoRATriple]:
    """A layer, the tensor that its branch is multiplied by, and its triple."""
    stored = strategies.make("linear", seed, zero_A=zero)
    scale = torch.tensor(0.5, dtype=torch.float64)
    return stored, scale, stored.triple(scale, name)


def packed_layer(zero: bool = False) -> strategies.Stored:
    """A layer whose W cannot be read as a matrix."""
    stored = strategies.make("linear", zero_A=zero)
    stored.W = torch.randint(0, 255, ((strategies.C * strategies.D + 1) // 2, 1), dtype=torch.uint8)
    return stored


def folded_optimizer(*triples: LoRATriple, inner: Any = torch.optim.SGD, **options: Any) -> DeltaLoRAOptimizer:
    options = {"lr": 0.1, "weight_update": "folded", **options}
    return DeltaLoRAOptimizer(inner, list(triples), **options)


def warns_of_a_takeover():
    """The warning of a second optimizer on the same factors."""
    return pytest.warns(
        UserWarning, match=r"an earlier optimizer has folded .* q \(0\.5, now 1\.5\), .* ratios multiply"
    )


class HoldsItsOptimizer(nn.Module):
    """A module that holds the optimizer of its factors, and is copied with it."""

    def __init__(self, rule: str = "folded") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.randn(2, 6))
        self.scaling = 0.5
        triple = LoRATriple((self, "W"), (self, "A"), (self, "B"), scaling=(self, "scaling"), name="q")
        self.optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update=rule)

    def backward(self) -> None:
        (self.W + self.scaling * self.A @ self.B).square().sum().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()


class ScaledLayer(nn.Module):
    """As a library may write it: `place` says where the branch's scaling is."""

    def __init__(self, place: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.weight = nn.Parameter(new(4, 6), requires_grad=False)
        self.lora_B, self.lora_A = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64)), nn.Parameter(new(2, 6))
        self.rank, self.alpha, self.scaling, self.config = 2, 1.0, 0.5, types.SimpleNamespace(scaling=0.5)
        if place == "buffer":
            del self.scaling
            self.register_buffer("scaling", torch.tensor(0.5, dtype=torch.float64))
        self.place = place

    def branch_scaling(self) -> float | Tensor:
        return {"alpha": self.alpha / self.rank, "nested": self.config.scaling}.get(self.place, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.branch_scaling() * (x @ self.lora_A.mT @ self.lora_B.mT)

    def tensors(self) -> list[tuple[nn.Module, str]]:
        return [(self, name) for name in ("weight", "lora_B", "lora_A")]

    def triple(self) -> LoRATriple:
        if self.place == "alpha":  # as in torchtune, where forward divides alpha by the rank
            return LoRATriple(*self.tensors(), scaling=0.5, name="q", set_scaling=self.set_scaling)
        path = "config.scaling" if self.place == "nested" else "scaling"
        return LoRATriple(*self.tensors(), scaling=(self, path), name="q")

    def set_scaling(self, scaling: float) -> None:
        self.alpha = scaling * self.rank


class CallsTwice(torch.optim.SGD):
    """Evaluates the loss twice within a step."""

    def step(self, closure):
        closure()
        return super().step(closure)
