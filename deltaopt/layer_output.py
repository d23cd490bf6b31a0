"""What a layer computes from its W: with a product of low rank in W's place, and with another W.

It is known for torch's own layers and GPT-2's Conv1D, and for no class that has a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaopt.layouts import MatrixView
from deltaopt.lowrank import Term, joined
from deltaopt.modules import class_of
from deltaopt.rounding.blocks import full_precision

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
"""By the number of dimensions of W."""

KINDS: dict[str, tuple[Any, ...]] = {
    "linear": (nn.Linear,),
    "embedding": (nn.Embedding,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
}
"""By the layout of W: modules whose forward pass is known."""

Further: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a forward pass after x, by position and by name."""

TIED = "its W is used in another place too, which a hook would leave as it is"


def output_problem(module: nn.Module | None, view: MatrixView, tied: bool = False) -> str | None:
    """Say why the output of a module cannot be corrected by its displacement alone; None if it can.

    Args:
        module: whose weight W is; None for a W that was registered as a tensor.
        view: of W.
        tied: W is used in another place too.
    """
    if module is None:
        return 'it was registered by its tensors, so that its module is not known: register ((module, "weight"), A, B)'
    if tied:
        return TIED
    if _is_known(module, view) and (view.layout != "conv" or view.moves_all):
        return None
    return (
        f"what a {class_of(module).__name__} with the layout {view.layout!r} computes from W is not known here (hooks "
        "know nn.Linear, Conv1D, nn.Embedding without max_norm, convolutions, and classes made from these that inherit "
        "their forward pass)"
    )


def _is_known(module: nn.Module, view: MatrixView) -> bool:
    """Tell if the forward pass is one of torch's own; what a subclass computes is its own (Gemma scales embeddings)."""
    if view.layout == "transposed":
        return class_of(module).__name__ == "Conv1D"
    own: Any = type(module)
    known = any(isinstance(module, kind) and own.forward is kind.forward for kind in KINDS.get(view.layout, ()))
    return known and getattr(module, "max_norm", None) is None


def product_on(owner: nn.Module, W: Tensor, x: Tensor, terms: Sequence[Term], view: MatrixView) -> Tensor:
    """Return what the sum of the terms gives in the place of a module's W, without bias, in the dtype of the terms.

    Args:
        owner: the module, for the stride and the padding of a convolution.
        W: its weight, for the shape and the dtype.
        x: its input.
        terms: of W; at least one.
        view: of W.
    """
    with full_precision(x.device):
        found = [
            _applied(owner, W, x, term.to(x.device, torch.promote_types(term.A.dtype, W.dtype)), view)
            for term in _few(terms)
        ]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def _few(terms: Sequence[Term]) -> Sequence[Term]:
    """Return the terms as they are, or as one: joining them copies all factors."""
    return terms if len(terms) <= 2 else [Term(1.0, *joined(terms)[:2])]


def _applied(owner: nn.Module, W: Tensor, x: Tensor, term: Term, view: MatrixView) -> Tensor:
    coef, A, B = term
    if not view.moves_all:
        A, B = view.padded(A, B, W)
    if view.layout == "embedding":
        return functional.linear(functional.embedding(x, B.mT) * coef, A)
    x = x.to(A.dtype)
    if view.layout != "conv":
        return functional.linear(functional.linear(x, B) * coef, A)
    inner: Any = owner
    kernel = [1] * (W.dim() - 2)
    hidden = inner._conv_forward(x, B.view(-1, *W.shape[1:]), None)
    return CONVOLUTIONS[W.dim()](hidden * coef, A.view(*A.shape, *kernel))


def forward_with(owner: nn.Module, name: str, W: Tensor, x: Tensor, further: Further) -> Tensor:
    """Return what a module computes with another W."""
    if getattr(owner, "max_norm", None) is not None:
        W = W.clone()  # the forward pass rewrites its rows, and W may be the copy of the base itself
    if "forward" not in owner.__dict__:
        # Other threads may be in a forward pass of this module: leave it as it is.
        twin = object.__new__(type(owner))
        twin.__dict__.update(owner.__dict__, _parameters=dict(owner._parameters), _buffers=dict(owner._buffers))
        owner = twin
    with standing_in(owner, name, W):
        return forward_of(owner, W, x, further)


def forward_of(owner: nn.Module, W: Tensor, x: Tensor, further: Further) -> Tensor:
    """Return what a module whose weight is W computes, also for an x that autocast has made narrower."""
    # Compiled graphs hold the casts of autocast, which is off when they run.
    is_narrower = x.is_floating_point() and W.is_floating_point() and x.element_size() < W.element_size()
    args, kwargs = further
    return owner.forward(x.to(W.dtype) if is_narrower else x, *args, **kwargs)  # type: ignore[no-any-return]


def stood_in_for(W: Any) -> Any:
    """Return the W that a tensor stands in for; another tensor as it is."""
    return getattr(W, "stands_in_for", W)


@contextmanager
def standing_in(owner: nn.Module, name: str, W: Tensor) -> Iterator[None]:
    """Let a tensor stand in for the W of a module."""
    places: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers, owner.__dict__)
    place = next(slots for slots in places if name in slots)
    before = place[name]
    stand_in: Any = W.detach().to(before.device, before.dtype)
    stand_in = nn.Parameter(stand_in, requires_grad=False) if isinstance(before, nn.Parameter) else stand_in
    stand_in.stands_in_for = stood_in_for(before)
    place[name] = stand_in
    try:
        yield
    finally:
        place[name] = before
