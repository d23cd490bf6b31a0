"""The layers that are trained: one made by hand, and one that PEFT makes, with the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaopt import LoRATriple, find_triples

SCALING = 0.5

C, D, R = 16, 12, 4
"""W is (C, D), A (C, R), B (R, D)."""


def numbers(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, nn.Parameter, nn.Parameter]:
    """Return W in float64, and A and B in `dtype`, the same at each call; their product is not zero."""
    c, d, r = shape
    generator = torch.Generator().manual_seed(4)
    W, A, B = (
        torch.randn(size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5
        for size in ((c, d), (c, r), (r, d))
    )
    return W, nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype))


class Layer(nn.Module):
    """Multiplies by W + scaling * A @ B in float64, whatever A and B are in.

    Args:
        dtype: of A and B.
        shape: (c, d, r).
    """

    def __init__(self, dtype: torch.dtype = torch.float64, shape: tuple[int, int, int] = (C, D, R)) -> None:
        super().__init__()
        W, self.A, self.B = numbers(shape, dtype)
        self.W = nn.Parameter(W, requires_grad=False)
        self.scaling = SCALING

    @property
    def factors(self) -> list[Tensor]:
        """A and B."""
        return [self.A, self.B]

    def put(self, A: nn.Parameter, B: nn.Parameter) -> Layer:
        """Take these as the factors: the reference trains its own."""
        self.A, self.B = A, B
        return self

    def weight(self) -> Tensor:
        """Return what the layer multiplies by, as its forward pass computes it."""
        return self.W + self.scaling * (self.A.double() @ self.B.double())

    def triples(self) -> list[LoRATriple]:
        return [LoRATriple((self, "W"), (self, "A"), (self, "B"), scaling=(self, "scaling"), name="q")]


class PeftLayer(nn.Module):
    """The same layer as a model of PEFT, in float64; PEFT's `lora_B` is A, and its `lora_A` is B."""

    def __init__(self, dtype: torch.dtype = torch.float64, shape: tuple[int, int, int] = (C, D, R)) -> None:
        import peft

        super().__init__()
        c, d, r = shape
        base = nn.Sequential()
        base.add_module("q", nn.Linear(d, c, bias=False, dtype=torch.float64))
        config = peft.LoraConfig(r=r, lora_alpha=int(SCALING * r), target_modules=["q"])
        self.model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        W, A, B = numbers(shape, dtype)
        self.layer.base_layer.weight.data.copy_(W)
        self.put(A, B)

    @property
    def layer(self) -> nn.Module:
        return self.model.base_model.model.q

    @property
    def W(self) -> Tensor:
        return self.layer.base_layer.weight

    @property
    def A(self) -> nn.Parameter:
        return self.layer.lora_B["default"].weight

    @property
    def B(self) -> nn.Parameter:
        return self.layer.lora_A["default"].weight

    @property
    def factors(self) -> list[Tensor]:
        return [self.A, self.B]

    def put(self, A: nn.Parameter, B: nn.Parameter) -> PeftLayer:
        self.layer.lora_B["default"].weight, self.layer.lora_A["default"].weight = A, B
        return self

    def weight(self) -> Tensor:
        return self.model(torch.eye(self.W.shape[1], dtype=torch.float64)).mT

    def triples(self) -> list[LoRATriple]:
        return find_triples(self.model)
