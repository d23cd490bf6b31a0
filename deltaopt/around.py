"""torch's optimizers for several ranks around this one, and local SGD within it.

They change A and B where this optimizer does not see it, or hand it a part of the layers. Those around it call it, so
that they are found among its callers: they do not show in its arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from deltaopt.inner import nested
from deltaopt.messages import layers
from deltaopt.rounding.writer import Rounding

if TYPE_CHECKING:
    from deltaopt.rule import UpdateRule
    from deltaopt.weight import WeightState

LOCAL_SGD = "torch.distributed.optim.post_localSGD_optimizer"

ZERO = (
    "a ZeroRedundancyOptimizer is around this optimizer: it gives each rank some of the factors to step, so that each "
    "rank would move other W. Put it inside: DeltaLoRAOptimizer(ZeroRedundancyOptimizer, triples, "
    "optimizer_class=torch.optim.AdamW, lr=...)"
)

AROUND_CONSTRUCTION = {
    "torch.distributed.optim.zero_redundancy_optimizer": ZERO,
    "torch.distributed.optim.apply_optimizer_in_backward": (
        "_apply_optimizer_in_backward makes an optimizer for each parameter, which steps within the backward pass; W "
        "follows A and B together, after it. Call step() of one optimizer after backward(): "
        "DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=...)"
    ),
}
"""By module of torch: why an optimizer cannot be built by it."""

AROUND_STEP = {"torch.distributed.optim.zero_redundancy_optimizer": ZERO}
"""By module of torch: why it cannot step this optimizer."""

AROUND_STEP_IN_PLACE = {
    **AROUND_STEP,
    LOCAL_SGD: (
        "a PostLocalSGDOptimizer is around this optimizer: it averages A and B over the ranks after the step, where W "
        "cannot follow, so that the ranks' W would differ. Put it inside, DeltaLoRAOptimizer(PostLocalSGDOptimizer("
        'torch.optim.AdamW(factors), averager), triples), or take weight_update="folded", which leaves W alone'
    ),
}
"""The same, where it moves W in place."""


def check_not_built_within() -> None:
    """Raise TypeError for an optimizer that another one is building: it would get some of the factors."""
    if found := _caller(AROUND_CONSTRUCTION):
        raise TypeError(f"DeltaLoRAOptimizer: {found}")


def check_not_stepped_within(rule: UpdateRule) -> None:
    """Raise RuntimeError for a step that another optimizer takes, where A and B change outside of it."""
    if not torch.compiler.is_compiling():
        found = _caller(AROUND_STEP_IN_PLACE if rule.moves_weights else AROUND_STEP)
        if found:
            raise RuntimeError(f"step(): {found} (nothing was changed)")


def check_local_sgd(inner: Optimizer, weights: Iterable[WeightState], rule: UpdateRule, rounding: Rounding) -> None:
    """Raise ValueError for local SGD within this optimizer where rounding would take the ranks' W apart.

    The ranks' A and B differ between two averages, and so does W, which comes back with them up to what was rounded
    off on the way. Compensated rounding keeps that; float32 leaves some hundred-thousandths of the movement.
    """
    module = sys.modules.get(LOCAL_SGD)
    if module is None or not rule.moves_weights:
        return
    labels = [
        weight.label
        for weight in weights
        if (dtype := weight.tensors.W.dtype).is_floating_point
        and dtype.itemsize <= 2
        and rounding.of(dtype) != "compensated"
    ]
    if labels and any(isinstance(each, module.PostLocalSGDOptimizer) for each in nested(inner)):
        raise ValueError(
            f"with a PostLocalSGDOptimizer inside, A and B of the ranks differ between two averages, and the 16-bit W "
            f"of {layers(labels)} would be rounded in another way on each rank: they would stay apart for ever. Take "
            'rounding="compensated", or weight_update="folded", or a W in float32'
        )


def _caller(reasons: Mapping[str, str]) -> str | None:
    """Return the reason of the innermost caller that is one of these modules."""
    if not any(name in sys.modules for name in reasons):
        return None
    frame = sys._getframe(2)
    while frame is not None:
        reason = reasons.get(frame.f_globals.get("__name__", ""))
        if reason is not None:
            return reason
        frame = frame.f_back  # type: ignore[assignment]
    return None
