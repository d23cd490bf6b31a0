"""The contract of torchtune 0.6's LoRALinear: attributes, forward pass and switches, in a module of that name.

torchtune itself imports with torchao 0.9 alone, which does not go with the other libraries of the tests.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

NAME = "torchtune.modules.peft"


class LoRALinear(nn.Module):
    """W as `weight`, the factors as two layers, and a branch that is multiplied by alpha / rank."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float = 0.0, use_bias=False):
        super().__init__()
        self.in_dim, self.out_dim, self.rank, self.alpha = in_dim, out_dim, rank, alpha
        self.disabled = self.merged = False
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) * 0.3)
        self.register_parameter("bias", nn.Parameter(torch.randn(out_dim)) if use_bias else None)
        self.dropout = nn.Dropout(p=dropout) if dropout > 0.0 else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)

    def adapter_params(self) -> list[str]:
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, x: Tensor) -> Tensor:
        out = functional.linear(x, self.weight, self.bias)
        if self.disabled:
            return out
        return out + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(x)))


class QATLoRALinear(LoRALinear):
    """Rounds W in its forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.round()) + self.lora_b(self.lora_a(x))


class DoRALinear(nn.Module):
    """Divides by the norm of W and the branch together."""

    def adapter_params(self) -> list[str]:
        return ["lora_a.weight", "lora_b.weight", "magnitude"]


def set_trainable_params(model: nn.Module, adapter_params: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapter_params)


def get_adapter_params(model: nn.Module) -> set[str]:
    return {
        f"{name}.{param}".lstrip(".")
        for name, module in model.named_modules()
        if hasattr(module, "adapter_params")
        for param in module.adapter_params()
    }


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    found = [module for module in model.modules() if hasattr(module, "adapter_params")]
    for module in found:
        module.disabled = True
    yield
    for module in found:
        module.disabled = False


@pytest.fixture
def torchtune(monkeypatch):
    """Return torchtune's module where it can be imported, and the twin elsewhere."""
    try:
        import torchtune.modules.peft as real
    except ImportError:
        twin = types.ModuleType(NAME)
        names = ("LoRALinear", "QATLoRALinear", "DoRALinear", "set_trainable_params", "get_adapter_params")
        for name in (*names, "disable_adapter"):
            setattr(twin, name, globals()[name])
        monkeypatch.setitem(sys.modules, NAME, twin)
        return twin
    return real
