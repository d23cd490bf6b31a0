"""The base layer's output without touching W: a forward hook that takes displacement @ x off the layer's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from deltaopt.lowrank import LowRank
from deltaopt.rounding.blocks import full_precision
from deltaopt.weight import WeightState

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
"""By the number of dimensions of W."""


def hook_problem(weight: WeightState) -> str | None:
    """Say why the output of this weight's layer cannot be corrected by a hook; None if it can."""
    triple, module = weight.triple, weight.triple.weight_module()
    if module is None:
        return 'it was registered by its tensors, so that its module is not known: register ((module, "weight"), A, B)'
    if triple.tied:
        return "its W is used in another place too, which a hook would leave as it is"
    # Exactly these: what a subclass computes is its own (Gemma scales its embeddings).
    kinds = {"linear": (nn.Linear,), "embedding": (nn.Embedding,), "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
    fits = type(module) in kinds.get(triple.layout, ()) and getattr(module, "max_norm", None) is None
    fits |= triple.layout == "transposed" and type(module).__name__ == "Conv1D"
    if fits and (triple.layout != "conv" or triple.view.moves_all):
        return None
    return (
        f"what a {type(module).__name__} with the layout {triple.layout!r} computes from W is not known here (hooks "
        "know nn.Linear, Conv1D, nn.Embedding without max_norm, and convolutions, but no classes made from them)"
    )


def subtract_from_output(weight: WeightState, displacement: LowRank) -> RemovableHandle:
    """Let the layer's forward pass give W x minus displacement x, until the handle is removed.

    The product is computed in the dtype of the factors and the difference rounded once to the output's.
    """
    layout, module = weight.triple.layout, weight.triple.weight_module()
    assert module is not None
    A, B = weight.triple.view.padded(displacement.A.detach(), displacement.B.detach(), weight.tensors.W)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        with full_precision(output.device):
            return (output.to(A.dtype) - _applied(module, x, A, B, layout)).to(output.dtype)

    return module.register_forward_hook(hook, with_kwargs=True)


def _applied(module: nn.Module, x: Tensor, A: Tensor, B: Tensor, layout: str) -> Tensor:
    """Apply A @ B in the place of the layer's weight, without bias."""
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
