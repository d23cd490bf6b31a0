"""DyLoRA (arXiv 2210.07558): LoRA that is trained at a rank drawn for each step, so that it works at all of them.

A step draws b from 1 .. r, the same for all layers, and computes

    h = W x + alpha / b * A[:, :b] B[:b] x

so that the first b columns of A and rows of B get a gradient: the paper's main version, and the default of its code.
(The variant that it calls frozen trains the b-th column and row alone.) The others have a gradient of zero, as in its
code: AdamW moves them still, by what its moments remember. The model is evaluated at the full rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class DyLoraLinear(nn.Module):
    """A frozen linear layer with a branch of A (c, r) and B (r, d).

    Args:
        base_layer: the layer with W (c, d).
        r: the full rank.
        alpha: the branch is scaled by alpha / b.
        dropout: of the branch's input.

    Attributes:
        rank: b of the present step; while the module does not train, it computes at the full rank.
    """

    def __init__(self, base_layer: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        W = base_layer.weight
        self.base_layer = base_layer
        self.A = nn.Parameter(W.new_zeros(W.shape[0], r))
        self.B = nn.Parameter(W.new_zeros(r, W.shape[1]))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.alpha = alpha
        self.rank = r

    @property
    def full_rank(self) -> int:
        return self.B.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        b = self.rank if self.training else self.full_rank
        branch = functional.linear(functional.linear(self.dropout(x), self.B[:b]), self.A[:, :b])
        output: Tensor = self.base_layer(x) + self.alpha / b * branch
        return output


def add_dylora(
    model: nn.Module, names: Sequence[str], r: int, alpha: float, dropout: float = 0.0
) -> dict[str, DyLoraLinear]:
    """Put a DyLoRA layer in the place of each named linear layer; return them by name."""
    layers = {}
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layers[name] = DyLoraLinear(base, r, alpha, dropout)
        model.set_submodule(name, layers[name])
    return layers


def drawn_ranks(r: int, steps: int, generator: torch.Generator) -> list[int]:
    """Return b of each step of a run, uniform in 1 .. r. Step k has the same b, wherever a run was continued."""
    return torch.randint(1, r + 1, (steps,), generator=generator).tolist()
