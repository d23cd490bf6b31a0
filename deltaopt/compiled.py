"""What `torch.compile` needs: a correction as one operation that it does not look into, and graphs of this model alone.

A compiled graph keeps the numbers and the code that it saw when it was made. So what a hook adds to an output is an
operation of its own, which looks the movement of W up whenever it runs; ranks, ratios and sums may change.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


class Correction(Protocol):
    """What is done to the output of a layer."""

    def corrected(self, output: Tensor, x: Tensor, rows: list[int] | None) -> Tensor:
        """Return the output without the movement of W, in these rows; None for all rows."""

    def pulled_back(self, grad: Tensor, x: Tensor, rows: list[int] | None) -> Tensor:
        """Return the gradient that x gets by what `corrected` adds to the output."""


_corrections: WeakValueDictionary[int, Correction] = WeakValueDictionary()
_keys = count()


def enroll(correction: Correction) -> Tensor:
    """Return the number by which a compiled graph finds the correction.

    It is a tensor, so that a graph takes it as an input: layers of one kind have one graph, and a number would be part
    of it.
    """
    key = next(_keys)
    _corrections[key] = correction
    with torch.inference_mode(False):
        return torch.tensor(key, device="cpu")


# A CUDA graph would replay the numbers of its first run.
@torch.library.custom_op("deltaopt::corrected", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def corrected(output: Tensor, x: Tensor, key: Tensor, rows: list[int] | None) -> Tensor:
    """Call `Correction.corrected` of the correction with this key."""
    result = _corrections[int(key)].corrected(output, x, rows)
    return output.clone() if result is output else result


@torch.library.custom_op("deltaopt::pulled_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _pulled_back(grad: Tensor, x: Tensor, key: Tensor, rows: list[int] | None) -> Tensor:
    """Call `Correction.pulled_back` of the correction with this key."""
    return _corrections[int(key)].pulled_back(grad, x, rows)


@corrected.register_fake
def _(output: Tensor, x: Tensor, key: Tensor, rows: list[int] | None) -> Tensor:
    return torch.empty_like(output)


@_pulled_back.register_fake
def _(grad: Tensor, x: Tensor, key: Tensor, rows: list[int] | None) -> Tensor:
    return torch.empty_like(x)


def _keep_input(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, x, key, ctx.rows = inputs
    ctx.save_for_backward(x, key)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, key = ctx.saved_tensors
    pulled = _pulled_back(grad, x, key, ctx.rows) if ctx.needs_input_grad[1] else None
    return grad, pulled, None, None


corrected.register_autograd(_backward, setup_context=_keep_input)


def renew_graphs(module: nn.Module) -> None:
    """Let no graph run on this module that was made without its new hook: of itself before, or of one like it.

    Before torch runs a graph it checks the types of a module's dicts, and not whether there are hooks: so the type of
    one is changed, which tells the module from those without a hook, whose graphs may be made at any time. The graphs
    that were made before are dropped, as torch makes only a few of one piece of code.
    """
    module._parameters = OrderedDict(module._parameters)
    if "torch._dynamo" in sys.modules:  # else nothing was compiled
        torch.compiler.reset()
