"""The base layer's output without touching W: a forward hook that takes displacement @ x off the layer's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaopt.layouts import LAYOUTS
from deltaopt.lowrank import LowRank
from deltaopt.rounding import full_precision
from deltaopt.triple import LoRATriple

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
"""By the number of dimensions of W."""


def hook_problem(triple: LoRATriple) -> str | None:
    """Why the output of this triple's layer can not be corrected by a hook; None if it can."""
    module = triple.weight_module()
    if module is None:
        return 'it was registered by its tensors, so that its module is not known: register ((module, "weight"), A, B)'
    if triple.tied:
        return "its W is used in another place too, which a hook would leave as it is"
    # Exactly these: what a subclass computes is its own (Gemma scales its embeddings).
    kinds = {"linear": (nn.Linear,), "embedding": (nn.Embedding,), "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
    fits = type(module) in kinds.get(triple.layout, ()) and getattr(module, "max_norm", None) is None
    fits |= triple.layout == "transposed" and type(module).__name__ == "Conv1D"
    if fits and not (triple.layout == "conv" and (triple.rows or triple.columns)):
        return None
    return (
        f"what a {type(module).__name__} with the layout {triple.layout!r} computes from W is not known here (hooks "
        "know nn.Linear, Conv1D, nn.Embedding without max_norm, and convolutions, but no classes made from them)"
    )


def subtract_from_output(triple: LoRATriple, displacement: LowRank) -> torch.utils.hooks.RemovableHandle:
    """Let the layer's forward pass give W x minus displacement x, until the handle is removed.

    The product is computed in the dtype of the factors and the difference rounded once to the output's.
    """
    module = triple.weight_module()
    assert module is not None
    A, B = _whole(triple, displacement)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        with full_precision(output.device):
            return (output.to(A.dtype) - _applied(module, x, A, B, triple.layout)).to(output.dtype)

    return module.register_forward_hook(hook, with_kwargs=True)


def _applied(module: nn.Module, x: Tensor, A: Tensor, B: Tensor, layout: str) -> Tensor:
    """(A @ B) in the place of the layer's weight, without bias."""
    if layout == "embedding":
        return functional.linear(functional.embedding(x, B.mT), A)
    x = x.to(A.dtype)
    if layout != "conv":
        return functional.linear(functional.linear(x, B), A)
    weight: Any = module.weight
    inner: Any = module
    kernel = [1] * (weight.dim() - 2)
    hidden = inner._conv_forward(x, B.view(-1, *weight.shape[1:]), None)
    return CONVOLUTIONS[weight.dim()](hidden, A.view(*A.shape, *kernel))


def _whole(triple: LoRATriple, displacement: LowRank) -> tuple[Tensor, Tensor]:
    """The factors of the displacement of all of W, zero outside of the rows and columns that move."""
    A, B = displacement.A.detach(), displacement.B.detach()
    c, d = LAYOUTS[triple.layout].weight(triple.W).shape[-2:]
    if triple.rows is not None:
        start, stop = triple.rows
        A = functional.pad(A, (0, 0, start, c - stop))
    if triple.columns is not None:
        start, stop = triple.columns
        B = functional.pad(B, (start, d - stop))
    return A, B
